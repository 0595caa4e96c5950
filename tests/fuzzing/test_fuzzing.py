"""A few hundred mutations, the same ones each time; `benchmarks/fuzz.py` tries thousands."""

import time

import pytest

from fuzzing.harness import attempt, prepare

MUTATIONS = 250
BUDGET_SECONDS = 20


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    base = tmp_path_factory.mktemp("fuzz")
    prepare(base)
    return base


def test_what_is_damaged_is_refused_in_a_sentence_or_changes_nothing(base):
    started, tried = time.monotonic(), 0
    findings = []
    for seed in range(MUTATIONS):
        if time.monotonic() - started > BUDGET_SECONDS:
            break
        tried += 1
        if (finding := attempt(base, seed)) is not None:
            findings.append(finding)
    assert not findings
    assert tried >= 20

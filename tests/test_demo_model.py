"""The main job on a real model: quantize, export, verify, and load the export with somebody else's code."""

import math

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import fewbit
from fewbit.calibration.tokens import tokenize
from fewbit.models.demo import make_demo_model

pytestmark = pytest.mark.model
EVALUATION = "examples/evaluation.txt"


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    directory = tmp_path_factory.mktemp("demo") / "model"
    make_demo_model(directory, use_hub=False)
    return directory


@pytest.fixture(scope="module")
def ids(demo, pytestconfig):
    text = (pytestconfig.rootpath / EVALUATION).read_text(encoding="utf-8")
    return tokenize([text], AutoTokenizer.from_pretrained(demo))[:1024].view(2, 512)


@pytest.fixture(scope="module")
def run(demo, tmp_path_factory):
    output = tmp_path_factory.mktemp("run") / "run"
    return fewbit.quantize(
        demo, "W4A16", group_size=64, num_samples=8, sequence_length=512, output=output, progress=False
    )


@pytest.fixture(scope="module")
def measured(run, demo, ids):
    return fewbit.evaluate(run, ids, against=demo)


@pytest.fixture(scope="module")
def export(run):
    return run.export("compressed-tensors")


def perplexity(model, windows):
    losses = []
    with torch.no_grad():
        for window in windows:
            logits = model(window.unsqueeze(0)).logits[0, :-1].float()
            losses.append(torch.nn.functional.cross_entropy(logits, window[1:]))
    return math.exp(torch.stack(losses).mean())


def test_every_linear_is_quantized_and_little_is_lost(run, measured):
    assert run.report["totals"]["linears"] == {"quantized": 210, "skipped": 1}
    assert run.report["totals"]["fallbacks"] == 0
    assert run.report["totals"]["bits_per_weight"] == pytest.approx(4.25)
    assert measured.perplexity < 1.25 * measured.reference_perplexity
    assert measured.top1_agreement > 0.7


def test_the_export_equals_the_run(run, export):
    (verified,) = run.verify()
    assert verified.quantized == 210


def test_transformers_loads_the_export_and_measures_the_same_perplexity(export, ids, measured):
    model = AutoModelForCausalLM.from_pretrained(export, dtype=torch.float32).eval()
    assert perplexity(model, ids) == pytest.approx(measured.perplexity, rel=5e-3)


def test_transformers_computes_in_bfloat16_with_the_runs_weights_rounded_once(run, export, ids, dequantized):
    windows = ids[:, :256]
    model = AutoModelForCausalLM.from_pretrained(export, dtype=torch.bfloat16).eval()
    expected = perplexity(dequantized(run.directory, torch.bfloat16), windows)
    assert perplexity(model, windows) == pytest.approx(expected, rel=1e-3)


def test_the_export_evaluates_as_the_run_does(run, export, ids):
    assert fewbit.evaluate(export, ids[:1]).perplexity == fewbit.evaluate(run, ids[:1]).perplexity

"""Thousands of damaged runs, exports, models and recipes: no traceback, no hang, no changed value that is accepted.

    python benchmarks/fuzz.py --mutations 10000 --jobs 2 --json benchmarks/results/fuzz.json

Each mutation follows from its number, so `--only NUMBER` tries one again. What counts as wrong stands at the head of
tests/fuzzing/harness.py.
"""

import argparse
import datetime
import json
import multiprocessing
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
from fuzzing.harness import TARGETS, attempt, prepare


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mutations", type=int, default=10_000)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--only", type=int)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    numbers = range(arguments.first, arguments.first + arguments.mutations)
    if arguments.only is not None:
        numbers = range(arguments.only, arguments.only + 1)
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="fuzz-base-") as made:
        base = Path(made)
        prepare(base)
        context = multiprocessing.get_context("fork")
        with ProcessPoolExecutor(arguments.jobs, mp_context=context) as pool:
            results = pool.map(partial(attempt, base), numbers, chunksize=20)
            findings = []
            for finding in results:
                if finding is not None:
                    findings.append(finding)
                    print(f"{finding.seed} {finding.operation}: {finding.mutation}\n    {finding.what}", flush=True)
    seconds = time.monotonic() - started
    kinds = Counter(finding.what.split(":")[0][:80] for finding in findings)
    print(f"{len(numbers)} mutations, {len(findings)} findings, {seconds:.0f} s")
    for kind, count in kinds.most_common():
        print(f"{count:5} {kind}")
    if arguments.json is not None:
        result = {
            "date": datetime.date.today().isoformat(),
            "mutations": len(numbers),
            "first": arguments.first,
            "targets": {name: share for name, (share, _) in TARGETS.items()},
            "seconds": round(seconds),
            "findings": [asdict(finding) for finding in findings],
        }
        arguments.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()

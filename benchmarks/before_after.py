"""Time and memory of one command on two commits, in turn: what a refactoring costs.

    python benchmarks/before_after.py BEFORE MODEL_DIR --calibration CALIBRATION.txt --json benchmarks/results/X.json

BEFORE is a revision of this repository; after it is the working tree. Each quantizes (W4A16 in groups of 64, GPTQ,
32 × 512 tokens) in a process of its own, `--repeat` times in turn.
"""

import argparse
import datetime
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent


def quantized(source: Path, args: argparse.Namespace, output: Path) -> dict[str, float]:
    """Seconds of a run and its peak memory in MiB, by the report of the fewbit in `source`."""
    command = [
        sys.executable,
        "-P",
        "-m",
        "fewbit",
        "quantize",
        args.model_dir,
        "--output",
        output,
        "--scheme",
        "W4A16",
    ]
    command += ["--group-size", 64, "--calibration", args.calibration, "--num-samples", 32, "--sequence-length", 512]
    environment = os.environ | {"PYTHONPATH": str(source)}
    subprocess.run([str(part) for part in command], check=True, env=environment, capture_output=True)
    totals = json.loads((output / "report.json").read_text())["totals"]
    return {"seconds": totals["seconds"]["total"], "peak_mib": round(totals["peak_memory_bytes"] / 2**20)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before")
    parser.add_argument("model_dir", type=Path)
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--json", type=Path, required=True)
    args = parser.parse_args()
    runs: dict[str, list[dict[str, float]]] = {"before": [], "after": []}
    with tempfile.TemporaryDirectory() as scratch:
        old = Path(scratch) / "old"
        subprocess.run(["git", "-C", ROOT, "worktree", "add", "--quiet", "--detach", old, args.before], check=True)
        try:
            for number in range(args.repeat):
                for name, source in (("before", old / "src"), ("after", ROOT / "src")):
                    runs[name].append(quantized(source, args, Path(scratch) / f"{name}{number}"))
                    print(name, runs[name][-1], flush=True)
        finally:
            subprocess.run(["git", "-C", ROOT, "worktree", "remove", "--force", old], check=True)
    medians = {
        name: {key: statistics.median(run[key] for run in found) for key in found[0]} for name, found in runs.items()
    }
    ratio = medians["after"]["seconds"] / medians["before"]["seconds"]
    print(json.dumps(medians), f"after / before: {ratio:.3f}x the time")
    written = {"date": str(datetime.date.today()), "before": args.before, "runs": runs, "medians": medians}
    args.json.write_text(json.dumps(written, indent=1) + "\n")


if __name__ == "__main__":
    main()

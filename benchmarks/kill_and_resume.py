"""kill -9 at random moments: every resumed run must have the same bytes as an undisturbed one.

    python benchmarks/kill_and_resume.py MODEL_DIR --calibration FILE --json benchmarks/results/kill_and_resume.json

Moments are drawn evenly over the duration of the undisturbed run (seeded). Compared are all safetensors files of run
and export, and config.json; the report and the journal hold seconds and are left out.
"""

import argparse
import datetime
import hashlib
import json
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path


def command(args: argparse.Namespace, run: Path, resume: bool) -> list[str]:
    words = [sys.executable, "-m", "fewbit", "quantize", args.model_dir, "--output", run, "--scheme", "W4A16"]
    words += ["--group-size", 64, "--calibration", args.calibration, "--num-samples", args.num_samples]
    words += ["--sequence-length", 128, "--export", "compressed-tensors"] + (["--resume"] if resume else [])
    return [str(word) for word in words]


def digest(run: Path) -> str:
    total = hashlib.sha256()
    for file in sorted(path for path in run.rglob("*") if path.suffix == ".safetensors" or path.name == "config.json"):
        total.update(str(file.relative_to(run)).encode())
        total.update(file.read_bytes())
    return total.hexdigest()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model_dir", type=Path)
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--num-samples", type=int, default=4)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, required=True)
    args = parser.parse_args()
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    moments = random.Random(args.seed)
    outcomes = []
    with tempfile.TemporaryDirectory() as scratch:
        whole = Path(scratch) / "whole"
        started = time.perf_counter()
        subprocess.run(command(args, whole, resume=False), check=True, **quiet)
        duration = time.perf_counter() - started
        expected = digest(whole)
        for number in range(args.kills):
            run = Path(scratch) / f"killed-{number}"
            process = subprocess.Popen(command(args, run, resume=False), **quiet)
            moment = moments.uniform(0, duration)
            try:
                process.wait(timeout=moment)
                killed = False
            except subprocess.TimeoutExpired:
                process.send_signal(signal.SIGKILL)
                process.wait()
                killed = True
            blocks = len(list((run / "blocks").glob("*.safetensors"))) if run.exists() else 0
            subprocess.run(command(args, run, resume=True), check=True, **quiet)
            same = digest(run) == expected
            outcomes.append({"seconds": round(moment, 2), "killed": killed, "blocks": blocks, "identical": same})
            print(outcomes[-1], flush=True)
            subprocess.run(["rm", "-r", str(run)], check=True)
    result = {
        "date": datetime.date.today().isoformat(),
        "model": args.model_dir.name,
        "undisturbed_seconds": duration,
        "identical": sum(outcome["identical"] for outcome in outcomes),
        "kills": outcomes,
    }
    args.json.parent.mkdir(parents=True, exist_ok=True)
    args.json.write_text(json.dumps(result, indent=2) + "\n")
    print(f"{result['identical']} of {args.kills} identical")


if __name__ == "__main__":
    main()

"""GPTQ W4A16 in groups of 64: what it costs in perplexity and in seconds, fewbit beside llm-compressor, in one run.

    python benchmarks/gptq_vs_llmcompressor.py MODEL_DIR --peer-python PEER_VENV/bin/python \\
        --calibration CALIBRATION.txt --evaluation EVALUATION.txt --json benchmarks/results/NAME.json

Both tools get the same token windows (windows.py), compute in float32, and are measured by the same evaluation.
`--options` gives fewbit's GPTQ options as JSON, to measure what each part of the method brings.
"""

import argparse
import datetime
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import fewbit

HERE = Path(__file__).parent


def run_peer(args: argparse.Namespace, scratch: Path) -> dict:
    """llm-compressor's GPTQ in its own environment."""
    result = scratch / "peer.json"
    command = [args.peer_python, HERE / "llmcompressor_gptq.py", args.model_dir, scratch / "peer"]
    command += ["--calibration", args.calibration, "--json", result]
    command += ["--num-samples", args.num_samples, "--sequence-length", args.sequence_length]
    command += ["--group-size", args.group_size] + (["--asymmetric"] if args.asymmetric else [])
    subprocess.run([str(part) for part in command], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    measured = json.loads(result.read_text())
    seconds, peak = measured["quantize_seconds"], measured["peak_memory_bytes"]
    return {"seconds": seconds, "peak_memory_bytes": peak, "versions": measured["versions"]} | evaluate(
        args, scratch / "peer" / "compressed"
    )


def run_fewbit(args: argparse.Namespace, scratch: Path, options: dict) -> dict:
    """fewbit's GPTQ in a process of its own, so that its peak memory is its own."""
    recipe = scratch / "recipe.json"
    scheme = "W4A16_ASYM" if args.asymmetric else "W4A16"
    algorithm = {"name": "gptq", **options}
    recipe.write_text(json.dumps({"scheme": scheme, "group_size": args.group_size, "algorithm": algorithm}))
    run = scratch / "run"
    command = [sys.executable, "-m", "fewbit", "quantize", args.model_dir, "--output", run, "--recipe", recipe]
    command += ["--calibration", args.calibration]
    command += ["--num-samples", args.num_samples, "--sequence-length", args.sequence_length]
    subprocess.run([str(part) for part in command], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    totals = json.loads((run / "report.json").read_text())["totals"]
    return {
        "options": options,
        "seconds": totals["seconds"]["total"],
        "peak_memory_bytes": totals["peak_memory_bytes"],
    } | evaluate(args, run)


def evaluate(args: argparse.Namespace, model: Path) -> dict:
    """Perplexity and distance to the original, on text that was not used for calibration."""
    result = fewbit.evaluate(
        model,
        args.evaluation,
        sequence_length=args.sequence_length,
        max_windows=args.windows,
        against=args.model_dir,
    )
    return {
        "perplexity": result.perplexity,
        "perplexity_cost": result.perplexity - result.reference_perplexity,
        "reference_perplexity": result.reference_perplexity,
        "kl_mean": result.kl_mean,
        "top1_agreement": result.top1_agreement,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model_dir", type=Path)
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--evaluation", type=Path, required=True)
    parser.add_argument("--peer-python", type=Path, help="python of an environment with llmcompressor 0.14")
    parser.add_argument(
        "--options", action="append", type=json.loads, help="GPTQ options of fewbit as JSON; repeatable"
    )
    parser.add_argument("--num-samples", type=int, default=32)
    parser.add_argument("--sequence-length", type=int, default=512)
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--asymmetric", action="store_true")
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--json", type=Path, required=True)
    args = parser.parse_args()

    results: dict = {
        "date": datetime.date.today().isoformat(),
        "model": args.model_dir.name,
        "evaluation": args.evaluation.name,
        "windows": args.windows,
        "samples": [args.num_samples, args.sequence_length],
        "group_size": args.group_size,
        "symmetric": not args.asymmetric,
        "fewbit": [],
    }
    for options in args.options or [{}]:
        with tempfile.TemporaryDirectory() as scratch:
            results["fewbit"].append(run_fewbit(args, Path(scratch), options))
            print(json.dumps(results["fewbit"][-1]), flush=True)
    if args.peer_python:
        with tempfile.TemporaryDirectory() as scratch:
            peer = results["llm-compressor"] = run_peer(args, Path(scratch))
            print(json.dumps(peer), flush=True)
        for ours in results["fewbit"]:
            ours["cost_ratio"] = ours["perplexity_cost"] / peer["perplexity_cost"]
            ours["seconds_ratio"] = ours["seconds"] / peer["seconds"]
            print(f"{ours['options']}: cost {ours['cost_ratio']:.2f}x, seconds {ours['seconds_ratio']:.2f}x")
    args.json.parent.mkdir(parents=True, exist_ok=True)
    args.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()

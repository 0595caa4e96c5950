"""Time and memory on a GPU: an 8 B shape with random weights, a few of its blocks, several recipes.

    python benchmarks/gpu.py SCRATCH_DIR --json benchmarks/results/gpu.json [--layers 2] [--samples 64] [--length 2048]
        [--activation-memory 40GiB]

Prints seconds per block (reading, calibration, quantization, writing), what 32 of them would take, and the peak of GPU
memory. One recipe after another in one process; the first run, which loads libraries, is not counted.
"""

import argparse
import datetime
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch

import fewbit

HERE = Path(__file__).parent
RECIPES = {
    "W4A16 rtn": {"scheme": "W4A16", "algorithm": "rtn"},
    "W4A16 gptq": {"scheme": "W4A16"},
    "W4A16 gptq, drift 0.5": {"scheme": "W4A16", "algorithm": "gptq:drift=0.5"},
    "W8A8 smoothquant+gptq": {"scheme": "W8A8", "algorithm": "smoothquant+gptq"},
    "NVFP4 gptq": {"scheme": "NVFP4"},
}


def measure(model: Path, output: Path, recipe: dict, ids: torch.Tensor, layers: int, memory: str) -> dict:
    """One run: seconds of its walk, per block, and the GPU's peak."""
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    started = time.perf_counter()
    options = {"config": recipe, "calibration": ids, "device": "cuda", "activation_memory": memory}
    run = fewbit.quantize(model, output=output, progress=False, **options)
    torch.cuda.synchronize()
    total = time.perf_counter() - started
    walked = run.report["totals"]["seconds"]["blocks"]
    shutil.rmtree(output)
    return {
        "seconds_per_block": walked / layers,
        "minutes_for_32_blocks": walked / layers * 32 / 60,
        "seconds_in_all": total,
        "seconds_of_algorithms": sum(row["seconds"] for row in run.report["linears"] if row["status"] == "quantized"),
        "peak_gpu_bytes": torch.cuda.max_memory_allocated(),
        "forward": run.report["run"]["forward"],
        "loss": run.report["totals"]["loss"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scratch", type=Path)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--activation-memory", default="40GiB")
    parser.add_argument("--recipes", nargs="*", choices=RECIPES, default=list(RECIPES))
    parser.add_argument("--json", type=Path, required=True)
    args = parser.parse_args()
    model = args.scratch / f"llama-8b-{args.layers}"
    if not model.exists():
        make = [sys.executable, HERE / "make_random_llama.py", model, "--shape", "8b", "--layers", str(args.layers)]
        subprocess.run(make, check=True)
    ids = torch.randint(0, 128256, (args.samples, args.length), generator=torch.Generator().manual_seed(0))
    measure(model, args.scratch / "warm-up", RECIPES["W4A16 gptq"], ids[:2, :256], args.layers, "1GiB")
    results: dict = {
        "date": datetime.date.today().isoformat(),
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "tokens": [args.samples, args.length],
        "layers": args.layers,
        "activation_memory": args.activation_memory,
        "recipes": {},
    }
    for name in args.recipes:
        found = measure(model, args.scratch / "run", RECIPES[name], ids, args.layers, args.activation_memory)
        results["recipes"][name] = found
        times = f"{found['seconds_per_block']:7.1f} s a block  {found['minutes_for_32_blocks']:6.1f} min for 32"
        print(f"{name:24} {times}  {found['peak_gpu_bytes'] / 2**30:5.1f} GiB  {found['forward']}", flush=True)
        args.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()

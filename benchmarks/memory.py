"""Peak resident memory (VmHWM) of quantization with export, and of evaluation, on random-weight Llamas.

    python benchmarks/memory.py SCRATCH_DIR --json benchmarks/results/memory.json

GPTQ with 4 and RTN with 4 and 32 layers of hidden size 3072 (32 layers: 4 billion parameters, 7.5 GB in bf16), 8 × 256
tokens; evaluation of the large one on 2 windows of 256. Each measurement is a process of its own. `--gptq-layers 32`
also measures GPTQ on the large model, which takes long.
"""

import argparse
import datetime
import json
import shutil
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
QUANTIZE = """
import json, sys, torch, fewbit
from fewbit.runs.report import peak_memory
model, output, algorithm = sys.argv[1:4]
ids = torch.randint(0, 32000, (8, 256), generator=torch.Generator().manual_seed(0))
run = fewbit.quantize(model, "W4A16", algorithm=algorithm, calibration=ids, output=output, progress=False)
run.export("compressed-tensors")
seconds = run.report["totals"]["seconds"]["total"]
print(json.dumps({"peak_memory_bytes": peak_memory(), "seconds": seconds, "forward": run.report["run"]["forward"]}))
"""
EVALUATE = """
import json, sys, torch, fewbit
from fewbit.runs.report import peak_memory
ids = torch.randint(0, 32000, (2, 256), generator=torch.Generator().manual_seed(1))
result = fewbit.evaluate(sys.argv[1], ids)
print(json.dumps({"peak_memory_bytes": peak_memory(), "perplexity": result.perplexity}))
"""


def measure(code: str, *arguments: object) -> dict:
    command = [sys.executable, "-c", code, *map(str, arguments)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scratch", type=Path)
    parser.add_argument("--gptq-layers", type=int, nargs="*", default=[4])
    parser.add_argument("--rtn-layers", type=int, nargs="*", default=[4, 32])
    parser.add_argument("--json", type=Path, required=True)
    args = parser.parse_args()
    results: dict = {"date": datetime.date.today().isoformat(), "tokens": [8, 256], "measurements": []}
    for layers in sorted({*args.gptq_layers, *args.rtn_layers}):
        model = args.scratch / f"llama-{layers}"
        if not model.exists():
            subprocess.run([sys.executable, HERE / "make_random_llama.py", model, "--layers", str(layers)], check=True)
        for algorithm in [a for a in ("rtn", "gptq") if layers in getattr(args, f"{a}_layers")]:
            run = args.scratch / f"run-{algorithm}-{layers}"
            shutil.rmtree(run, ignore_errors=True)
            record(results, f"{algorithm}, {layers} layers, with export", measure(QUANTIZE, model, run, algorithm))
            shutil.rmtree(run)
        if layers == max(args.rtn_layers):
            record(results, f"evaluation, {layers} layers", measure(EVALUATE, model))
    args.json.parent.mkdir(parents=True, exist_ok=True)
    args.json.write_text(json.dumps(results, indent=2) + "\n")


def record(results: dict, what: str, measured: dict) -> None:
    results["measurements"].append({"what": what, **measured})
    print(f"{what}: {measured['peak_memory_bytes'] / 2**30:.2f} GiB {measured}", flush=True)


if __name__ == "__main__":
    main()

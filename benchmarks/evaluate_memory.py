"""Peak resident memory (VmHWM) and seconds of evaluation by the number of windows and, with quantization, of blocks.

    python benchmarks/evaluate_memory.py demo/model SCRATCH_DIR --json benchmarks/results/evaluate_memory.json

Windows of 512 random tokens; the model alone and against itself. Blocks: random Llamas of hidden size 256 in bf16,
8 × 512 tokens, evaluation and W4A16 by round-to-nearest. Each measurement is a process of its own.
"""

import argparse
import datetime
import json
import shutil
import subprocess
import sys
from pathlib import Path

START = """
import json, sys, time, torch, fewbit
from fewbit.runs.report import peak_memory
model, windows, other = sys.argv[1], int(sys.argv[2]), sys.argv[3]
vocabulary = json.loads(open(model + "/config.json").read())["vocab_size"]
ids = torch.randint(5, vocabulary, (windows, 512), generator=torch.Generator().manual_seed(0))
seconds, cpu = time.perf_counter(), time.process_time()
"""
EVALUATE = "fewbit.evaluate(model, ids, against=model if other else None)\n"
QUANTIZE = """
fewbit.quantize(model, "W4A16", group_size=64, algorithm="rtn", calibration=ids, output=other, progress=False)
"""
END = """
seconds, cpu = time.perf_counter() - seconds, time.process_time() - cpu
print(json.dumps({"peak_memory_mib": peak_memory() >> 20, "seconds": round(seconds, 1), "cpu_seconds": round(cpu, 1)}))
"""
SAVE = """
import sys, torch, transformers
config = transformers.LlamaConfig(
    vocab_size=512, hidden_size=256, intermediate_size=768, num_hidden_layers=int(sys.argv[2]), num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=512,
)
torch.manual_seed(0)
transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(sys.argv[1])
"""


def call(code: str, *arguments: object) -> str:
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True).stdout


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("scratch", type=Path)
    parser.add_argument("--windows", type=int, nargs="*", default=[2, 20, 100])
    parser.add_argument("--blocks", type=int, nargs="*", default=[5, 40])
    parser.add_argument("--json", type=Path, required=True)
    args = parser.parse_args()
    rows: list[dict] = []

    def measure(what: str, code: str, *arguments: object) -> None:
        measured = json.loads(call(START + code + END, *arguments).splitlines()[-1])
        rows.append({"what": what, **measured})
        print(what, measured, flush=True)
        results = {"date": datetime.date.today().isoformat(), "tokens": 512, "measurements": rows}
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(results, indent=2) + "\n")

    for count in args.blocks:
        model, run = args.scratch / f"llama-{count}", args.scratch / "run"
        if not model.exists():
            call(SAVE, model, count)
        measure(f"evaluation, {count} blocks", EVALUATE, model, 8, "")
        shutil.rmtree(run, ignore_errors=True)
        measure(f"quantization, {count} blocks", QUANTIZE, model, 8, run)
        shutil.rmtree(run)
    for count in args.windows:
        measure(f"evaluation, {count} windows", EVALUATE, args.model, count, "")
        if count < 100:
            measure(f"evaluation against another, {count} windows", EVALUATE, args.model, count, "against")


if __name__ == "__main__":
    main()

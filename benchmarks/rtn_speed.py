"""Round to nearest without data: millions of parameters a second, beside llm-compressor in the same run.

    python benchmarks/make_random_llama.py MODELS/random --layers 3 --tokenizer MODELS/smollm2
    python benchmarks/rtn_speed.py MODELS/random --peer-python PEER/bin/python --json RESULT.json

Each tool quantizes the checkpoint once per scheme in a process of its own, from opening the files to the written
result, after a warm-up on a model of one small layer (imports and first calls are not what is measured). Parameters
are all of the model's, and those of the quantized linears alone (embeddings and head are only copied). CPU seconds
stand beside wall seconds: on a machine that others use, they are what compares.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

SCHEMES = ("W8A16", "W8A8", "FP8_DYNAMIC", "W4A16-g64")


def warm_up_model(directory: Path, tokenizer: Path) -> Path:
    """A Llama of one small layer."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=256, intermediate_size=512, vocab_size=512, num_hidden_layers=1, num_attention_heads=4
    )
    LlamaForCausalLM(config).bfloat16().save_pretrained(directory)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        if (tokenizer / name).exists():
            shutil.copy(tokenizer / name, directory / name)
    return directory


def fewbit_quantize(model: Path, scheme: str, output: Path) -> None:
    import fewbit

    fewbit.quantize(model, scheme, algorithm="rtn", calibration="none", output=output, progress=False)


def peer_quantize(model: Path, scheme: str, output: Path) -> None:
    """The same scheme by llm-compressor: preset schemes, groups of 64 as a scheme of its own."""
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from llmcompressor import oneshot
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from transformers import AutoModelForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(model, dtype="auto")
    if scheme == "W4A16-g64":
        args = QuantizationArgs(num_bits=4, strategy="group", group_size=64, symmetric=True)
        groups = {"group_0": QuantizationScheme(targets=["Linear"], weights=args)}
        recipe = QuantizationModifier(config_groups=groups, ignore=["lm_head"])
    elif scheme == "W8A8":  # with dynamic activations, as fewbit's
        recipe = QuantizationModifier(scheme="INT8", targets="Linear", ignore=["lm_head"])
    else:
        recipe = QuantizationModifier(scheme=scheme, targets="Linear", ignore=["lm_head"])
    oneshot(model=loaded, recipe=recipe)
    loaded.save_pretrained(output, save_compressed=True)


def measure(tool: str, model: Path, scheme: str, scratch: Path) -> dict[str, float]:
    """Seconds of one quantization in this process."""
    quantize = fewbit_quantize if tool == "fewbit" else peer_quantize
    quantize(warm_up_model(scratch / "small", model), scheme, scratch / "small-out")
    wall, cpu = time.perf_counter(), time.process_time()
    quantize(model, scheme, scratch / "out")
    return {"seconds": time.perf_counter() - wall, "cpu_seconds": time.process_time() - cpu}


def parameters(model: Path) -> dict[str, int]:
    """How many there are, and how many of them are quantized: the linears of the blocks."""
    from safetensors import safe_open

    total = quantized = 0
    for file in sorted(model.glob("*.safetensors")):
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118 (a safetensors handle is no mapping)
                shape = opened.get_slice(name).get_shape()
                count = shape[0] * (shape[1] if len(shape) == 2 else 1)
                total += count
                quantized += count if "_proj." in name else 0
    return {"all": total, "quantized": quantized}


def run(python: str, tool: str, args: argparse.Namespace, scheme: str) -> dict[str, Any]:
    """`measure` in a process of its own."""
    with tempfile.TemporaryDirectory(dir=args.scratch) as scratch:
        command = [python, __file__, str(args.model), "--measure", tool, scheme, "--scratch", scratch]
        environment = dict(os.environ, OMP_NUM_THREADS=str(args.threads))
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise SystemExit(f"{tool} {scheme}: {done.stderr[-2000:]}")
    result: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--peer-python", help="an environment with llmcompressor; without it, fewbit alone")
    parser.add_argument("--schemes", nargs="+", default=SCHEMES)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--scratch", type=Path, default=None, help="where what is written lies until it is removed")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(measure(args.measure[0], args.model, args.measure[1], args.scratch)))
        return
    counts = parameters(args.model)
    load = os.getloadavg()[0]
    rows = []
    for scheme in args.schemes:
        for tool, python in (("fewbit", sys.executable), ("llm-compressor", args.peer_python)):
            if python is None:
                continue
            row = {"scheme": scheme, "tool": tool, **run(python, tool, args, scheme)}
            row["million_a_second"] = counts["all"] / row["seconds"] / 1e6
            row["million_quantized_a_second"] = counts["quantized"] / row["seconds"] / 1e6
            row["million_a_cpu_second"] = counts["all"] / row["cpu_seconds"] / 1e6
            rows.append(row)
            print(
                f"{scheme:12} {tool:15} {row['seconds']:6.1f} s  {row['cpu_seconds']:6.1f} CPU s  "
                f"{row['million_a_second']:6.1f} M/s  {row['million_quantized_a_second']:6.1f} quantized M/s",
                flush=True,
            )
    if args.json:
        described = {"parameters": counts, "threads": args.threads, "load_at_start": load, "torch": version("torch")}
        args.json.write_text(json.dumps(described | {"rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()

"""Quantize a checkpoint with llm-compressor, as the peer that fewbit is compared with.

Round-to-nearest or GPTQ (with SmoothQuant before it if asked), 4-bit weights in groups or one of its preset schemes,
every other setting at llm-compressor's default. Calibration is the
shared protocol of windows.py, passed already tokenized. Run it in an environment that has llmcompressor.

    python llmcompressor_gptq.py MODEL_DIR OUT_DIR --calibration FILE --json RESULT.json

Writes OUT_DIR/compressed, what llm-compressor saves (compressed-tensors), and OUT_DIR/dense, the same file read back
and dequantized to float32, whose perplexity any tool can measure. Quantization, with scales in float32, and
dequantization are llm-compressor's own. As proof that the two hold the quantized weights, the JSON has the largest
difference between the logits of the dense copy and those of the model in memory just after quantization.
"""

import argparse
import json
import time
from importlib.metadata import version
from pathlib import Path

import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.quantization import QuantizationModifier
from llmcompressor.modifiers.transform.smoothquant import SmoothQuantModifier
from transformers import AutoModelForCausalLM, AutoTokenizer, CompressedTensorsConfig, PreTrainedModel
from windows import Windows

MODIFIERS = {"gptq": GPTQModifier, "rtn": QuantizationModifier}
PACKAGES = ("llmcompressor", "compressed-tensors", "transformers", "torch")


def peak_memory_bytes() -> int:
    """The largest resident set of this process so far (Linux)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise OSError("No VmHWM in /proc/self/status.")


def quantize(model: PreTrainedModel, algorithm: str, scheme: QuantizationScheme | str, samples: torch.Tensor) -> None:
    """Quantize `model` in place; round-to-nearest of weights alone needs no `samples` [n, length]."""
    modifier = MODIFIERS[algorithm.removeprefix("smoothquant+")]
    if isinstance(scheme, str):
        recipe = [modifier(scheme=scheme, targets="Linear", ignore=["lm_head"])]
    else:
        recipe = [modifier(config_groups={"group_0": scheme}, ignore=["lm_head"])]
    if algorithm.startswith("smoothquant"):
        recipe.insert(0, SmoothQuantModifier(smoothing_strength=0.8))
    if algorithm == "rtn" and scheme not in ("NVFP4", "W8A8", "FP8"):
        oneshot(model=model, recipe=recipe)
        return
    oneshot(
        model=model,
        recipe=recipe,
        dataset=Dataset.from_dict({"input_ids": samples.tolist()}),
        num_calibration_samples=len(samples),
        max_seq_length=samples.shape[1],
        shuffle_calibration_samples=False,
    )


def save_dense(compressed_dir: Path, dense_dir: Path) -> None:
    """Read `compressed_dir` back, dequantize to float32 and save as an ordinary checkpoint."""
    model = AutoModelForCausalLM.from_pretrained(
        compressed_dir, dtype=torch.float32, quantization_config=CompressedTensorsConfig(dequantize=True)
    )
    # the weights are plain now, but transformers would still save them as a quantized model
    for attribute in ("hf_quantizer", "quantization_method", "is_quantized"):
        if hasattr(model, attribute):
            delattr(model, attribute)
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.save_pretrained(dense_dir)
    AutoTokenizer.from_pretrained(compressed_dir).save_pretrained(dense_dir)


@torch.inference_mode()
def first_logits(model: PreTrainedModel, samples: torch.Tensor) -> torch.Tensor:
    """Logits of the first window: [1, length, vocabulary]."""
    return model(input_ids=samples[:1], use_cache=False).logits


def main() -> None:
    started = time.perf_counter()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model_dir", type=Path)
    parser.add_argument("out_dir", type=Path)
    parser.add_argument("--calibration", type=Path, required=True, help="calibration text")
    parser.add_argument("--num-samples", type=int, default=32, help="windows to calibrate on (default %(default)s)")
    parser.add_argument("--sequence-length", type=int, default=512, help="tokens per window (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="chooses the windows")
    parser.add_argument("--group-size", type=int, default=64, help="weights per scale (default %(default)s)")
    parser.add_argument("--asymmetric", action="store_true", help="with zero points")
    parser.add_argument("--scheme", help="a preset (W8A8, NVFP4 …) instead of 4-bit weights; nothing dense is written")
    parser.add_argument("--algorithm", choices=(*MODIFIERS, "smoothquant+gptq"), default="gptq")
    parser.add_argument("--json", type=Path, required=True, help="where to write the result")
    args = parser.parse_args()

    weights = QuantizationArgs(
        num_bits=4, type="int", symmetric=not args.asymmetric, strategy="group", group_size=args.group_size
    )
    scheme = QuantizationScheme(targets=["Linear"], weights=weights)
    text = Windows(args.calibration, args.model_dir)
    samples = text.drawn(args.num_samples, args.sequence_length, args.seed)
    model = AutoModelForCausalLM.from_pretrained(args.model_dir, dtype=torch.float32)
    loaded_peak = peak_memory_bytes()

    quantize_started, cpu_started = time.perf_counter(), time.process_time()
    quantize(model, args.algorithm, args.scheme or scheme, samples)
    quantize_seconds, quantize_cpu_seconds = time.perf_counter() - quantize_started, time.process_time() - cpu_started
    quantize_peak = peak_memory_bytes()

    expected = first_logits(model, samples)
    compressed_dir, dense_dir = args.out_dir / "compressed", args.out_dir / "dense"
    model.save_pretrained(compressed_dir, save_compressed=True)
    AutoTokenizer.from_pretrained(args.model_dir).save_pretrained(compressed_dir)
    difference = None
    if args.scheme is None:
        save_dense(compressed_dir, dense_dir)
        dense = AutoModelForCausalLM.from_pretrained(dense_dir, dtype=torch.float32)
        difference = (first_logits(dense, samples) - expected).abs().max().item()

    result = {
        "model": args.model_dir.name,
        "algorithm": args.algorithm,
        "bits": 4,
        "group_size": args.group_size,
        "symmetric": not args.asymmetric,
        "calibration": args.calibration.name,
        "num_samples": args.num_samples,
        "sequence_length": args.sequence_length,
        "seed": args.seed,
        "quantize_seconds": quantize_seconds,  # oneshot alone: no import, no load, no save
        "quantize_cpu_seconds": quantize_cpu_seconds,  # over all threads: what a busy machine disturbs least
        "total_seconds": time.perf_counter() - started,  # all but the imports
        "peak_memory_bytes_loaded": loaded_peak,
        "peak_memory_bytes": quantize_peak,  # up to the end of oneshot
        "compressed_bytes": sum(file.stat().st_size for file in compressed_dir.glob("*.safetensors")),
        "dense_logits_max_difference": difference,
        "threads": torch.get_num_threads(),
        "versions": {package: version(package) for package in PACKAGES},
    }
    text = json.dumps(result, indent=2)
    args.json.parent.mkdir(parents=True, exist_ok=True)
    args.json.write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()

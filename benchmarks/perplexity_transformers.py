"""Perplexity of a checkpoint with plain transformers: the measure that belongs to none of the tools compared.

Disjoint windows from the start of the text; every token of a window but the first is predicted from those before it.
Perplexity = exp(-mean log-likelihood), over all predictions of all windows, log-likelihoods in float32.

    python perplexity_transformers.py MODEL_DIR --text FILE [--json]
"""

import argparse
import json
import math
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM
from windows import Windows


@torch.inference_mode()
def perplexity(model: torch.nn.Module, token_windows: torch.Tensor) -> float:
    """Perplexity of `model` on `token_windows` [windows, length], one window at a time."""
    total = 0.0
    for window in token_windows:
        logits = model(input_ids=window[None], use_cache=False).logits[0, :-1].float()
        # cross_entropy gives the negative log-likelihood of each next token; the sum over windows is in float64
        total += torch.nn.functional.cross_entropy(logits, window[1:], reduction="sum").item()
    return math.exp(total / token_windows[:, 1:].numel())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model_dir", type=Path)
    parser.add_argument("--text", type=Path, required=True, help="evaluation text")
    parser.add_argument("--sequence-length", type=int, default=512, help="tokens per window (default %(default)s)")
    parser.add_argument("--max-windows", type=int, default=16, help="windows from the start (default %(default)s)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="compute dtype")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a line of text")
    args = parser.parse_args()

    model = AutoModelForCausalLM.from_pretrained(args.model_dir, dtype=getattr(torch, args.dtype)).eval()
    token_windows = Windows(args.text, args.model_dir).all(args.sequence_length)[: args.max_windows]
    start = time.perf_counter()
    result = {
        "model": args.model_dir.name,
        "text": args.text.name,
        "perplexity": perplexity(model, token_windows),
        "windows": len(token_windows),
        "sequence_length": args.sequence_length,
        "dtype": args.dtype,
        "seconds": time.perf_counter() - start,
    }
    if args.json:
        print(json.dumps(result, indent=2))
    else:
        print(f"{result['model']}: perplexity {result['perplexity']:.4f} ({result['windows']} windows)")


if __name__ == "__main__":
    main()

"""float32 products on this CPU: torch's dense linear (MKL) beside fewbit's (oneDNN).

python benchmarks/linear_speed.py [--json FILE]
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import torch
from torch import nn

from fewbit.nn.linear import Linear

SHAPES = ((2048, 576, 1536), (2048, 1536, 576), (2048, 576, 576), (2048, 3072, 8192))


def gflops(linear: nn.Linear, x: torch.Tensor, repeats: int = 15) -> float:
    seconds = []
    for _ in range(repeats):
        started = time.perf_counter()
        linear(x)
        seconds.append(time.perf_counter() - started)
    return 2 * x.numel() * linear.out_features / statistics.median(seconds) / 1e9


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    results = []
    for rows, columns, out in SHAPES:
        x = torch.randn(rows, columns)
        plain = nn.Linear(columns, out, bias=False).requires_grad_(False)
        fast = Linear(columns, out, bias=False).requires_grad_(False)
        results.append({"shape": [rows, columns, out], "mkl": gflops(plain, x), "onednn": gflops(fast, x)})
        print(results[-1], flush=True)
    if args.json:
        args.json.write_text(json.dumps({"gflops": results}, indent=2) + "\n")


if __name__ == "__main__":
    main()

"""Make a model whose weights lie on no quantization grid, from one that was quantized before.

Small models often reach us through 4-bit files, so their weights already sit on a 4-bit grid. A quantizer that finds
that grid again looks lossless, and a comparison of quantizers says nothing. This script adds uniform noise one grid
step wide to every linear weight inside the decoder blocks: the grid is gone, the model is a little worse, and all
tools start from the same checkpoint. Embeddings, head and norms stay as they are.

    python make_dithered.py MODEL_DIR OUT_DIR
"""

import argparse
import re
import shutil
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

BLOCK_LINEAR = re.compile(r"\.layers\.\d+\..*\b(q|k|v|o|gate|up|down)_proj\.weight$")


def dither(weight: torch.Tensor, block: int, levels: int, generator: torch.Generator) -> torch.Tensor:
    """Add noise of one grid step to `weight` [out, in], computed in float32 and returned in bfloat16.

    A step is (max - min) / (levels - 1) of each run of `block` weights along `in`; the noise is uniform in ± half a
    step. One draw per weight, in row-major order.
    """
    if weight.shape[1] % block:
        raise ValueError(f"{weight.shape[1]} input features do not divide into blocks of {block}.")
    blocks = weight.float().unflatten(1, (-1, block))  # [out, in / block, block]
    step = (blocks.amax(-1, keepdim=True) - blocks.amin(-1, keepdim=True)) / (levels - 1)
    noise = torch.rand(blocks.shape, generator=generator) - 0.5
    return (blocks + noise * step).flatten(1).bfloat16()


def dither_model(model_dir: Path, out_dir: Path, block: int, levels: int, seed: int) -> int:
    """Write the dithered copy of `model_dir` to `out_dir`; returns the number of weights dithered.

    Tensors draw from one generator in the order of their sorted names, over all shards, so the result depends on
    the weights and the seed only, not on how the checkpoint was sharded.
    """
    out_dir.mkdir(parents=True)
    shards = sorted(model_dir.glob("*.safetensors"))
    if not shards:
        raise FileNotFoundError(f"No safetensors file in {model_dir}.")
    for file in model_dir.iterdir():
        if file.is_file() and file not in shards:
            shutil.copy2(file, out_dir)

    tensors: dict[str, torch.Tensor] = {}
    shard_of: dict[str, Path] = {}
    for shard in shards:
        with safe_open(shard, framework="pt") as reader:
            for name in reader.keys():  # noqa: SIM118 (the reader is not a dict)
                tensors[name], shard_of[name] = reader.get_tensor(name), shard

    generator = torch.Generator().manual_seed(seed)
    targets = sorted(name for name in tensors if BLOCK_LINEAR.search(name))
    if not targets:
        raise ValueError(f"No q/k/v/o/gate/up/down projection inside decoder blocks in {model_dir}.")
    for name in targets:
        tensors[name] = dither(tensors[name], block, levels, generator)

    for shard in shards:
        content = {name: tensor for name, tensor in tensors.items() if shard_of[name] == shard}
        save_file(content, out_dir / shard.name, metadata={"format": "pt"})
    return len(targets)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model_dir", type=Path, help="Hugging Face checkpoint (safetensors)")
    parser.add_argument("out_dir", type=Path, help="folder to create")
    parser.add_argument("--block", type=int, default=32, help="weights that share a grid (default %(default)s)")
    parser.add_argument("--levels", type=int, default=16, help="levels of that grid (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    count = dither_model(args.model_dir, args.out_dir, args.block, args.levels, args.seed)
    print(f"{args.out_dir}: {count} weights dithered")


if __name__ == "__main__":
    main()

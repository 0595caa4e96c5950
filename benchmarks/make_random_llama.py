"""A random-weight Llama in bf16, written shard by shard, to measure memory on models that no one could download.

    python benchmarks/make_random_llama.py OUT_DIR --layers 32 [--shape 8b] [--tokenizer MODEL_DIR]

Hidden size 3072, MLP 8192, vocabulary 32000: 32 layers are about 4 billion parameters. `--shape 8b` is Llama 3.1 8B's:
4096, 14336, 128256.
"""

import argparse
import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import LlamaConfig

SHAPES = {
    "4b": {"hidden_size": 3072, "intermediate_size": 8192, "vocab_size": 32000, "num_attention_heads": 24},
    "8b": {"hidden_size": 4096, "intermediate_size": 14336, "vocab_size": 128256, "num_attention_heads": 32},
}


def block(config: LlamaConfig, index: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
    """Weights of one decoder layer."""
    hidden, mlp = config.hidden_size, config.intermediate_size
    key_value = config.num_key_value_heads * config.head_dim
    shapes = {
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (key_value, hidden),
        "self_attn.v_proj": (key_value, hidden),
        "self_attn.o_proj": (hidden, hidden),
        "mlp.gate_proj": (mlp, hidden),
        "mlp.up_proj": (mlp, hidden),
        "mlp.down_proj": (hidden, mlp),
    }
    prefix = f"model.layers.{index}."
    tensors = {f"{prefix}{name}.weight": weight(shape, generator) for name, shape in shapes.items()}
    for norm in ("input_layernorm", "post_attention_layernorm"):
        tensors[f"{prefix}{norm}.weight"] = torch.ones(hidden, dtype=torch.bfloat16)
    return tensors


def weight(shape: tuple[int, int], generator: torch.Generator) -> torch.Tensor:
    return torch.randn(shape, generator=generator).mul_(0.02).to(torch.bfloat16)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out_dir", type=Path)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--shape", choices=SHAPES, default="4b")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tokenizer", type=Path, help="model directory whose tokenizer.json is copied")
    args = parser.parse_args()
    config = LlamaConfig(
        **SHAPES[args.shape],
        num_hidden_layers=args.layers,
        num_key_value_heads=8,
        head_dim=128,
        tie_word_embeddings=False,
        architectures=["LlamaForCausalLM"],
        dtype="bfloat16",
    )
    args.out_dir.mkdir(parents=True)
    generator = torch.Generator().manual_seed(args.seed)
    weight_map: dict[str, str] = {}
    for number in range(args.layers + 1):
        shard = f"model-{number + 1:05d}-of-{args.layers + 1:05d}.safetensors"
        if number < args.layers:
            part = block(config, number, generator)
        else:
            part = {
                "model.embed_tokens.weight": weight((config.vocab_size, config.hidden_size), generator),
                "model.norm.weight": torch.ones(config.hidden_size, dtype=torch.bfloat16),
                "lm_head.weight": weight((config.vocab_size, config.hidden_size), generator),
            }
        save_file(part, args.out_dir / shard, {"format": "pt"})
        weight_map |= dict.fromkeys(part, shard)
    index = {"metadata": {}, "weight_map": weight_map}
    (args.out_dir / "model.safetensors.index.json").write_text(json.dumps(index))
    config.save_pretrained(args.out_dir)
    if args.tokenizer is not None:
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(args.tokenizer / name, args.out_dir / name)


if __name__ == "__main__":
    main()

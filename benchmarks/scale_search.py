"""How near the scale search comes to trying everything, on real weights; and GPTQ with it beside textbook GPTQ.

    python benchmarks/scale_search.py MODEL_DIR --calibration TEXT/wikitext2-calibration.txt --json RESULT.json

For rows of several linears: the squared error with the searched scales over the least of a fine sweep over scales
(both signs; affine: over both ends of the range), per tensor, per channel and in groups. `worst` is the linear with
the largest ratio.

GPTQ: the output error of W4A16 and W3A16 with one scale per channel over that of the textbook's loop (columns by
falling diag(H), 1 % damping, nothing else) on the scales of the sweep. H is that of some tokens of the text after the
full-precision layers before.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from fewbit.algorithms.gptq import gptq
from fewbit.config.algorithms import GPTQConfig
from fewbit.config.spec import QuantizationSpec
from fewbit.numerics.second_moment import quadratic_form

PLACES = (0.0, 0.5, 1.0)  # of the depth
LINEARS = ("self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj")
GRANULARITIES: dict[str, dict[str, Any]] = {
    "per tensor": {"qscheme": "per_tensor"},
    "per channel": {"qscheme": "per_channel"},
    "groups of 128": {"group_size": 128},
    "groups of 64": {"group_size": 64},
    "groups of 32": {"group_size": 32},
}
ROWS = 96
SWEEP = torch.logspace(0.35, -1.7, 320)
AFFINE_SWEEP = torch.logspace(0.0, -1.5, 40)
DAMPING = 0.01


def weights_of(model: Path) -> dict[str, Tensor]:
    """Some linears of the first, middle and last block, float32, and at most `ROWS` of their rows."""
    layers = json.loads((model / "config.json").read_text())["num_hidden_layers"]
    blocks = sorted({round(place * (layers - 1)) for place in PLACES})
    found = {}
    for file in sorted(model.glob("*.safetensors")):
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118 (a safetensors handle is no mapping)
                if any(name.endswith(f"layers.{b}.{linear}.weight") for b in blocks for linear in LINEARS):
                    found[name] = opened.get_tensor(name)[:ROWS].float()
    return found


def least_error(spec: QuantizationSpec, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Of the sweep: the squared error of each tile, and its scale."""
    rule = spec.grid_rule(spec.scale_format(torch.float32))
    tiles = spec.tiling.split(weight)
    low, high = tiles.amin(-1).clamp(max=0), tiles.amax(-1).clamp(min=0)
    best, best_scale = torch.full_like(low, torch.inf), torch.ones_like(low)
    if spec.symmetric:
        found = [(share * end, None) for end in rule.ends(low, high) for share in SWEEP]
    else:
        reach = torch.maximum(high, -low)
        found = [
            rule.from_range(torch.maximum(low, -a * reach), torch.minimum(high, b * reach))
            for a in AFFINE_SWEEP
            for b in AFFINE_SWEEP
        ]
    for scale, zero in found:
        error = rule.error(tiles, scale, zero, None)
        best, best_scale = torch.where(error < best, error, best), torch.where(error < best, scale, best_scale)
    return best, best_scale


def ratio(spec: QuantizationSpec, weight: Tensor) -> float:
    """Squared error with searched scales over that of the sweep."""
    rule = spec.grid_rule(spec.scale_format(torch.float32))
    tiles = spec.tiling.split(weight)
    scale, zero = rule.find(tiles)
    return float(rule.error(tiles, scale, zero, None).sum() / least_error(spec, weight)[0].sum())


def searches(weights: dict[str, Tensor]) -> list[dict[str, Any]]:
    dtypes = [(f"int{b}", True) for b in (2, 3, 4, 8)] + [(f"uint{b}", False) for b in (2, 3, 4, 8)]
    rows = []
    for granularity, fields in GRANULARITIES.items():
        for dtype, symmetric in [*dtypes, ("fp8_e4m3", True), ("fp4", True)]:
            if granularity == "per tensor" and not symmetric:
                continue  # as per channel, only slower
            spec = QuantizationSpec(
                dtype=dtype, symmetric=symmetric, observer="search", scale_dtype="float32", **fields
            )
            ratios = [ratio(spec, w) for w in weights.values() if w.shape[1] % fields.get("group_size", 1) == 0]
            if not ratios:
                continue
            row = {"granularity": granularity, "dtype": dtype, "mean": sum(ratios) / len(ratios), "worst": max(ratios)}
            rows.append(row)
            print(f"{granularity:14} {dtype:9} mean {row['mean']:.4f}  worst {row['worst']:.4f}", flush=True)
    return rows


def textbook(weight: Tensor, moment: Tensor, spec: QuantizationSpec, scale: Tensor) -> Tensor:
    """GPTQ as the paper has it, dequantized: weight [out, in], one scale for each row [out]."""
    order = moment.diagonal().argsort(descending=True)
    h = moment[order][:, order].double()
    h.diagonal().add_(DAMPING * h.diagonal().mean())
    upper = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(h)), upper=True)
    w, found = weight[:, order].double(), torch.empty_like(weight[:, order])
    by = scale.double()
    for j in range(w.shape[1]):
        value = spec.format.round(w[:, j] / by).double() * by
        found[:, j] = value.float()
        error = (w[:, j] - value) / upper[j, j]
        w[:, j:] -= error.unsqueeze(1) * upper[j, j:]
    result = torch.empty_like(found)
    result[:, order] = found
    return result


@torch.no_grad()
def moments_of(model: Path, text: Path, names: list[str], tokens: int) -> dict[str, Tensor]:
    """H of the inputs of linears in the full-precision model."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    ids = AutoTokenizer.from_pretrained(model)(text.read_text()[: 8 * tokens], return_tensors="pt").input_ids
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    moments: dict[str, Tensor] = {}

    def watch(name: str) -> None:
        def see(_module: Any, inputs: tuple[Tensor, ...]) -> None:
            x = inputs[0].flatten(0, -2)
            moments[name] = x.T @ x + moments.get(name, 0)

        loaded.get_submodule(name.removesuffix(".weight")).register_forward_pre_hook(see)

    for name in names:
        watch(name)
    for window in ids[0, :tokens].split(512):
        loaded(window.unsqueeze(0), use_cache=False)
    return moments


def gptqs(weights: dict[str, Tensor], moments: dict[str, Tensor]) -> list[dict[str, Any]]:
    rows = []
    for dtype in ("int3", "int4"):
        spec = QuantizationSpec(dtype=dtype, qscheme="per_channel", observer="search", scale_dtype="float32")
        for name, weight in weights.items():
            moment = moments[name]
            ours = gptq(weight, moment, spec, spec.scale_format(torch.float32), GPTQConfig())
            assert ours is not None
            error = float(quadratic_form(ours.weight.dequantize() - weight, moment).sum())
            plain = textbook(weight, moment, spec, least_error(spec, weight)[1].squeeze(-1))
            row = {
                "linear": name,
                "dtype": dtype,
                "ratio": error / float(quadratic_form(plain - weight, moment).sum()),
            }
            rows.append(row)
            print(f"gptq {dtype} {name}: {row['ratio']:.4f} of textbook GPTQ's error", flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--calibration", type=Path, help="text for H; without it, no GPTQ")
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    weights = weights_of(args.model)
    result: dict[str, Any] = {"linears": list(weights), "rows": ROWS, "search": searches(weights)}
    if args.calibration:
        result["gptq"] = gptqs(weights, moments_of(args.model, args.calibration, list(weights), args.tokens))
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()

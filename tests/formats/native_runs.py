"""Finished runs of a tiny llama in every format, written without the pipeline: weights by round to nearest, static
activation scales from made-up ranges (both sides of a comparison clip alike)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from fewbit.algorithms.rtn import rtn
from fewbit.checkpoint.journal import Journal
from fewbit.checkpoint.native import OUTSIDE, block_file, write_manifest, write_part
from fewbit.checkpoint.side_files import copy_side_files
from fewbit.checkpoint.source import SafetensorsSource
from fewbit.config.spec import QuantizationConfig, QuantizationSpec
from fewbit.contents import LINEAR_SLOTS, AttentionEntry, Contents, LinearEntry
from fewbit.tensor import QuantizedActivation

BLOCKS = 2
LINEARS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
           "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")  # fmt: skip
FUSED = (LINEARS[:3], LINEARS[4:6])
RANGE = (-2.5, 3.0)
"""Of every static activation; what lies outside is clipped."""


def spec(dtype: str, qscheme: str, **fields) -> QuantizationSpec:
    size = {"group_size": 32} if qscheme == "per_group" else {"block_size": (32, 32)} if qscheme == "per_block" else {}
    return QuantizationSpec(dtype=dtype, qscheme=qscheme, **{"observer": "minmax"} | size | fields)


def scheme(weight: QuantizationSpec, inputs: QuantizationSpec | None = None) -> QuantizationConfig:
    return QuantizationConfig(weight=weight, input_tensors=inputs)


def dynamic(dtype: str, qscheme: str = "per_token", **fields) -> QuantizationSpec:
    return spec(dtype, qscheme, is_dynamic=True, **fields)


NVFP4 = {"group_size": 16, "scale_type": "e4m3"}
MX = {"scale_type": "e8m0"}
STATIC_INT8 = spec("int8", "per_tensor")
STATIC_FP8 = spec("e4m3", "per_tensor")
SCHEMES: dict[str, tuple[str, QuantizationConfig]] = {
    "W4A16": ("pack-quantized", scheme(spec("int4", "per_group", observer="search"))),
    "W3A16_ASYM": ("pack-quantized", scheme(spec("uint3", "per_group", symmetric=False))),
    "W8A16, channel": ("pack-quantized", scheme(spec("int8", "per_channel"))),
    "W4A16, pof2": ("pack-quantized", scheme(spec("int4", "per_group", scale_type="pof2"))),
    "W4A8": ("pack-quantized", scheme(spec("int4", "per_group"), dynamic("int8"))),
    "W4AFP8": ("pack-quantized", scheme(spec("int4", "per_group"), dynamic("e4m3"))),
    "W4A4": ("pack-quantized", scheme(spec("int4", "per_group"), dynamic("int4"))),
    "W8AFP8": ("pack-quantized", scheme(spec("int8", "per_channel"), dynamic("e4m3"))),
    "W8A8": ("int-quantized", scheme(spec("int8", "per_channel"), dynamic("int8"))),
    "W8A8, groups": ("int-quantized", scheme(spec("int8", "per_group"), dynamic("int8", "per_group"))),
    "W8A8, tensor": ("int-quantized", scheme(spec("int8", "per_tensor"), dynamic("int8", "per_tensor"))),
    "W8A8, static": ("int-quantized", scheme(spec("int8", "per_channel"), STATIC_INT8)),
    "W8A8, affine": (
        "int-quantized",
        scheme(spec("uint8", "per_channel", symmetric=False), dynamic("uint8", symmetric=False)),
    ),
    "W8A8, affine static": (
        "int-quantized",
        scheme(spec("int8", "per_channel"), spec("uint8", "per_tensor", symmetric=False)),
    ),
    "FP8": ("float-quantized", scheme(spec("e4m3", "per_tensor"), STATIC_FP8)),
    "FP8_DYNAMIC": ("float-quantized", scheme(spec("e4m3", "per_channel"), dynamic("e4m3"))),
    "FP8_BLOCK": ("float-quantized", scheme(spec("e4m3", "per_block"), dynamic("e4m3", "per_group"))),
    "FP8, weights only": ("naive-quantized", scheme(spec("e4m3", "per_group", group_size=16))),
    "NVFP4": (
        "nvfp4-pack-quantized",
        scheme(spec("e2m1", "per_group", **NVFP4), dynamic("e2m1", "per_group", **NVFP4)),
    ),
    "NVFP4A16": ("nvfp4-pack-quantized", scheme(spec("e2m1", "per_group", **NVFP4))),
    "MXFP4": ("mxfp4-pack-quantized", scheme(spec("e2m1", "per_group", **MX), dynamic("e2m1", "per_group", **MX))),
    "MXFP4A16": ("mxfp4-pack-quantized", scheme(spec("e2m1", "per_group", **MX))),
    "MXFP6": ("mxfp6-pack-quantized", scheme(spec("e2m3", "per_group", **MX), dynamic("e2m3", "per_group", **MX))),
    "MXFP6A8": ("mxfp6-pack-quantized", scheme(spec("e2m3", "per_group", **MX), dynamic("e4m3", "per_group", **MX))),
    "MXFP8": ("mxfp8-quantized", scheme(spec("e4m3", "per_group", **MX), dynamic("e4m3", "per_group", **MX))),
    "MXFP8A16": ("mxfp8-quantized", scheme(spec("e4m3", "per_group", **MX))),
}
MIXED = {  # by linear
    "self_attn.q_proj": "FP8_DYNAMIC",
    "self_attn.k_proj": "FP8_DYNAMIC",
    "self_attn.v_proj": "FP8_DYNAMIC",
    "self_attn.o_proj": "W4A16",
    "mlp.gate_proj": "NVFP4",
    "mlp.up_proj": "NVFP4",
    "mlp.down_proj": "MXFP8",
}
EVERY = {"mixed": MIXED} | {name: dict.fromkeys(LINEARS, name) for name in SCHEMES}


def quantized(weight: torch.Tensor, how: QuantizationSpec, global_scale: float | None = None):
    """Round to nearest; scales are stored in the weight's dtype."""
    if global_scale is None:
        global_scale = how.global_scale(weight)
    return rtn(weight.float(), None, how, how.scale_format(weight.dtype, global_scale)).weight


def state(how: QuantizationSpec, dtype: torch.dtype, heads: int | None = None) -> QuantizedActivation:
    """What calibration on RANGE would have found; of `heads`, each has a range of its own."""
    global_scale = how.global_scale(torch.tensor(RANGE[1]))
    if how.is_dynamic:
        return QuantizedActivation(how, global_scale=global_scale)
    if heads is not None:
        how = replace(how, ch_axis=1)  # as HeadsQuantizer says it
    wider = 1 + torch.arange(heads or 1).view(1, -1) / 4
    low, high = (end * wider for end in RANGE)
    scale, zero = how.grid_rule(how.scale_format(dtype)).from_range(low, high)
    return QuantizedActivation(how, scale, zero)


def write_run(
    directory: Path,
    model: Path,
    schemes: Mapping[str, QuantizationConfig],
    attention: Mapping[str, QuantizationSpec] | None = None,
) -> Path:
    """A finished run of the llama in `model`: each linear by the scheme of its name inside the block."""
    source = SafetensorsSource(model)
    tensors = source.read(source.info())
    dtype = tensors["model.norm.weight"].dtype
    journal = Journal(directory)
    for block in range(BLOCKS):
        prefix = f"model.layers.{block}."
        inside = {name: tensor for name, tensor in tensors.items() if name.startswith(prefix)}
        shared = {linear: _global_scale(inside, prefix, linear, schemes) for linear in schemes}
        weights = {
            f"{prefix}{linear}.weight": _alone_or_fused(inside, prefix, linear, schemes, shared[linear])
            for linear in schemes
        }
        inside = {name: tensor for name, tensor in inside.items() if name not in weights}
        states = {
            f"{prefix}{linear}.input": state(config.input_tensors, dtype)
            for linear, config in schemes.items()
            if config.input_tensors is not None
        }
        for slot, how in (attention or {}).items():
            heads = None if how.qscheme == "per_tensor" else 4 if slot == "query" else 2
            states[f"{prefix}self_attn.{slot}"] = state(how, dtype, heads)
        journal.add_block(block, write_part(block_file(directory, block), weights, inside, states), [])
    outside = {name: tensor for name, tensor in tensors.items() if not name.startswith("model.layers.")}
    journal.add_file(OUTSIDE, write_part(directory / OUTSIDE, {}, outside))
    specs = {f"model.layers.{n}.{name}.weight": how.weight for n in range(BLOCKS) for name, how in schemes.items()}
    left = [f"model.layers.{block}.{linear}" for block in range(BLOCKS) for linear in LINEARS if linear not in schemes]
    classes = {f"model.layers.{block}.self_attn": "LlamaAttention" for block in range(BLOCKS)}
    contents = contents_of(specs, unquantized=[*left, "lm_head"], classes=classes)
    write_manifest(directory, {"num_blocks": BLOCKS, "contents": contents.facts()})
    copy_side_files(model, directory)
    return directory


def contents_of(weights, activations=None, shapes=None, unquantized=(), classes=None) -> Contents:
    """Contents by specs of weights by their names, of activations by module and slot, and shapes of weights; linears
    of FUSED are fused."""
    activations, owner = activations or {}, lambda name: name.rpartition(".")[0]
    flows = {owner(name): name.rpartition(".")[2] in LINEAR_SLOTS for name in activations}
    names = [*map(owner, weights), *(name for name, of_linear in flows.items() if of_linear), *unquantized]
    linears = {
        name: LinearEntry(name, (shapes or {}).get(f"{name}.weight", (128, 128)), None, routed=".experts." in name)
        for name in names
    }
    kinds = {name: "LlamaAttention" for name, of_linear in flows.items() if not of_linear} | (classes or {})
    leaves = [[name.rpartition(".")[2] for name in group] for group in FUSED]
    fused = [tuple(f"{place}.{leaf}" for leaf in group) for place in set(map(owner, linears)) for group in leaves]
    bare = Contents(linears, {name: AttentionEntry(name, kind) for name, kind in kinds.items()}, tuple(fused))
    return Contents.restored(bare.facts(), {**weights, **activations}, {})


def fused_with(linear: str) -> list[str]:
    """The linears that engines fuse with one of LINEARS."""
    return [other for group in FUSED if linear in group for other in group if other != linear]


def _alone_or_fused(tensors, prefix: str, linear: str, schemes, global_scale: float):
    """The quantized weight of a linear; a scale per tensor it shares with those that engines fuse it with."""
    how = schemes[linear].weight
    members = [linear]
    if how.qscheme == "per_tensor" and not how.format.is_integer:
        members += [name for name in fused_with(linear) if name in schemes]
    whole = quantized(torch.cat([tensors[f"{prefix}{member}.weight"] for member in members]), how, global_scale)
    return whole.rows(slice(0, len(tensors[f"{prefix}{linear}.weight"])))


def _global_scale(tensors, prefix: str, linear: str, schemes) -> float:
    """The global scale that a linear shares with those that engines fuse it with."""
    members = [linear, *(name for name in fused_with(linear) if name in schemes)]
    return schemes[linear].weight.global_scale(*(tensors[f"{prefix}{member}.weight"] for member in members))


def _fake_attention(module, query, key, value, *args, **kwargs):
    given = {"query": query, "key": key, "value": value}
    query, key, value = (getattr(module, f"fake_{slot}", lambda x: x)(x) for slot, x in given.items())
    return ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, key, value, *args, **kwargs)


ALL_ATTENTION_FUNCTIONS.register("fewbit_fake", _fake_attention)

"""Kinds of linears and caches that engines tell apart, and which of them they have a scheme for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from fewbit.config.spec import QuantizationSpec
from fewbit.contents import Contents
from fewbit.formats.compressed_tensors.config import layout_of

PACKED, INT, NAIVE, FLOAT = "pack-quantized", "int-quantized", "naive-quantized", "float-quantized"
NVFP4, MXFP4, MXFP6, MXFP8 = "nvfp4-pack-quantized", "mxfp4-pack-quantized", "mxfp6-pack-quantized", "mxfp8-quantized"
MARLIN_GROUPS = (None, 32, 64, 128)


@dataclass(frozen=True)
class Kind:
    """What engines choose a scheme for linears by."""

    weight: QuantizationSpec
    input: QuantizationSpec | None
    layout: str
    """Name of how the weight lies."""
    routed: bool = False

    @property
    def is_affine(self) -> bool:
        return not self.weight.symmetric

    @property
    def in_rows(self) -> bool:
        return self.weight.qscheme in ("per_channel", "per_tensor")

    @property
    def in_blocks(self) -> bool:
        return self.weight.qscheme == "per_block"

    @property
    def integer_input(self) -> bool:
        return self.input is not None and self.input.format.is_integer


def kinds(found: Contents) -> list[Kind]:
    """Of the linears with a quantized weight, each kind once. ConfigError for what the format cannot hold."""
    alike = {(linear.weight, linear.input, linear.routed): linear for linear in found.weights}
    return [
        Kind(weight, given, layout_of(linear).name, routed)
        for (weight, given, routed), linear in alike.items()
        if weight is not None
    ]


def layouts(found: Contents) -> list[str]:
    """Of all weights, each once."""
    return list(dict.fromkeys(kind.layout for kind in kinds(found)))


def inside(found: Contents, *slots: str) -> list[QuantizationSpec]:
    """Specs of what is quantized in these slots of attention modules."""
    return [module.specs[slot] for module in found.attention.values() for slot in slots if slot in module.specs]


def cache(found: Contents) -> list[QuantizationSpec]:
    """Specs of keys and values."""
    return inside(found, "key", "value")


def some(holds: Callable[[Kind], bool]) -> Callable[[Contents], bool]:
    """Whether there are linears of such a kind."""
    return lambda found: any(holds(kind) for kind in kinds(found))


def packed_affine(kind: Kind) -> bool:
    return kind.layout == PACKED and kind.is_affine


def integers_as_engines_multiply(kind: Kind) -> bool:
    """int8 by int8 in one product: symmetric weights of one scale per row, inputs per token or static."""
    weight, inputs = kind.weight, kind.input
    if kind.layout != INT or inputs is None:
        return False
    known = (inputs.qscheme == "per_token") if inputs.is_dynamic else (inputs.qscheme == "per_tensor")
    return kind.in_rows and weight.symmetric and inputs.bits == 8 and known


def floats_as_engines_multiply(kind: Kind) -> bool:
    """FP8 per tensor, channel or block."""
    if kind.layout not in (NAIVE, FLOAT) or kind.integer_input:
        return False
    return kind.in_rows or kind.in_blocks


def int4_by_fp8(kind: Kind) -> bool:
    weight, inputs = kind.weight, kind.input
    known = kind.layout == PACKED and weight.bits == 4 and weight.symmetric and weight.qscheme == "per_group"
    return known and inputs is not None and inputs.dtype == "e4m3" and inputs.qscheme == "per_token"


def packed_by_integers(kind: Kind) -> bool:
    inputs = kind.input
    if kind.layout != PACKED or inputs is None or not inputs.format.is_integer:
        return False
    return inputs.is_dynamic and inputs.symmetric and inputs.qscheme in ("per_token", "per_group")


def packed_alone(kind: Kind) -> bool:
    return kind.layout == PACKED and kind.input is None


def marlin(kind: Kind) -> bool:
    """Whether vLLM's usual kernel takes packed integers."""
    weight = kind.weight
    return weight.bits in ((4, 8) if weight.symmetric else (4,)) and weight.group_size in MARLIN_GROUPS


def loads_in_vllm(kind: Kind) -> bool:
    """vLLM's own choice of a scheme, in its order: NVFP4, MX, int4 by FP8, packed integers, FP8, INT8."""
    if kind.layout == NVFP4:
        return kind.input is None or kind.input.scale_type == "e4m3"
    if kind.layout in (MXFP4, MXFP8):
        return True
    return (
        int4_by_fp8(kind)
        or packed_by_integers(kind)
        or packed_alone(kind)
        or floats_as_engines_multiply(kind)
        or integers_as_engines_multiply(kind)
    )


def loads_in_sglang(kind: Kind) -> bool:
    """SGLang's choice for linears outside of experts."""
    if kind.layout == NVFP4:
        return kind.input is None or kind.input.scale_type == "e4m3"
    alone = packed_alone(kind) and kind.weight.bits in (4, 8)
    return alone or floats_as_engines_multiply(kind) or integers_as_engines_multiply(kind)


def unlike_fused(found: Contents) -> bool:
    """Whether linears that engines fuse are quantized in unlike ways."""
    return any(len({(linear.weight, linear.input) for linear in members}) > 1 for members in found.fused_linears())


def fp8_cache(spec: QuantizationSpec, *qschemes: str) -> bool:
    return spec.dtype == "e4m3" and spec.symmetric and not spec.is_dynamic and spec.qscheme in qschemes

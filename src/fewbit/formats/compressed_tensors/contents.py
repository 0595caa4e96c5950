"""What a checkpoint holds, as far as engines ask, and which of it they have a scheme for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from fewbit.config.spec import QuantizationSpec
from fewbit.formats.compressed_tensors.config import ATTENTION_SLOTS, Specs, layout_of
from fewbit.formats.compressed_tensors.targets import fused_with

PACKED, INT, NAIVE, FLOAT = "pack-quantized", "int-quantized", "naive-quantized", "float-quantized"
NVFP4, MXFP4, MXFP6, MXFP8 = "nvfp4-pack-quantized", "mxfp4-pack-quantized", "mxfp6-pack-quantized", "mxfp8-quantized"
MARLIN_GROUPS = (None, 32, 64, 128)


@dataclass(frozen=True)
class Linear:
    """A quantized linear of a checkpoint."""

    name: str
    weight: QuantizationSpec
    inputs: QuantizationSpec | None
    layout: str

    @property
    def integer_inputs(self) -> bool:
        return self.inputs is not None and self.inputs.format.is_integer


@dataclass(frozen=True)
class Contents:
    """What a checkpoint holds, as far as rules ask."""

    linears: tuple[Linear, ...]
    attention: tuple[tuple[str, QuantizationSpec], ...] = ()
    """Slot (key, value, query) and spec."""

    @property
    def cache(self) -> list[QuantizationSpec]:
        """Of keys and values."""
        return [spec for slot, spec in self.attention if slot != "query"]

    def any(self, *properties: Callable[[Linear], bool]) -> bool:
        """Whether there is a linear with all of these properties."""
        return any(all(holds(linear) for holds in properties) for linear in self.linears)


def contents(weights: Specs, activations: Specs | None = None) -> Contents:
    """What a checkpoint holds that has these specs, by names as in `config.check`."""
    activations = activations or {}
    linears = []
    for name, spec in weights.items():
        module = name.removesuffix(".weight")
        linears.append(
            Linear(module, spec, activations.get(f"{module}.input"), layout_of(name, spec, activations).name)
        )
    named = ((name.rpartition(".")[2], spec) for name, spec in activations.items())
    return Contents(tuple(linears), tuple((slot, spec) for slot, spec in named if slot in ATTENTION_SLOTS))


def of_layouts(*layouts: str) -> Callable[[Linear], bool]:
    return lambda linear: linear.layout in layouts


def is_expert(linear: Linear) -> bool:
    return ".experts." in linear.name


def is_affine(linear: Linear) -> bool:
    return not linear.weight.symmetric


def has_gaps_in_old_versions(linear: Linear) -> bool:
    """Whether codes do not fill words of 32 bits, so that their packing has changed over time."""
    return bool(32 % linear.weight.bits)


def has_inputs(linear: Linear) -> bool:
    return linear.inputs is not None


def in_rows(linear: Linear) -> bool:
    return linear.weight.qscheme in ("per_channel", "per_tensor")


def integers_as_engines_multiply(linear: Linear) -> bool:
    """int8 by int8 in one product: symmetric weights of one scale per row, inputs per token or static."""
    weight, inputs = linear.weight, linear.inputs
    if linear.layout != INT or inputs is None:
        return False
    known = (inputs.qscheme == "per_token") if inputs.is_dynamic else (inputs.qscheme == "per_tensor")
    return in_rows(linear) and weight.symmetric and inputs.bits == 8 and known


def floats_as_engines_multiply(linear: Linear) -> bool:
    """FP8 per tensor, channel or block."""
    if linear.layout not in (NAIVE, FLOAT) or linear.integer_inputs:
        return False
    return in_rows(linear) or linear.weight.qscheme == "per_block"


def int4_by_fp8(linear: Linear) -> bool:
    inputs = linear.inputs
    weight = linear.weight
    known = linear.layout == PACKED and weight.bits == 4 and weight.symmetric and weight.qscheme == "per_group"
    return known and inputs is not None and inputs.dtype == "e4m3" and inputs.qscheme == "per_token"


def packed_by_integers(linear: Linear) -> bool:
    inputs = linear.inputs
    if linear.layout != PACKED or inputs is None or not inputs.format.is_integer:
        return False
    return inputs.is_dynamic and inputs.symmetric and inputs.qscheme in ("per_token", "per_group")


def packed_alone(linear: Linear) -> bool:
    return linear.layout == PACKED and linear.inputs is None


def marlin(linear: Linear) -> bool:
    """Whether vLLM's usual kernel takes packed integers."""
    weight = linear.weight
    return weight.bits in ((4, 8) if weight.symmetric else (4,)) and weight.group_size in MARLIN_GROUPS


def loads_in_vllm(linear: Linear) -> bool:
    """vLLM's own choice of a scheme, in its order: NVFP4, MX, int4 by FP8, packed integers, FP8, INT8."""
    if linear.layout == NVFP4:
        return linear.inputs is None or linear.inputs.scale_type == "e4m3"
    if linear.layout in (MXFP4, MXFP8):
        return True
    return (
        int4_by_fp8(linear)
        or packed_by_integers(linear)
        or packed_alone(linear)
        or floats_as_engines_multiply(linear)
        or integers_as_engines_multiply(linear)
    )


def loads_in_sglang(linear: Linear) -> bool:
    """SGLang's choice for linears outside of experts."""
    if linear.layout == NVFP4:
        return linear.inputs is None or linear.inputs.scale_type == "e4m3"
    alone = packed_alone(linear) and linear.weight.bits in (4, 8)
    return alone or floats_as_engines_multiply(linear) or integers_as_engines_multiply(linear)


def unlike_fused(found: Contents) -> bool:
    """Whether linears that engines fuse are quantized in unlike ways."""
    kinds = {linear.name: (linear.weight, linear.inputs) for linear in found.linears}
    return any(kinds.get(other, kind) != kind for name, kind in kinds.items() for other in fused_with(name))


def fp8_cache(spec: QuantizationSpec, *qschemes: str) -> bool:
    return spec.dtype == "e4m3" and spec.symmetric and not spec.is_dynamic and spec.qscheme in qschemes


def without(holds: Callable[[Linear], bool]) -> Callable[[Linear], bool]:
    return lambda linear: not holds(linear)


def some(*properties: Callable[[Linear], bool]) -> Callable[[Contents], bool]:
    return lambda found: found.any(*properties)


def formats(found: Contents) -> set[str]:
    return {linear.layout for linear in found.linears}

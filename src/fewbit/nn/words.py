"""How a linear is quantized, in FullQuantTransformer's words: bits and methods of weight and activation.

    w_bits=4, a_bits=8, w_method="per-block", w_group_size=64, a_method="per-token"

per-token and per-channel of a weight [out, in] are one: a scale for each output channel. Activations are quantized as
they come (dynamic). 16 bits and more mean that a tensor stays as it is.
"""

from __future__ import annotations

from dataclasses import replace

from fewbit.config.spec import QuantizationConfig, QuantizationSpec
from fewbit.errors import ConfigError
from fewbit.nn.quantizer import make_spec, method_name, weight_spec

UNTOUCHED_BITS = 16


def linear_config(
    w_bits: int | None = None,
    a_bits: int | None = None,
    w_method: str | None = None,
    a_method: str | None = None,
    w_group_size: int | None = None,
    a_group_size: int | None = None,
) -> QuantizationConfig:
    """A config from words alone. What is not said is 8 bits and per-token; ConfigError for words that contradict."""
    w_bits, a_bits = 8 if w_bits is None else w_bits, 8 if a_bits is None else a_bits
    weight = None if _untouched(w_bits) else weight_spec(w_bits, w_method or "per-token", w_group_size)
    inputs = None if _untouched(a_bits) else _input_spec(a_bits, a_method or "per-token", a_group_size)
    return QuantizationConfig(weight=weight, input_tensors=inputs)


def with_methods(
    config: QuantizationConfig,
    w_method: str | None = None,
    a_method: str | None = None,
    w_group_size: int | None = None,
    a_group_size: int | None = None,
) -> QuantizationConfig:
    """`config` with other granularities and its own formats. A method of what it leaves as it is says nothing."""
    weight, inputs = config.weight, config.input_tensors
    if w_method is None and w_group_size is not None:
        w_method = "per-block"
    if a_method is None and a_group_size is not None:
        a_method = "per-block"
    if weight is not None and w_method is not None:
        size = _size(w_method, w_group_size, weight)
        weight = weight_spec(weight.bits, w_method, size, weight.symmetric, weight.dtype, **_scales(weight, w_method))
    if inputs is not None and a_method is not None:
        size = _size(a_method, a_group_size, inputs)
        inputs = _input_spec(inputs.bits, a_method, size, inputs.symmetric, inputs.dtype, **_scales(inputs, a_method))
    return replace(config, weight=weight, input_tensors=inputs)


def _input_spec(
    bits: int, method: str, group_size: int | None, symmetric: bool = True, dtype: str | None = None, **options: object
) -> QuantizationSpec:
    return make_spec(
        bits, method, group_size, symmetric, dtype, **{"observer": "minmax", "is_dynamic": True} | options
    )


def _untouched(bits: int) -> bool:
    return isinstance(bits, int) and bits >= UNTOUCHED_BITS


def _size(method: str, given: int | None, spec: QuantizationSpec) -> int | None:
    """The group size of a method; the spec's own where none is given."""
    if method_name(method) not in ("per-block", "per-group"):
        if given is not None:
            raise ConfigError(f"group_size {given} contradicts method {method}; use per-block")
        return None
    return given or spec.group_size


def _scales(spec: QuantizationSpec, method: str) -> dict[str, object]:
    """How scales are stored, which stays where groups stay groups; other granularities have plain ones."""
    grouped = spec.qscheme == "per_group" and method_name(method) in ("per-block", "per-group")
    return {"scale_type": spec.scale_type} if grouped else {}

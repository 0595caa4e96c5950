"""How a tensor is quantized, in FullQuantTransformer's words: bits, method, group size.

What shares a scale, by the names of methods, for x [..., M, K]:

    per-tensor              everything               scales (1, 1)
    per-token               a row                    scales (..., M, 1)
    per-channel             a column                 scales (1, K)
    per-block, per-group    `group_size` neighbours  scales (..., M, K / group_size)

A linear's weight is [out, in], and one scale for each output channel is one for each row: `weight_spec` takes either
word for that, the field's, per-channel, and that of a Quantizer on the bare matrix, per-token.

A linear takes words for its weight and its input:

    w_bits=4, a_bits=8, w_method="per-block", w_group_size=64, a_method="per-token"

Inputs are quantized as they come (dynamic). 16 bits and more mean that a tensor stays as it is.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from fewbit.config.spec import QuantizationConfig, QuantizationSpec
from fewbit.errors import ConfigError, nearest
from fewbit.numerics.formats import CODE_BITS, WIDEST

GROUPED = ("per-block", "per-group")
METHODS = ("per-tensor", "per-token", "per-channel", *GROUPED)
UNTOUCHED_BITS = 16


def make_spec(
    bits: int,
    method: str,
    group_size: int | None = None,
    symmetric: bool = True,
    dtype: str | None = None,
    **options: Any,
) -> QuantizationSpec:
    """The spec of a matrix whose rows are tokens. ConfigError for words that are unknown or contradict each other."""
    name = method_name(method)
    if dtype is None:
        if not isinstance(bits, int) or isinstance(bits, bool) or not 2 <= bits <= WIDEST:
            raise ConfigError(f"bits must be 2 to {WIDEST}, not {bits!r}; for floats say dtype, e.g. dtype='e4m3'")
        dtype = f"int{bits}" if symmetric else f"uint{bits}"
    fields: dict[str, Any] = {"dtype": dtype, "symmetric": symmetric, "qscheme": name.replace("-", "_")}
    if name in GROUPED:
        if group_size is None:
            raise ConfigError(f"method {method} needs group_size")
        fields |= {"qscheme": "per_group", "group_size": group_size}
    elif group_size is not None:
        raise ConfigError(f"group_size {group_size} contradicts method {method}; use per-block")
    elif name == "per-channel":
        fields["ch_axis"] = 1
    return QuantizationSpec(**fields | options)


def weight_spec(
    bits: int,
    method: str,
    group_size: int | None = None,
    symmetric: bool = True,
    dtype: str | None = None,
    **options: Any,
) -> QuantizationSpec:
    """The spec of a linear's weight [out, in]: per-channel and per-token are a scale for each output channel.

    group_size −1 of per-block is the same.
    """
    name = method_name(method)
    wide = dtype is None and isinstance(bits, int) and bits > CODE_BITS  # nothing to gain from a smaller range
    spec_options = {"observer": "minmax" if wide else "search"} | options
    if group_size == -1 and name in GROUPED:
        name, group_size = "per-channel", None
    if name in ("per-channel", "per-token"):
        name = "per-channel"
        spec_options.setdefault("ch_axis", 0)
    return make_spec(bits, name, group_size, symmetric, dtype, **spec_options)


def input_spec(
    bits: int,
    method: str,
    group_size: int | None = None,
    symmetric: bool = True,
    dtype: str | None = None,
    **options: Any,
) -> QuantizationSpec:
    """The spec of what flows: least and largest value of each tensor as it comes, unless `options` say otherwise."""
    return make_spec(
        bits, method, group_size, symmetric, dtype, **{"observer": "minmax", "is_dynamic": True} | options
    )


def method_name(method: str) -> str:
    """One of METHODS for a user's spelling of it (per_token, Per-Token). ConfigError for an unknown word."""
    name = str(method).replace("_", "-").lower()
    if name not in METHODS:
        raise ConfigError(f"unknown method {method!r}{nearest(name, METHODS)}")
    return name


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
    inputs = None if _untouched(a_bits) else input_spec(a_bits, a_method or "per-token", a_group_size)
    return QuantizationConfig(weight=weight, input_tensors=inputs)


def with_methods(
    config: QuantizationConfig,
    w_method: str | None = None,
    a_method: str | None = None,
    w_group_size: int | None = None,
    a_group_size: int | None = None,
) -> QuantizationConfig:
    """`config` with other granularities and its own formats. A method of what it leaves as it is says nothing."""
    weight = _with_method(config.weight, w_method, w_group_size, weight_spec)
    inputs = _with_method(config.input_tensors, a_method, a_group_size, input_spec)
    return replace(config, weight=weight, input_tensors=inputs)


def _untouched(bits: int) -> bool:
    return isinstance(bits, int) and bits >= UNTOUCHED_BITS


def _with_method(
    spec: QuantizationSpec | None, method: str | None, group_size: int | None, make: Callable[..., QuantizationSpec]
) -> QuantizationSpec | None:
    """A spec with another method. How scales are stored stays where groups stay groups; others have plain ones."""
    if method is None and group_size is not None:
        method = "per-block"
    if spec is None or method is None:
        return spec
    options = {}
    if method_name(method) in GROUPED:
        group_size = group_size or spec.group_size
        options = {"scale_type": spec.scale_type} if spec.qscheme == "per_group" else {}
    return make(spec.bits, method, group_size, spec.symmetric, spec.dtype, **options)

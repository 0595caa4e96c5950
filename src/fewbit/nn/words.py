"""How a tensor is quantized, in a few words.

FullQuantTransformer's: bits, method, group size. What shares a scale, by the names of methods, for x [..., M, K]:

    per-tensor              everything               scales (1, 1)
    per-token               a row                    scales (..., M, 1)
    per-channel             a column                 scales (1, K)
    per-block, per-group    `group_size` neighbours  scales (..., M, K / group_size)

A linear's weight is [out, in], and one scale for each output channel is one for each row: `weight_spec` takes either
word for that, per-channel or per-token. A linear takes words for its weight and its (dynamic) input; 16 bits and more
mean that a tensor stays as it is:

    w_bits=4, a_bits=8, w_method="per-block", w_group_size=64, a_method="per-token"

optimum-quanto's: a dtype's name ("int4", qint4, torch.float8_e4m3fn) for weights, one for activations.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, TypedDict, Unpack

from fewbit.config.spec import QuantizationConfig, QuantizationSpec
from fewbit.errors import ConfigError, nearest
from fewbit.numerics.formats import CODE_BITS, WIDEST

GROUPED = ("per-block", "per-group")
METHODS = ("per-tensor", "per-token", "per-channel", *GROUPED)
GROUP_SIZES = (128, 64, 32)
"""Of weights of less than 8 bits, by name: the first that divides the inputs, else a channel."""
DTYPES = {
    **{f"{sign}int{bits}": f"{sign}int{bits}" for sign in ("", "u") for bits in range(2, 9)},
    **dict.fromkeys(("fp8", "float8", "float8_e4m3fn", "e4m3"), "e4m3"),
    **dict.fromkeys(("float8_e5m2", "e5m2"), "e5m2"),
    **dict.fromkeys(("fp4", "float4", "e2m1"), "e2m1"),
    **dict.fromkeys(("fp6", "float6", "e2m3"), "e2m3"),
}
"""Names for weights and activations; optimum-quanto's (qint8, qfloat8 …) and torch's dtypes are understood, too."""


class Granularity(TypedDict, total=False):
    """What shares a scale in a linear's weight and input. None is as good as nothing."""

    w_method: str | None
    a_method: str | None
    w_group_size: int | None
    a_group_size: int | None


WORDS = ("w_bits", "a_bits", *Granularity.__annotations__)


def make_spec(
    bits: int, method: str, group_size: int | None = None, symmetric: bool = True, **options: Any
) -> QuantizationSpec:
    """The spec of a matrix whose rows are tokens; `options` are other fields of QuantizationSpec (without a dtype: an
    integer of `bits`). ConfigError for words that are unknown or contradict each other."""
    name = method_name(method)
    if options.get("dtype") is None:
        if not isinstance(bits, int) or isinstance(bits, bool) or not 2 <= bits <= WIDEST:
            raise ConfigError(f"bits must be 2 to {WIDEST}, not {bits!r}; for floats say dtype, e.g. dtype='e4m3'")
        options["dtype"] = f"int{bits}" if symmetric else f"uint{bits}"
    fields: dict[str, Any] = {"symmetric": symmetric, "qscheme": name.replace("-", "_")}
    if name in GROUPED:
        if group_size is None:
            raise ConfigError(f"method {method} needs group_size")
        fields |= {"qscheme": "per_group", "group_size": group_size}
    elif group_size is not None:
        raise ConfigError(f"group_size {group_size} contradicts method {method}; use per-block")
    elif name == "per-channel":
        fields["ch_axis"] = 1
    return QuantizationSpec(**fields | options)


def weight_spec(bits: int, method: str, group_size: int | None = None, **options: Any) -> QuantizationSpec:
    """The spec of a linear's weight [out, in]: per-channel, per-token and a group_size of −1 are a scale for each
    output channel. `options` as of `make_spec`."""
    name = method_name(method)
    wide = options.get("dtype") is None and isinstance(bits, int) and bits > CODE_BITS
    # wide: there is nothing to gain from a smaller range
    defaults: dict[str, Any] = {"observer": "minmax" if wide else "search"}
    if group_size == -1 and name in GROUPED:
        name, group_size = "per-channel", None
    if name in ("per-channel", "per-token"):
        name, defaults["ch_axis"] = "per-channel", 0
    return make_spec(bits, name, group_size, **defaults | options)


def input_spec(bits: int, method: str, group_size: int | None = None, **options: Any) -> QuantizationSpec:
    """The spec of what flows: least and largest value of each tensor as it comes, unless `options` say otherwise."""
    return make_spec(bits, method, group_size, **dict[str, Any](observer="minmax", is_dynamic=True) | options)


def method_name(method: str) -> str:
    """One of METHODS for a user's spelling of it (per_token, Per-Token). ConfigError for an unknown word."""
    name = str(method).replace("_", "-").lower()
    if name not in METHODS:
        raise ConfigError(f"unknown method {method!r}{nearest(name, METHODS)}")
    return name


def linear_config(**words: Any) -> QuantizationConfig:
    """A config from WORDS alone. What is not said is 8 bits and per-token; ConfigError for words that contradict."""
    said = _said(words)

    def spec(side: str, make: Callable[..., QuantizationSpec]) -> QuantizationSpec | None:
        bits = said.get(f"{side}_bits", 8)
        if isinstance(bits, int) and bits >= 16:
            return None
        return make(bits, said.get(f"{side}_method", "per-token"), said.get(f"{side}_group_size"))

    return QuantizationConfig(weight=spec("w", weight_spec), input_tensors=spec("a", input_spec))


def with_methods(config: QuantizationConfig, **words: Unpack[Granularity]) -> QuantizationConfig:
    """`config` with other granularities and its own formats. A method of what it leaves as it is has no effect."""
    said = _said(words)
    weight = _with_method(config.weight, said.get("w_method"), said.get("w_group_size"), weight_spec)
    inputs = _with_method(config.input_tensors, said.get("a_method"), said.get("a_group_size"), input_spec)
    return replace(config, weight=weight, input_tensors=inputs)


def _said(words: Mapping[str, Any]) -> dict[str, Any]:
    if unknown := [name for name in words if name not in WORDS]:
        raise TypeError(f"unknown word {unknown[0]!r}{nearest(unknown[0], WORDS)}")
    return {name: value for name, value in words.items() if value is not None}


def _with_method(
    spec: QuantizationSpec | None, method: str | None, group_size: int | None, make: Callable[..., QuantizationSpec]
) -> QuantizationSpec | None:
    """A spec with another method. How scales are stored stays where groups stay groups; others have plain ones."""
    if method is None and group_size is not None:
        method = "per-block"
    if spec is None or method is None:
        return spec
    options: dict[str, Any] = {"symmetric": spec.symmetric, "dtype": spec.dtype}
    if method_name(method) in GROUPED:
        group_size = group_size or spec.group_size
        options |= {"scale_type": spec.scale_type} if spec.qscheme == "per_group" else {}
    return make(spec.bits, method, group_size, **options)


def named_weight(name: str, columns: int) -> QuantizationSpec:
    """The spec of a weight [out, columns] by the name of its dtype: 8 bits have a scale per output channel, fewer one
    for GROUP_SIZES neighbours. ConfigError for an unknown name."""
    spec = QuantizationSpec(**_named(name, "weights"), qscheme="per_channel")
    size = next((size for size in GROUP_SIZES if columns % size == 0), None)
    return spec if spec.bits == 8 or size is None else replace(spec, qscheme="per_group", group_size=size)


def named_input(name: str) -> QuantizationSpec:
    """The spec of what flows by the name of its dtype: one static scale. ConfigError for an unknown name."""
    return QuantizationSpec(**_named(name, "activations"), qscheme="per_tensor", observer="minmax")


def _named(name: str, argument: str) -> dict[str, Any]:
    plain = name.lower().removeprefix("torch.").removeprefix("q")
    if plain not in DTYPES:
        raise ConfigError(f"{argument}: unknown dtype {name!r}{nearest(plain, DTYPES)}")
    return {"dtype": DTYPES[plain], "symmetric": not plain.startswith("uint")}

"""Named schemes: each is a row of a table, not a class.

Names compose: W4A8KV4-g128 is W4A8 with a 4-bit KV cache and groups of 128.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, replace
from typing import Any

from fewbit.config.spec import AttentionConfig, QuantizationConfig, QuantizationSpec
from fewbit.errors import ConfigError, nearest, shown
from fewbit.numerics.scale_format import ScaleType

DEFAULT_GROUP_SIZE = 128
TYPICAL_SHAPE = (4096, 4096)
"""Of the weight whose bits are quoted: with one scale per channel they depend on it, a little."""


@dataclass(frozen=True)
class Scheme:
    """One row: the name that users know and what it stands for."""

    name: str
    config: QuantizationConfig
    exports: tuple[str, ...] = ("compressed-tensors",)
    layout: str = "pack-quantized"
    """compressed-tensors' name for how the weights lie."""

    @property
    def bits_per_weight(self) -> float:
        """Stored bits per weight of a 16-bit matrix: codes, scales and zero points."""
        spec = self.config.weight
        assert spec is not None
        return spec.stored_bits(TYPICAL_SHAPE) / math.prod(TYPICAL_SHAPE)


def _grouped(bits: int, symmetric: bool = True) -> QuantizationSpec:
    return QuantizationSpec(
        dtype=f"int{bits}" if symmetric else f"uint{bits}",
        qscheme="per_group",
        group_size=DEFAULT_GROUP_SIZE,
        symmetric=symmetric,
    )


def _block(dtype: str, size: int, scale_type: ScaleType, **options: Any) -> QuantizationSpec:
    return QuantizationSpec(dtype=dtype, qscheme="per_group", group_size=size, scale_type=scale_type, **options)


def _input(dtype: str, qscheme: str, **options: Any) -> QuantizationSpec:
    """Activations: minmax, as engines compute it."""
    return QuantizationSpec(dtype=dtype, qscheme=qscheme, observer="minmax", **options)  # type: ignore[arg-type]


INT8_CHANNEL = QuantizationSpec(dtype="int8", qscheme="per_channel")
FP8_TENSOR = QuantizationSpec(dtype="e4m3", qscheme="per_tensor")
FP8_CHANNEL = QuantizationSpec(dtype="e4m3", qscheme="per_channel")
FP8_BLOCKS = QuantizationSpec(dtype="e4m3", qscheme="per_block", block_size=(128, 128))
NVFP4 = _block("e2m1", 16, "e4m3")
TOKEN_INT8 = _input("int8", "per_token", is_dynamic=True)
TOKEN_INT4 = _input("int4", "per_token", is_dynamic=True)
TOKEN_FP8 = _input("e4m3", "per_token", is_dynamic=True)
TENSOR_INT8 = _input("int8", "per_tensor")
TENSOR_FP8 = _input("e4m3", "per_tensor")
GROUP_FP8 = _input("e4m3", "per_group", group_size=128, is_dynamic=True)
GROUP_NVFP4 = _input("e2m1", "per_group", group_size=16, scale_type="e4m3", is_dynamic=True)


def _mx(dtype: str) -> QuantizationSpec:
    return _block(dtype, 32, "e8m0")


def _mx_input(dtype: str) -> QuantizationSpec:
    return _input(dtype, "per_group", group_size=32, scale_type="e8m0", is_dynamic=True)


def _config(weight: QuantizationSpec, inputs: QuantizationSpec | None = None) -> QuantizationConfig:
    return QuantizationConfig(weight=weight, input_tensors=inputs)


NONE: tuple[str, ...] = ()
_ROWS = [
    *(Scheme(f"W{bits}A16", _config(_grouped(bits))) for bits in (8, 4, 3, 2)),
    *(Scheme(f"W{bits}A16_ASYM", _config(_grouped(bits, False))) for bits in (8, 4, 3, 2)),
    Scheme("W8A8", _config(INT8_CHANNEL, TOKEN_INT8), layout="int-quantized"),
    Scheme("W8A8_STATIC", _config(INT8_CHANNEL, TENSOR_INT8), layout="int-quantized"),
    Scheme("W4A8", _config(_grouped(4), TOKEN_INT8)),
    Scheme("W4A4", _config(_grouped(4), TOKEN_INT4)),
    Scheme("W4AFP8", _config(_grouped(4), TOKEN_FP8)),
    Scheme("FP8", _config(FP8_TENSOR, TENSOR_FP8), layout="float-quantized"),
    Scheme("FP8_DYNAMIC", _config(FP8_CHANNEL, TOKEN_FP8), layout="float-quantized"),
    Scheme("FP8_BLOCK", _config(FP8_BLOCKS, GROUP_FP8), layout="float-quantized"),
    Scheme("NVFP4", _config(NVFP4, GROUP_NVFP4), layout="nvfp4-pack-quantized"),
    Scheme("NVFP4A16", _config(NVFP4), layout="nvfp4-pack-quantized"),
    Scheme("MXFP4", _config(_mx("e2m1"), _mx_input("e2m1")), layout="mxfp4-pack-quantized"),
    Scheme("MXFP4A16", _config(_mx("e2m1")), layout="mxfp4-pack-quantized"),
    Scheme("MXFP6", _config(_mx("e2m3"), _mx_input("e2m3")), layout="mxfp6-pack-quantized"),
    Scheme("MXFP8", _config(_mx("e4m3"), _mx_input("e4m3")), layout="mxfp8-quantized"),
    Scheme(
        "MXINT8",
        _config(
            _block("int8", 32, "e8m0"), _input("int8", "per_group", group_size=32, scale_type="e8m0", is_dynamic=True)
        ),
        NONE,
        "",
    ),
    Scheme(
        "MX9",
        _config(QuantizationSpec(dtype="mx9"), QuantizationSpec(dtype="mx9", observer="minmax", is_dynamic=True)),
        NONE,
        "",
    ),
    Scheme(
        "MX6",
        _config(QuantizationSpec(dtype="mx6"), QuantizationSpec(dtype="mx6", observer="minmax", is_dynamic=True)),
        NONE,
        "",
    ),
    Scheme(
        "BFP16",
        _config(QuantizationSpec(dtype="bfp16"), QuantizationSpec(dtype="bfp16", observer="minmax", is_dynamic=True)),
        NONE,
        "",
    ),
]
SCHEMES: dict[str, Scheme] = {scheme.name: scheme for scheme in _ROWS}
_ALIASES = {"INT8": "W8A8", "W8A8-STATIC": "W8A8_STATIC", "FP8-DYNAMIC": "FP8_DYNAMIC", "FP8-BLOCK": "FP8_BLOCK"}


@dataclass(frozen=True)
class CacheSuite:
    """One row of the KV caches: the suffix of a scheme's name and what it stands for."""

    name: str
    spec: QuantizationSpec
    """Of keys and values."""
    exports: tuple[str, ...] = ()

    @property
    def attention(self) -> AttentionConfig:
        return AttentionConfig(key=self.spec, value=self.spec)


_SUITES = [
    CacheSuite("KV8", _input("int8", "per_token", is_dynamic=True)),
    CacheSuite("KVFP8", _input("e4m3", "per_tensor"), ("compressed-tensors",)),
    CacheSuite("KV4", _input("uint4", "per_group", group_size=32, symmetric=False, is_dynamic=True)),
]
KV_SUITES: dict[str, CacheSuite] = {suite.name: suite for suite in _SUITES}
_GROUP = r"(?:-G(?P<{}>[0-9]{{1,9}}|-1))?"
_NAME = re.compile(
    r"(?P<base>.{,100}?)" + _GROUP.format("before") + r"\+?(?P<kv>KVFP8|KV8|KV4)?" + _GROUP.format("after")
)


def parse_scheme(name: str, group_size: int | None = None) -> tuple[QuantizationConfig, AttentionConfig | None]:
    """What a scheme's name stands for: a row of SCHEMES, maybe with a KV suite and a group size in either order
    (W4A8KV4-g128, W4A8-g128+KV4).

    `group_size` replaces the default of 128, −1 means per channel; it must not contradict the name. ConfigError for a
    scheme whose groups have no free size.
    """
    match = _NAME.fullmatch(name.upper()) if isinstance(name, str) else None
    if match is None:
        raise ConfigError(f"unknown scheme {shown(name)} ('fewbit schemes' lists them)")
    base, cache, written = match["base"], match["kv"], match["before"] or match["after"]
    if match["before"] and match["after"]:
        raise ConfigError(f"scheme {name!r} names its group size twice")
    scheme = SCHEMES.get(_ALIASES.get(base, base))
    if scheme is None:
        known = [*SCHEMES, *(f"W4A16{suite}" for suite in KV_SUITES)]
        raise ConfigError(f"unknown scheme {shown(name)}{nearest(name.upper(), known)} ('fewbit schemes' lists them)")
    if group_size is not None and written is not None and group_size != int(written):
        raise ConfigError(f"scheme {name} has its group size in its name; group_size {group_size} contradicts it")
    size = group_size if group_size is not None else int(written) if written else None
    config = scheme.config if size is None else with_group_size(scheme.config, size)
    return config, KV_SUITES[cache].attention if cache else None


def scheme_config(name: str, group_size: int | None = None) -> QuantizationConfig:
    """The QuantizationConfig of a scheme's name without a KV suite (for one layer, say)."""
    config, attention = parse_scheme(name, group_size)
    if attention is not None:
        raise ConfigError(f"scheme {name!r} names a KV cache, which is quantized for the whole model, not for a layer")
    return config


def takes_group_size(config: QuantizationConfig) -> bool:
    """Whether a config's weight may have groups of any size: it has some, or is of integers that are packed.

    8-bit integers that meet integer inputs are summed in one integer product, FP8 has a scale per channel or tensor:
    engines refuse groups of both.
    """
    weight, inputs = config.weight, config.input_tensors
    if weight is None or weight.scale_type not in ("float", "pof2") or weight.qscheme == "per_block":
        return False
    summed = weight.bits == 8 and inputs is not None and inputs.format.is_integer
    return weight.qscheme == "per_group" or (weight.format.is_integer and not summed)


def with_group_size(config: QuantizationConfig, group_size: int) -> QuantizationConfig:
    """The same config with another group size for the weight; −1 means one scale per output channel. ConfigError for
    weights that have no groups of a free size."""
    weight = config.weight
    if weight is None:
        return config
    if group_size < 1 and group_size != -1:
        raise ConfigError(f"group size must be a positive number, or -1 for one scale per channel, not {group_size}")
    if not takes_group_size(config):
        if group_size == -1 and weight.qscheme == "per_channel":
            return config
        if weight.qscheme in ("per_group", "per_block"):
            raise ConfigError(f"group_size {group_size}: {weight.summary} has the groups of its format; leave it out")
        met = f" with {config.input_tensors.dtype} inputs" if config.input_tensors is not None else ""
        raise ConfigError(
            f"group_size {group_size}: {weight.summary}{met} has no groups (engines know none there); leave it out, "
            "or use a scheme with groups (W8A16, W4A16, W4A8 …)"
        )
    if weight.qscheme != "per_group":  # a channel's axis is not the one along which groups run
        weight = replace(weight, qscheme="per_channel", ch_axis=None)
    if group_size == -1 and weight.qscheme == "per_channel":
        return replace(config, weight=weight)
    return replace(config, weight=replace(weight, qscheme="per_group", group_size=group_size))

"""Named schemes: each is a row of a table.

Names compose: W4A8KV4-g128 is W4A8 with a 4-bit KV cache and groups of 128.
"""

import re
from dataclasses import replace
from typing import Any

from fewbit.config.spec import AttentionConfig, QuantizationConfig, QuantizationSpec
from fewbit.errors import ConfigError, nearest, shown

DEFAULT_GROUP_SIZE = 128


def _grouped(bits: int, symmetric: bool = True) -> QuantizationSpec:
    dtype: Any = f"int{bits}" if symmetric else f"uint{bits}"
    return QuantizationSpec(dtype=dtype, qscheme="per_group", group_size=DEFAULT_GROUP_SIZE, symmetric=symmetric)


def _input(dtype: str, qscheme: str, **options: Any) -> QuantizationSpec:
    """Activations: minmax, as engines compute it."""
    return QuantizationSpec(dtype=dtype, qscheme=qscheme, observer="minmax", **options)  # type: ignore[arg-type]


def _blocks(dtype: str, inputs: bool = True, size: int = 32, scale_type: str = "e8m0") -> QuantizationConfig:
    """MX or NVFP4: groups of `size` whose scales are bytes."""
    groups: dict[str, Any] = {"dtype": dtype, "qscheme": "per_group", "group_size": size, "scale_type": scale_type}
    return QuantizationConfig(QuantizationSpec(**groups), _input(**groups, is_dynamic=True) if inputs else None)


INT8_CHANNEL = QuantizationSpec(dtype="int8", qscheme="per_channel")
FP8_TENSOR = QuantizationSpec(dtype="e4m3", qscheme="per_tensor")
FP8_CHANNEL = QuantizationSpec(dtype="e4m3", qscheme="per_channel")
FP8_BLOCKS = QuantizationSpec(dtype="e4m3", qscheme="per_block", block_size=(128, 128))
TOKEN_INT8 = _input("int8", "per_token", is_dynamic=True)
TOKEN_INT4 = _input("int4", "per_token", is_dynamic=True)
TOKEN_FP8 = _input("e4m3", "per_token", is_dynamic=True)
TENSOR_FP8 = _input("e4m3", "per_tensor")

SCHEMES: dict[str, QuantizationConfig] = {
    **{f"W{bits}A16": QuantizationConfig(_grouped(bits)) for bits in (8, 4, 3, 2)},
    **{f"W{bits}A16_ASYM": QuantizationConfig(_grouped(bits, False)) for bits in (8, 4, 3, 2)},
    "W8A8": QuantizationConfig(INT8_CHANNEL, TOKEN_INT8),
    "W8A8_STATIC": QuantizationConfig(INT8_CHANNEL, _input("int8", "per_tensor")),
    "W4A8": QuantizationConfig(_grouped(4), TOKEN_INT8),
    "W4A4": QuantizationConfig(_grouped(4), TOKEN_INT4),
    "W4AFP8": QuantizationConfig(_grouped(4), TOKEN_FP8),
    "FP8": QuantizationConfig(FP8_TENSOR, TENSOR_FP8),
    "FP8_DYNAMIC": QuantizationConfig(FP8_CHANNEL, TOKEN_FP8),
    "FP8_BLOCK": QuantizationConfig(FP8_BLOCKS, _input("e4m3", "per_group", group_size=128, is_dynamic=True)),
    "NVFP4": _blocks("e2m1", True, 16, "e4m3"),
    "NVFP4A16": _blocks("e2m1", False, 16, "e4m3"),
    "MXFP4": _blocks("e2m1"),
    "MXFP4A16": _blocks("e2m1", inputs=False),
    "MXFP6": _blocks("e2m3"),
    "MXFP8": _blocks("e4m3"),
    "MXINT8": _blocks("int8"),
    **{
        name.upper(): QuantizationConfig(
            QuantizationSpec(dtype=name), QuantizationSpec(dtype=name, observer="minmax", is_dynamic=True)
        )
        for name in ("mx9", "mx6", "bfp16")
    },
}
"""What a scheme's name stands for. Where it can be exported to, the formats say (see `fewbit.formats.holding`)."""
_ALIASES = {"INT8": "W8A8", "W8A8-STATIC": "W8A8_STATIC", "FP8-DYNAMIC": "FP8_DYNAMIC", "FP8-BLOCK": "FP8_BLOCK"}
KV_CACHES: dict[str, QuantizationSpec] = {
    "KV8": _input("int8", "per_token", is_dynamic=True),
    "KVFP8": TENSOR_FP8,
    "KV4": _input("uint4", "per_group", group_size=32, symmetric=False, is_dynamic=True),
}
"""KV-cache schemes, the suffixes of a scheme's name: how keys and values are quantized."""
_GROUP = r"(?:-G(?P<{}>[0-9]{{1,9}}|-1))?"
_KV = rf"\+?(?P<kv>{'|'.join(KV_CACHES)})?"
_NAME = re.compile(r"(?P<base>.{,100}?)" + _GROUP.format("before") + _KV + _GROUP.format("after"))


def parse_scheme(name: str, group_size: int | None = None) -> tuple[QuantizationConfig, AttentionConfig | None]:
    """What a scheme's name stands for: a row of SCHEMES, maybe with a KV cache and a group size in either order
    (W4A8KV4-g128, W4A8-g128+KV4). `group_size` replaces the default of 128 (−1: per channel) and must not contradict
    the name. ConfigError for a scheme whose groups have no free size."""
    match = _NAME.fullmatch(name.upper()) if isinstance(name, str) else None
    if match is None:
        raise ConfigError(f"unknown scheme {shown(name)} ('fewbit schemes' lists them)")
    base, cache, written = match["base"], match["kv"], match["before"] or match["after"]
    if match["before"] and match["after"]:
        raise ConfigError(f"scheme {name!r} names its group size twice")
    scheme = SCHEMES.get(_ALIASES.get(base, base))
    if scheme is None:
        known = [*SCHEMES, *(f"W4A16{cache}" for cache in KV_CACHES)]
        raise ConfigError(f"unknown scheme {shown(name)}{nearest(name.upper(), known)} ('fewbit schemes' lists them)")
    if group_size is not None and written is not None and group_size != int(written):
        raise ConfigError(f"scheme {name} has its group size in its name; group_size {group_size} contradicts it")
    size = group_size if group_size is not None else int(written) if written else None
    config = scheme if size is None else with_group_size(scheme, size)
    return config, AttentionConfig(key=KV_CACHES[cache], value=KV_CACHES[cache]) if cache else None


def scheme_config(name: str, group_size: int | None = None) -> QuantizationConfig:
    """The QuantizationConfig of a scheme's name without a KV cache (for one layer, say)."""
    config, attention = parse_scheme(name, group_size)
    if attention is not None:
        raise ConfigError(f"scheme {name!r} names a KV cache, which is quantized for the whole model, not for a layer")
    return config


def takes_group_size(config: QuantizationConfig) -> bool:
    """Whether a config's weight may have groups of any size: it has some, or is of integers that are packed. Engines
    refuse groups of FP8, and of 8-bit integers that meet integer inputs: those are summed in one integer product."""
    weight, inputs = config.weight, config.input_tensors
    if weight is None or weight.scale_type not in ("float", "pof2") or weight.qscheme == "per_block":
        return False
    summed = weight.bits == 8 and inputs is not None and inputs.format.is_integer
    return weight.qscheme == "per_group" or (weight.format.is_integer and not summed)


def with_group_size(config: QuantizationConfig, group_size: int) -> QuantizationConfig:
    """The same config with another group size for the weight (−1: one scale per channel). ConfigError for weights
    that have no groups of a free size."""
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

"""AMD Quark's configuration, translated into fewbit's.

`QuantizationSpec(dtype=Dtype.int8, observer_cls=PerTensorMinMaxObserver, scale_type=ScaleType.float, …)` is what
Quark's users write. There is one implementation: enumerations are strings, observers are names, and the translations
below turn fields into those of config/spec.py before they are checked. Quark 0.13's new class names are aliases.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, is_dataclass, replace
from enum import StrEnum
from typing import Any

from fewbit.errors import ConfigError, shown


class Dtype(StrEnum):
    """Element formats by Quark's names."""

    int8 = "int8"
    uint8 = "uint8"
    int4 = "int4"
    uint4 = "uint4"
    int3 = "int3"
    int2 = "int2"
    uint2 = "uint2"
    int16 = "int16"
    uint16 = "uint16"
    int32 = "int32"
    bfloat16 = "bfloat16"
    float16 = "float16"
    fp8_e5m2 = "e5m2"
    fp8_e4m3 = "e4m3"
    fp6_e3m2 = "e3m2"
    fp6_e2m3 = "e2m3"
    fp4 = "e2m1"
    mx = "mx"
    mx6 = "mx6"
    mx9 = "mx9"
    bfp16 = "bfp16"


class ScaleType(StrEnum):
    """How scales are stored."""

    float = "float"
    float32 = "float32"
    float16 = "float16"
    bfloat16 = "bfloat16"
    pof2 = "pof2"
    float8_e8m0fnu = "e8m0"


QuantizationMode = StrEnum("QuantizationMode", "eager_mode fx_graph_mode")
"""Only eager mode is supported: no graph is traced."""
ZeroPointType = StrEnum("ZeroPointType", "int32 float32")
"""Only int32 is supported: zero points are codes."""
RoundType = StrEnum("RoundType", "round floor half_even")
"""How elements are rounded."""
QSchemeType = StrEnum("QSchemeType", "per_tensor per_channel per_group per_block")
"""What shares a scale."""


@dataclass(frozen=True)
class ObserverClass:
    """Quark's name of an observer, fewbit's name of it, and its granularity."""

    name: str
    observer: str
    qscheme: str | None = None


PlaceholderObserver = ObserverClass("PlaceholderObserver", "placeholder")
PerTensorMinMaxObserver = ObserverClass("PerTensorMinMaxObserver", "minmax", "per_tensor")
PerChannelMinMaxObserver = ObserverClass("PerChannelMinMaxObserver", "minmax", "per_channel")
PerGroupMinMaxObserver = ObserverClass("PerGroupMinMaxObserver", "minmax", "per_group")
PerBlockMXObserver = ObserverClass("PerBlockMXObserver", "minmax", "per_group")
PerTensorPercentileObserver = ObserverClass("PerTensorPercentileObserver", "percentile", "per_tensor")
PerTensorMSEObserver = ObserverClass("PerTensorMSEObserver", "mse", "per_tensor")
PerTensorHistogramObserver = ObserverClass("PerTensorHistogramObserver", "histogram", "per_tensor")
PerTensorHistogramObserverPro = ObserverClass("PerTensorHistogramObserverPro", "histogram", "per_tensor")
PerBlockMXDiffsObserver = ObserverClass("PerBlockMXDiffsObserver", "mse", "per_group")


_PAIRS = {"qscheme": "per_group", "group_size": 2, "scale_type": "microexponent", "exponent_mode": "floor"}
_EIGHTS = {"qscheme": "per_group", "group_size": 8, "scale_type": "e8m0", "exponent_mode": "even"}
_BLOCK_DTYPES = {"mx6": ("int5", (16, 2), _PAIRS), "mx9": ("int8", (16, 2), _PAIRS), "bfp16": ("int8", (8,), _EIGHTS)}
"""Elements, accepted values of `group_size` (per block, or per innermost scale), and what the dtype implies."""
_FLOAT_SCALES = ("float32", "float16", "bfloat16")


def translate_spec(fields: dict[str, Any]) -> dict[str, Any]:
    """Fields of a spec by Quark's names or fewbit's → fewbit's."""
    fields = {name: value for name, value in fields.items() if value is not None}  # Quark's "not given"
    _observer(fields)
    if "scale_calculation_mode" in fields:
        fields["exponent_mode"] = fields.pop("scale_calculation_mode")
    if "scale_format" in fields:
        scale_format = fields.pop("scale_format")
        fields["scale_type"] = "float" if scale_format == "float32" else scale_format
    dtype = str(fields["dtype"]) if "dtype" in fields else None
    if dtype == "mx":
        if "mx_element_dtype" not in fields:
            raise ConfigError("dtype mx needs mx_element_dtype, e.g. Dtype.fp4")
        element = fields.pop("mx_element_dtype")
        _imply(fields, dtype, {"scale_type": "e8m0", "qscheme": "per_group"})
        fields |= {"dtype": str(element), "group_size": fields.get("group_size", 32)}
    elif dtype in _BLOCK_DTYPES:
        element, sizes, implied = _BLOCK_DTYPES[dtype]
        if (size := fields.pop("group_size", sizes[0])) not in sizes:
            raise ConfigError(f"group_size {size} contradicts dtype {dtype}, whose blocks are {sizes[0]}")
        _imply(fields, dtype, implied)
        fields["dtype"] = element
    elif "mx_element_dtype" in fields:
        raise ConfigError("mx_element_dtype needs dtype mx")
    if "dtype" in fields:
        fields["dtype"] = Dtype[name].value if (name := str(fields["dtype"])) in Dtype.__members__ else name
        if fields["dtype"] in ("bfloat16", "float16"):  # a cast needs no other field
            fields = {"qscheme": "per_tensor", "observer": "placeholder"} | fields
    for name in ("qscheme", "round_method", "scale_type"):
        if name in fields:
            fields[name] = str(fields[name])
    scale_type = fields.get("scale_type")
    if scale_type in _FLOAT_SCALES:
        fields |= {"scale_type": "float", "scale_dtype": scale_type}
    if fields.get("group_size") == -1:  # the whole axis along which groups would run
        fields |= {"group_size": None, "qscheme": "per_channel"}
        if (axis := fields.get("ch_axis")) is not None:  # groups run along it; a channel's scale is for its entries
            fields["ch_axis"] = {0: 1, -2: 1, 1: 0, -1: 0}.get(axis, axis)
    if fields.pop("zero_point_type", "int32") != "int32":
        raise ConfigError("zero_point_type must be int32: zero points are codes here")
    if "qat_spec" in fields:
        raise ConfigError("qat_spec: fewbit quantizes after training and has no quantization-aware training")
    if fields.pop("is_scale_quant", None):
        raise ConfigError('is_scale_quant: give the spec of the elements scale_type="e4m3" instead of a list of two')
    if isinstance(fields.get("first_stage"), Mapping):
        fields["first_stage"] = translate_spec(dict(fields["first_stage"]))
    return fields


def _imply(fields: dict[str, Any], dtype: str, implied: Mapping[str, Any]) -> None:
    """Set the fields that a dtype implies; refuse contradictions. (`scale_type` float is Quark's default.)"""
    for name, value in implied.items():
        given = str(fields.get(name, value))
        if given != str(value) and (name, given) != ("scale_type", "float"):
            raise ConfigError(f"{name} {given} contradicts dtype {dtype}, which means {name} {value}; leave it out")
    fields |= implied


def _observer(fields: dict[str, Any]) -> None:
    """observer_cls, a class's name or an ObserverClass, becomes `observer`, and must fit the granularity."""
    given = fields.pop("observer_cls", None)
    if given is None:
        return
    if "observer" in fields:
        raise ConfigError("give either observer or observer_cls, not both")
    if isinstance(given, str):
        known = {value.name: value for value in globals().values() if isinstance(value, ObserverClass)}
        if given not in known:
            raise ConfigError(f"unknown observer_cls {given!r}; known: {', '.join(known)}")
        given = known[given]
    if not isinstance(given, ObserverClass):
        raise ConfigError(f"observer_cls must be one of fewbit's observers, not {given!r}")
    qscheme = fields.setdefault("qscheme", given.qscheme or "per_tensor")
    if (given.name, str(qscheme)) == ("PerChannelMinMaxObserver", "per_group"):
        given = PerGroupMinMaxObserver  # Quark's first releases wrote groups so, …
        fields.pop("ch_axis", None)  # … and let them run along rows whatever ch_axis said
    if given.qscheme is not None and str(qscheme) != given.qscheme:
        raise ConfigError(f"observer_cls {given.name} contradicts qscheme {qscheme}; it is for {given.qscheme}")
    fields["observer"] = given.observer


def translate_config(fields: dict[str, Any]) -> dict[str, Any]:
    """Fields of a QuantizationConfig: a list of two specs becomes one spec of two stages."""
    return {
        name: _joined(name, value) if isinstance(value, Sequence) and not isinstance(value, str) else value
        for name, value in fields.items()
        if name != "target_device"
    }


def _joined(name: str, specs: Sequence[Any]) -> Any:
    if len(specs) != 2:
        raise ConfigError(f"{name}: a list holds two specs (first and second stage), not {len(specs)}")
    first, second = specs
    if isinstance(first, Mapping) or isinstance(second, Mapping):
        raise ConfigError(f"{name}: write the second stage with first_stage inside instead of a list")
    if not all(is_dataclass(spec) for spec in specs):
        raise ConfigError(f"{name}: a list holds two specs, not {shown(specs)}")
    return replace(second, first_stage=first)


_EMPTY = ("layer_type_quant_config", "layer_quant_config", "exclude", "calibration", "seed")  # None: the default
_UNUSED: tuple[str, ...] = ("version", "quant_method", "log_severity_level", "keep_prequantized_layers")
_UNUSED += ("quant_flow", "gpu_resident_blocks")
_ELSEWHERE = {
    "kv_cache_group": "give the granularity in attention=AttentionConfig(…)",
    "min_kv_scale": "give clip_ratio or the observer in attention=AttentionConfig(…)",
    "softmax_quant_spec": "give attention=AttentionConfig(probabilities=…)",
    "kv_cache_post_rope": "give attention=AttentionConfig(key=…, value=…), which is after rotary embeddings",
    "shared_scale_groups": "leave it out: linears that engines fuse share their global scale",
    "sync_moe_expert_input_amax": "leave it out: linears with one input share their scales",
}


def translate_recipe(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of a Config: None becomes the default, and fields without effect here are dropped.

    `pre_quant_opt_config` (before 0.9) joins `algo_config`; `kv_cache_quant_config` is written over
    `layer_quant_config`, as there. ConfigError, which says what to write instead, for what is not offered.
    """
    fields = dict(fields)
    for name in list(fields):
        if name in _UNUSED or (name in _EMPTY and fields[name] is None):
            del fields[name]
    mode = fields.pop("quant_mode", None)
    if mode is not None and str(mode).rpartition(".")[2] not in ("eager", "eager_mode"):
        raise ConfigError("quant_mode must be eager: fewbit runs the model's own code and traces no graph")
    for name, instead in _ELSEWHERE.items():
        if fields.pop(name, None):
            raise ConfigError(f"a Config has no field {name!r}; {instead}")
    if before := fields.pop("pre_quant_opt_config", None):
        fields["algo_config"] = [*_listed(before), *_listed(fields.get("algo_config"))]
    if cache := fields.pop("kv_cache_quant_config", None):
        # the cache's entries come first and win
        fields["layer_quant_config"] = {**cache, **(fields.get("layer_quant_config") or {}), **cache}
    return fields


def _listed(value: Any) -> list[Any]:
    return [] if value is None else list(value) if isinstance(value, list | tuple) else [value]

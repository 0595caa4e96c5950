"""AMD Quark's names: `from fewbit.quark import Config, Dtype, PerGroupMinMaxObserver, Int4PerGroupSpec, …`.

Its configuration classes are fewbit's own; its enumerations and observers are in `config/quark.py`. Below are its
ready-made descriptions of a tensor:

    Int8PerTensorSpec(observer_method="min_max", is_dynamic=False).to_quantization_spec()

Each is a row: the fields of QuantizationSpec that its name implies, and those that it takes. What is not given is
fewbit's default.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from fewbit.config.algorithms import AlgorithmConfig as AlgorithmConfig
from fewbit.config.algorithms import AWQConfig as AWQConfig
from fewbit.config.algorithms import GPTQConfig as GPTQConfig
from fewbit.config.algorithms import ScalingLayer as ScalingLayer
from fewbit.config.algorithms import SmoothQuantConfig as SmoothQuantConfig
from fewbit.config.quark import *  # noqa: F403  (the enumerations and observers)
from fewbit.config.recipe import Config as Config
from fewbit.config.spec import QuantizationConfig as QuantizationConfig
from fewbit.config.spec import QuantizationSpec as QuantizationSpec
from fewbit.errors import ConfigError, nearest
from fewbit.model_quantizer import ModelQuantizer as ModelQuantizer

QConfig, QLayerConfig, QTensorConfig = Config, QuantizationConfig, QuantizationSpec
"""As Quark 0.11 calls them."""
AlgoConfig = AlgorithmConfig

_OBSERVERS = {"min_max": "MinMax", "MSE": "MSE", "percentile": "Percentile"}
_OBSERVERS |= dict.fromkeys(("histogram", "histogrampro"), "Histogram")


class DataTypeSpec:
    """What the classes below have in common: named fields, and the spec that they are."""

    takes: ClassVar[tuple[str, ...]] = ()
    """Fields that may be given."""
    means: ClassVar[Mapping[str, Any]] = {}
    """Fields of QuantizationSpec that the name says."""
    defaults: ClassVar[Mapping[str, Any]] = {}

    def __init__(self, **fields: Any) -> None:
        for name in fields:
            if name not in self.takes:
                raise ConfigError(f"{type(self).__name__} has no field {name!r}{nearest(name, self.takes)}")
        self.fields: dict[str, Any] = {**self.defaults, **fields}
        self.to_quantization_spec()  # what contradicts itself is refused now

    def __getattr__(self, name: str) -> Any:
        if name in type(self).takes:
            return self.fields.get(name)
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def to_quantization_spec(self) -> QuantizationSpec:
        """The spec. ConfigError for what contradicts itself."""
        fields = {name: value for name, value in self.fields.items() if value is not None}
        if (method := fields.pop("observer_method", None)) is not None:
            if method not in _OBSERVERS:
                raise ConfigError(f"unknown observer_method {method!r}{nearest(method, _OBSERVERS)}")
            fields["observer_cls"] = f"PerTensor{_OBSERVERS[method]}Observer"
        if fields.get("scale_type") == "power_of_2":
            fields["scale_type"] = "pof2"
        if "block_size" in fields:
            fields["group_size"] = fields.pop("block_size")
        return QuantizationSpec(**{**self.means, **fields})

    def __repr__(self) -> str:
        fields = ", ".join(f"{name}={value!r}" for name, value in self.fields.items())
        return f"{type(self).__name__}({fields})"


@dataclass(frozen=True)
class _TwoStages:
    first_stage: DataTypeSpec | QuantizationSpec
    second_stage: DataTypeSpec | QuantizationSpec


class ProgressiveSpec(_TwoStages):
    """Two stages: what the first one makes of a tensor is quantized by the second one."""

    def to_quantization_spec(self) -> list[QuantizationSpec]:
        """Both stages, as QuantizationConfig takes them."""
        return [_spec(self.first_stage), _spec(self.second_stage)]


class ScaleQuantSpec(_TwoStages):
    """A tensor in groups, and the grid of the groups' scales: NVFP4 where that is FP8 E4M3 per tensor."""

    def to_quantization_spec(self) -> QuantizationSpec:
        """One spec, whose scale_type is the second stage's format. ConfigError unless that is e4m3 per tensor."""
        elements, scales = _spec(self.first_stage), _spec(self.second_stage)
        if (scales.dtype, scales.qscheme) != ("e4m3", "per_tensor"):
            raise ConfigError(
                f"scales are quantized to e4m3 per_tensor, not to {scales.summary}; give FP8E4M3PerTensorSpec"
            )
        kept = ("dtype", "qscheme", "group_size", "observer", "is_dynamic")
        return QuantizationSpec(**{name: getattr(elements, name) for name in kept}, scale_type="e4m3")


def _spec(stage: DataTypeSpec | QuantizationSpec) -> QuantizationSpec:
    return stage.to_quantization_spec() if isinstance(stage, DataTypeSpec) else stage


def _class(
    name: str, takes: tuple[str, ...], means: Mapping[str, Any], defaults: Mapping[str, Any] | None = None
) -> type[DataTypeSpec]:
    fields = {"takes": takes, "means": means, "defaults": defaults or {}, "__module__": __name__}
    words = ", ".join(f"{field}={value!s}" for field, value in means.items() if field != "observer_cls")
    return type(name, (DataTypeSpec,), {**fields, "__doc__": f"QuantizationSpec({words}, …)."})


_INTEGER = ("symmetric", "scale_type", "round_method", "is_dynamic", "zero_point_type")
_TAKES = {"Tensor": ("observer_method",), "Channel": ("ch_axis",), "Group": ("ch_axis", "group_size")}


def _classes(name: str, dtype: str, *granularities: str) -> list[type[DataTypeSpec]]:
    """Int4PerTensorSpec, Int4PerChannelSpec … of "Int4"."""
    made = []
    for one in granularities or _TAKES:
        means = {"dtype": dtype, "qscheme": f"per_{one.lower()}", "observer_cls": f"Per{one}MinMaxObserver"}
        defaults = {"symmetric": not dtype.startswith("uint")} if one == "Group" else {}
        made.append(_class(f"{name}Per{one}Spec", (*_TAKES[one], *_INTEGER), means, defaults))
    return made


def _float_group(name: str, dtype: str) -> type[DataTypeSpec]:
    takes = ("scale_format", "scale_calculation_mode", "ch_axis", "is_dynamic", "group_size")
    means = {"dtype": dtype, "qscheme": "per_group", "observer_cls": "PerBlockMXObserver"}
    return _class(name, takes, means, {"scale_format": "float32", "ch_axis": -1})


def _mx(name: str, dtype: str) -> type[DataTypeSpec]:
    means = {"dtype": "mx", "mx_element_dtype": dtype, "observer_cls": "PerBlockMXObserver"}
    defaults = {"is_dynamic": True, "ch_axis": -1, "scale_calculation_mode": "even"}
    return _class(name, tuple(defaults), means, defaults)


def _block(name: str, dtype: str, size: int) -> type[DataTypeSpec]:
    takes = ("ch_axis", "block_size", "scale_calculation_mode", "is_dynamic")
    return _class(name, takes, {"dtype": dtype, "observer": "minmax"}, {"ch_axis": -1, "block_size": size})


Uint4PerTensorSpec, Uint4PerChannelSpec, Uint4PerGroupSpec = _classes("Uint4", "uint4")
Uint8PerTensorSpec, Uint8PerChannelSpec, Uint8PerGroupSpec = _classes("Uint8", "uint8")
Int4PerTensorSpec, Int4PerChannelSpec, Int4PerGroupSpec = _classes("Int4", "int4")
Int8PerTensorSpec, Int8PerChannelSpec, Int8PerGroupSpec = _classes("Int8", "int8")
Int3PerChannelSpec, Int3PerGroupSpec = _classes("Int3", "int3", "Channel", "Group")
(Int2PerGroupSpec,) = _classes("Int2", "int2", "Group")
FP8E4M3PerTensorSpec, FP8E4M3PerChannelSpec = _classes("FP8E4M3", "fp8_e4m3", "Tensor", "Channel")
FP8E5M2PerTensorSpec, FP8E5M2PerChannelSpec = _classes("FP8E5M2", "fp8_e5m2", "Tensor", "Channel")
FP8E4M3PerGroupSpec = _float_group("FP8E4M3PerGroupSpec", "fp8_e4m3")
FP8E5M2PerGroupSpec = _float_group("FP8E5M2PerGroupSpec", "fp8_e5m2")
FP6E2M3PerGroupSpec = _float_group("FP6E2M3PerGroupSpec", "fp6_e2m3")
FP6E3M2PerGroupSpec = _float_group("FP6E3M2PerGroupSpec", "fp6_e3m2")
FP4PerGroupSpec = _float_group("FP4PerGroupSpec", "fp4")
Float16Spec = _class("Float16Spec", (), {"dtype": "float16"})
Bfloat16Spec = _class("Bfloat16Spec", (), {"dtype": "bfloat16"})
OCP_MXFP8E4M3Spec = _mx("OCP_MXFP8E4M3Spec", "fp8_e4m3")
OCP_MXFP8E5M2Spec = _mx("OCP_MXFP8E5M2Spec", "fp8_e5m2")
OCP_MXFP6E3M2Spec = _mx("OCP_MXFP6E3M2Spec", "fp6_e3m2")
OCP_MXFP6E2M3Spec = _mx("OCP_MXFP6E2M3Spec", "fp6_e2m3")
OCP_MXFP4Spec = _mx("OCP_MXFP4Spec", "fp4")
OCP_MXINT8Spec = _mx("OCP_MXINT8Spec", "int8")
MX6Spec = _block("MX6Spec", "mx6", 16)
MX9Spec = _block("MX9Spec", "mx9", 16)
BFP16Spec = _block("BFP16Spec", "bfp16", 8)

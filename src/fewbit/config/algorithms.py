"""The methods and their options. Each is a phase of the work that declares its level and what it needs; a recipe lists
them in order: searches for channel scales first, then one that finds codes.

Quark's and llm-compressor's names for options are understood (`damp_percent`, `desc_act`, `scaling_layers` …).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from fewbit.config.validation import config_class, table
from fewbit.config.yaml_text import parse_yaml
from fewbit.errors import ConfigError, nearest, shown

_WHERE_TO_MEASURE = ("inp", "module2inspect", "has_kwargs", "condition", "help")  # Quark's; here it follows from H


@config_class
class ScalingLayer:
    """Linears that share an input, and the layer before them whose output channels can be divided."""

    prev_op: str
    """Norm or linear before them, by its name inside a block ("input_layernorm", "self_attn.v_proj")."""
    layers: tuple[str, ...]
    """The linears, by their names inside a block."""

    translate: ClassVar[Callable[[dict[str, Any]], dict[str, Any]]] = staticmethod(
        lambda fields: {name: value for name, value in fields.items() if name not in _WHERE_TO_MEASURE}
    )


@dataclass(frozen=True)
class Needs:
    """What a phase has to be given."""

    moment: bool = False
    """H = XᵀX of its input: calibration data."""
    sample: int = 0
    """Tokens of an input that is quantized, as it comes."""
    reference: float = 0.0
    """Share of the batches that pass in full precision, too."""
    gradients: bool = False
    """Gradients through the block."""


class AlgorithmConfig:
    """Options of a method, which is a phase of the work. A new one is a subclass and a function by its name: in
    `fewbit.algorithms` for groups of linears, in `fewbit.engine.phases` for blocks and models."""

    name: str
    level: ClassVar[Literal["model", "channel scales", "codes", "block"]]
    """What it works on: the model before anything else; a group of linears with one input, of which it finds the
    channel scales or the codes; a block whose groups are done."""

    @property
    def needs(self) -> Needs:
        """What it has to be given, with these options."""
        return Needs()


class CodeConfig(AlgorithmConfig):
    """Options of a method that finds the codes of linears that share an input."""

    level = "codes"
    compensates: ClassVar[bool] = False
    """Whether later columns make up for a column's error, so that less of it is left than rounding leaves."""


@config_class
class RTNConfig(CodeConfig):
    """Round to nearest: every weight goes to the nearest code of its group's grid."""

    name: Literal["rtn"] = "rtn"


_GPTQ_NAMES = {
    **dict.fromkeys(("damp_percent", "damp", "percdamp", "rel_damp", "dampening_frac"), "damping"),
    "blocksize": "block_size",
    **dict.fromkeys(("actorder", "desc_act", "quantization_order"), "order"),
}
_ORDERS = {"True": "activation", "static": "activation", "weight": "activation", "False": "none", "default": "none"}
_QUARK_SMOOTH = "smooth"
_OF_THE_SPEC = ("bits", "method", "group_size", "w_method", "a_method", "q_linear_type")


def _renamed(fields: Mapping[str, Any], ours: Mapping[str, str]) -> dict[str, Any]:
    """Fields by other libraries' names under fewbit's. Their None is "not said"; two names of a field are an error."""
    found: dict[str, Any] = {}
    names: dict[str, str] = {}
    for theirs, value in fields.items():
        name = ours.get(theirs, theirs)
        if name in names:
            raise ConfigError(f"{names[name]} and {theirs} are two names of one field; give one of them")
        names[name] = theirs
        if value is not None or theirs == name:
            found[name] = value
    return found


def _translate_gptq(fields: dict[str, Any]) -> dict[str, Any]:
    if fields.get("actorder", "") is None:  # llm-compressor's word for no order
        fields = fields | {"actorder": "none"}
    fields = _renamed(fields, _GPTQ_NAMES)
    if "order" in fields:
        order = fields["order"]
        if str(order) in ("group", "dynamic"):
            raise ConfigError(
                f"actorder {order} moves columns between groups (g_idx), which no engine reads; use static"
            )
        fields["order"] = _ORDERS.get(str(order), order)
    for other in _OF_THE_SPEC:
        if other in fields:
            raise ConfigError(
                f"GPTQConfig has no {other}: how weights are quantized is said by the spec. For both in one object, "
                "for run_gptq_for_sequential_layers, use SequentialGPTQConfig"
            )
    if fields.pop("static_groups", True) is False and fields.get("order", "activation") != "none":
        raise ConfigError("static_groups=False moves columns between groups (g_idx), which no engine reads any more")
    if fields.pop("true_sequential", True) is False:
        raise ConfigError("true_sequential=False is not offered: calibration here is always true-sequential")
    for theirs in ("inside_layer_modules", "model_decoder_layers", "embedding_layers"):
        fields.pop(theirs, None)  # found in the architecture
    return fields


@config_class
class GPTQConfig(CodeConfig):
    """GPTQ (Frantar et al. 2022): columns one after another, the error of each moved into those still to come."""

    name: Literal["gptq"] = "gptq"
    damping: Annotated[float, Field(gt=0, lt=1)] = 0.01
    """Added to H's diagonal, as a share of its mean; raised tenfold while H cannot be factored."""
    order: Literal["activation", "none", "group-aware"] = "activation"
    """Order in which columns get their codes. activation: by falling diag(H); groups stay where they are (no g_idx).
    group-aware: groups by their mean diag(H), columns by diag(H) inside a group. none: left to right."""
    block_size: Annotated[int, Field(gt=0)] = 128
    """Columns per lazy update: speed only, the result does not depend on it but for rounding."""
    drift: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Share of the inputs' drift that the weights make up for: the inputs come from quantized layers and are not what
    they would be in the full-precision model. 0.5 is much more accurate, but the full-precision forward then runs
    beside the quantized one, which takes 1.6 to 1.9 times as long. 0 turns it off."""
    drift_data: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Share of the calibration batches on which the drift is measured; less is faster."""
    refits: Annotated[int, Field(ge=0, le=10)] = 1
    """How often the codes are found again after the scales were fitted to them (observer "search" only)."""

    compensates: ClassVar[bool] = True
    translate: ClassVar[Callable[[dict[str, Any]], dict[str, Any]]] = staticmethod(_translate_gptq)

    @property
    def needs(self) -> Needs:
        return Needs(moment=True, reference=self.drift_data if self.drift else 0.0)


def _translate_search(fields: dict[str, Any]) -> dict[str, Any]:
    fields = _renamed(fields, {"duo_scaling": "duo_scale", "smoothing_strength": "alpha"})
    for other in _OF_THE_SPEC:
        if other in fields:
            raise ConfigError(
                f"the search has no {other}: how linears are quantized is said by the spec. For both in one object, "
                "for run_smooth_quant_for_sequential_layers, use SequentialSmoothQuantConfig"
            )
    for theirs in ("model_decoder_layers", "embedding_layers"):
        fields.pop(theirs, None)  # found in the architecture
    if fields.get("name") == _QUARK_SMOOTH:
        fields["name"] = "smoothquant"
    if fields.get("scaling_layers") in ([], ()):  # Quark's "find them"
        del fields["scaling_layers"]
    return fields


@config_class
class ScaleSearchConfig(AlgorithmConfig):
    """Options of a search for channel scales before linears that share an input."""

    name: str
    alpha: Annotated[float, Field(ge=0, le=1)] | None = None
    """Exponent of the activations in s = x^alpha / w^(1 − alpha); None searches it."""
    duo_scale: bool | Literal["both"] = "both"
    """Whether the weights take part (w's exponent 1 − alpha) or not (0); "both" tries either."""
    n_grid: Annotated[int, Field(ge=2, le=100)] = 10
    """Values of alpha that are tried between 0 and 1."""
    scale_clamp_min: Annotated[float, Field(gt=0)] = 1e-4
    """No channel is scaled by less, nor by more than the inverse."""
    sample_tokens: Annotated[int, Field(gt=0)] = 512
    """Tokens of a quantized input that are kept to measure its error on."""
    scaling_layers: tuple[ScalingLayer, ...] | None = None
    """Which layer before which linears is scaled; None takes what the architecture says."""

    level = "channel scales"
    counts_inputs: ClassVar[bool] = False
    """Whether the error of quantized inputs is counted beside that of the weights."""
    translate: ClassVar[Callable[[dict[str, Any]], dict[str, Any]]] = staticmethod(_translate_search)

    @property
    def needs(self) -> Needs:
        return Needs(moment=True, sample=self.sample_tokens)

    @property
    def clips(self) -> bool:
        """Whether weights are clipped after they are scaled."""
        return bool(getattr(self, "clip", False))


@config_class
class AWQConfig(ScaleSearchConfig):
    """Channel scales by the weights' quantization error (Lin et al. 2023, arXiv:2306.00978). Of a quantized input's
    error it only takes care that scales do not cost it more than the weights gain."""

    name: Literal["awq"] = "awq"
    clip: bool = False
    """Also search the range of each group by the same loss, before codes are found. (The observer "search" of a spec
    and GPTQ do that anyway.)"""


@config_class
class SmoothQuantConfig(ScaleSearchConfig):
    """Channel scales by the error of weights and activations (Xiao et al. 2022, arXiv:2211.10438)."""

    name: Literal["smoothquant"] = "smoothquant"
    duo_scale: bool | Literal["both"] = True
    """As for AWQ."""
    scale_clamp_min: Annotated[float, Field(gt=0)] = 1e-3
    """No channel is scaled by less, nor by more than the inverse."""

    counts_inputs: ClassVar[bool] = True


ALGORITHMS: dict[str, type[Any]] = {
    config.name: config for config in (RTNConfig, GPTQConfig, AWQConfig, SmoothQuantConfig)
}
"""Classes of options by the algorithm's name."""


def algorithm_configs(value: Any) -> tuple[AlgorithmConfig, ...]:
    """Algorithms from a name, names joined by "+" ("awq+gptq"), with options ("gptq:drift=0.5", or {name: gptq,
    drift: 0.5}), a config object, or a list of these. Levels follow each other as they must, methods of one level as
    they are given; without a method for codes they are rounded to nearest."""
    parts = value if isinstance(value, list | tuple) else value.split("+") if isinstance(value, str) else [value]
    found = tuple(_algorithm(part) for part in parts if part is not None)
    codes, names = sum(config.level == "codes" for config in found), ", ".join(config.name for config in found)
    if codes > 1:
        raise ConfigError(f"algorithms {names}: only one can find the codes")
    if len(set(found)) < len(found):
        raise ConfigError(f"algorithms {names}: one is listed twice; leave it out")
    order = ("model", "channel scales", "codes", "block")
    return tuple(sorted(found if codes else (*found, RTNConfig()), key=lambda config: order.index(config.level)))


def _algorithm(value: Any) -> AlgorithmConfig:
    if isinstance(value, AlgorithmConfig):
        return value
    if not isinstance(value, str | Mapping):
        raise ConfigError(f"algorithm must be a name or a table of fields, not {shown(value)}")
    options: dict[str, Any] = _written_out(value) if isinstance(value, str) else dict(value)
    name = options.get("name")
    if name == _QUARK_SMOOTH:
        name = options["name"] = "smoothquant"
    if not isinstance(name, str) or name not in ALGORITHMS:
        raise ConfigError(f"unknown algorithm {shown(name)}{nearest(name, ALGORITHMS)}")
    config: AlgorithmConfig = ALGORITHMS[name](**table(options, f"algorithm {name}"))
    return config


def _written_out(text: str) -> dict[str, Any]:
    """Fields of an algorithm written in one word: "gptq", "gptq:drift=0.5,damping=0.02"."""
    name, colon, rest = text.partition(":")
    fields: dict[str, Any] = {"name": name}
    for part in rest.split(",") if colon else ():
        key, equals, value = part.partition("=")
        if not equals or not key.strip():
            raise ConfigError(f"algorithm {shown(text)}: options are written as gptq:drift=0.5,damping=0.02")
        if key.strip() in fields:
            raise ConfigError(f"algorithm {shown(text)} gives {key.strip()} twice; leave one out")
        fields[key.strip()] = parse_yaml(value, f"option {key.strip()} of algorithm {name}")
    return fields

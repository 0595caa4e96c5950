"""The whole recipe as one object: the same from Python, from YAML and from the command line."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, TypedDict

import yaml
from pydantic import Field, InstanceOf

from fewbit.config import quark
from fewbit.config.algorithms import AlgorithmConfig, CodeConfig, GPTQConfig, ScaleSearchConfig, algorithm_configs
from fewbit.config.schemes import parse_scheme, scheme_config, takes_group_size, with_group_size
from fewbit.config.spec import AttentionConfig, QuantizationConfig, QuantizationSpec
from fewbit.config.validation import config_class, table
from fewbit.config.yaml_text import read_yaml
from fewbit.errors import ConfigError, shown


class ShortForms(TypedDict, total=False):
    """What plain data may give instead of a Config's own fields. `fewbit.quantize` and the command line take the same,
    and `num_samples`, `sequence_length` and `seed`."""

    scheme: str
    """Named scheme, e.g. W4A16; see 'fewbit schemes'."""
    group_size: int
    """Weights that share a scale (default 128); -1: one scale per output channel."""
    algorithm: str | AlgorithmConfig | Sequence[str | AlgorithmConfig]
    """gptq (default), rtn, awq, smoothquant; joined by +, options after a colon: awq+gptq:drift=0.5"""


@config_class
class CalibrationConfig:
    """How much of the calibration text is used."""

    num_samples: Annotated[int, Field(gt=0, lt=2**31)] = 128
    """Calibration sequences."""
    sequence_length: Annotated[int, Field(gt=1, lt=2**31)] = 2048
    """Tokens per sequence; short texts are packed together, none is dropped."""
    quantized_activations: bool = True
    """Whether linears are calibrated on inputs that are quantized as the engine will quantize them. Static scales are
    found either way."""


def _written_out(given: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of a Config for those, Quark's and ShortForms, with configs for schemes' names and for None.

    Groups get `group_size` in the global config and in schemes by name; a layer's spec written out has its own.
    """
    fields = dict(given)
    group_size = fields.pop("group_size", None)
    if not isinstance(group_size, int | None) or isinstance(group_size, bool):
        raise ConfigError(f"group_size must be a whole number, not {shown(group_size)}")
    for short, field in (("scheme", "global_quant_config"), ("algorithm", "algo_config")):
        if short in fields:
            if field in fields:
                raise ConfigError(f"a recipe gives either {short} or {field}, not both")
            fields[field] = fields.pop(short)
    fields = quark.translate_recipe(fields)
    whole = fields.get("global_quant_config")
    if isinstance(whole, str) and (cache := parse_scheme(whole)[1]) is not None:
        if fields.get("attention") is not None:
            raise ConfigError("a recipe names the KV cache either in the scheme or in attention, not in both")
        fields["attention"] = cache
    if whole is not None:
        fields["global_quant_config"] = whole = _sized(whole, group_size)
    sized: list[Any] = [whole]
    for name in ("layer_type_quant_config", "layer_quant_config"):
        if name in fields:
            rules = fields[name] = table(fields[name], name)
            for key, value in rules.items():
                if isinstance(value, str):
                    scheme_config(value)  # refuses one that names a KV cache
                    sized.append(_sized(value, group_size))
                    rules[key] = sized[-1]
                elif value is None:
                    rules[key] = QuantizationConfig()
    if group_size is not None and whole is None:
        raise ConfigError("group_size needs a scheme or a global_quant_config by its name")
    if group_size is not None and isinstance(whole, QuantizationConfig) and not any(map(takes_group_size, sized)):
        with_group_size(whole, group_size)  # says why it has none
    if isinstance(fields.get("exclude"), str):
        fields["exclude"] = (fields["exclude"],)
    if "algo_config" in fields:
        fields["algo_config"] = algorithm_configs(fields["algo_config"])
    return fields


@config_class
class Config:
    """What is done to the whole model. Wherever it takes a QuantizationConfig, it takes a scheme's name or a table."""

    global_quant_config: QuantizationConfig
    """Applies to every linear of the repeating blocks that no other rule names."""
    layer_type_quant_config: dict[str, QuantizationConfig] = dataclasses.field(default_factory=dict)
    """By class name, e.g. {"Linear": …}."""
    layer_quant_config: dict[str, QuantizationConfig] = dataclasses.field(default_factory=dict)
    """By module name, wildcard or "re:" pattern; an exact name goes first, then patterns in order."""
    exclude: tuple[str, ...] = ()
    """Names, wildcards or "re:" patterns of modules that stay as they are."""
    algo_config: tuple[InstanceOf[AlgorithmConfig], ...] = (GPTQConfig(),)
    """How channel scales (awq, smoothquant) and codes (rtn, gptq) are found, in this order."""
    attention: AttentionConfig | None = None
    """What is quantized inside attention: the KV cache, the query, the probabilities."""
    calibration: CalibrationConfig = dataclasses.field(default_factory=CalibrationConfig)
    seed: Annotated[int, Field(ge=-(2**63), lt=2**64)] = 0
    """Chooses the calibration sequences; the same recipe, model and text give the same bytes."""

    translate: ClassVar[Callable[[dict[str, Any]], dict[str, Any]]] = staticmethod(_written_out)
    also_known: ClassVar[tuple[str, ...]] = tuple(ShortForms.__annotations__)

    def __post_init__(self) -> None:
        rules = [*self.layer_type_quant_config.items(), *self.layer_quant_config.items()]
        configs: list[tuple[str, Any]] = [("global_quant_config", self.global_quant_config), *rules]
        if self.attention is not None:
            configs.append(("attention", self.attention))
        for name, config in configs:
            for field in dataclasses.fields(config):
                _check_stored(f"{name} {field.name}", getattr(config, field.name))

    @property
    def codes(self) -> CodeConfig:
        """The algorithm that finds codes."""
        return next(config for config in self.algo_config if isinstance(config, CodeConfig))

    def at(self, level: str) -> tuple[AlgorithmConfig, ...]:
        """The algorithms of a level, in order."""
        return tuple(config for config in self.algo_config if config.level == level)

    @property
    def scale_searches(self) -> tuple[ScaleSearchConfig, ...]:
        """The algorithms that search channel scales, in order."""
        return tuple(config for config in self.algo_config if isinstance(config, ScaleSearchConfig))

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Config:
        """Build a Config from plain data (YAML, JSON): its fields and ShortForms."""
        fields = table(data, "a recipe")
        if fields.get("scheme") is None and fields.get("global_quant_config") is None:
            cls(**{name: fields[name] for name in fields if name != "scheme"} | {"global_quant_config": {}})
            raise ConfigError("a recipe needs a scheme (scheme: W4A16) or a global_quant_config")
        return cls(**fields)

    @classmethod
    def from_yaml(cls, path: str | Path) -> Config:
        """Read a recipe file."""
        return cls.from_dict(cls.read_yaml(path))

    @staticmethod
    def read_yaml(path: str | Path) -> dict[str, Any]:
        """A recipe file as plain data, short forms and all."""
        return table(read_yaml(Path(path)), f"recipe {path}")

    def to_dict(self) -> dict[str, Any]:
        """Plain data; `Config.from_dict(config.to_dict()) == config`."""
        plain: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(self)))
        return plain

    def to_yaml(self) -> str:
        """The recipe as a YAML text that `from_yaml` reads back."""
        return yaml.safe_dump(self.to_dict(), sort_keys=False)


def merge_recipe(recipe: Config | Mapping[str, Any] | None, **given: Any) -> Config:
    """A recipe overridden by those of ShortForms, `num_samples`, `sequence_length` and `seed` that are not None."""
    data = dict(recipe.to_dict() if isinstance(recipe, Config) else recipe or {})
    given = {name: value for name, value in given.items() if value is not None}
    lengths = {name: given.pop(name) for name in ("num_samples", "sequence_length") if name in given}
    if lengths:
        data["calibration"] = dict(data.get("calibration") or {}) | lengths
    if "scheme" in given:
        data.pop("global_quant_config", None)
        if parse_scheme(given["scheme"])[1] is not None:
            data.pop("attention", None)  # the scheme names its own KV cache
    if "algorithm" in given:
        before = data.pop("algo_config", None) or data.get("algorithm")
        named = isinstance(given["algorithm"], str) and ":" not in given["algorithm"]
        if named and before is not None and _names(before) == _names(given["algorithm"]):
            given["algorithm"] = before  # bare names of the algorithms that the recipe has keep their options
    return Config.from_dict(data | given)


def _names(algorithms: Any) -> list[str]:
    return [config.name for config in algorithm_configs(algorithms)]


def _check_stored(what: str, spec: QuantizationSpec | None) -> None:
    """ConfigError, which names `what`, for a spec whose codes nothing can store."""
    if spec is not None:
        spec.check_stored(what)
        _check_stored(f"{what} first_stage", spec.first_stage)


def _sized(value: Any, group_size: int | None) -> Any:
    """The config that a scheme's name stands for, or `value`, with groups of that size if it may have some."""
    if isinstance(value, str):
        config = parse_scheme(value)[0]
        return parse_scheme(value, group_size)[0] if group_size is not None and takes_group_size(config) else config
    if group_size is None or not isinstance(value, Mapping | QuantizationConfig):
        return value
    config = QuantizationConfig(**table(value, "a config")) if isinstance(value, Mapping) else value
    return with_group_size(config, group_size) if takes_group_size(config) else config

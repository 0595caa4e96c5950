"""The whole recipe as one object: the same from Python, from YAML and from the command line."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar

import yaml
from pydantic import Field

from fewbit.config import quark
from fewbit.config.algorithms import (
    AlgorithmConfig,
    CodeConfig,
    GPTQConfig,
    ScaleSearchConfig,
    algorithm_configs,
)
from fewbit.config.schemes import parse_scheme, scheme_config, takes_group_size, with_group_size
from fewbit.config.spec import AttentionConfig, QuantizationConfig, QuantizationSpec
from fewbit.config.validation import config_class
from fewbit.config.yaml_text import read_yaml
from fewbit.errors import ConfigError, nearest, shown


@config_class
class CalibrationConfig:
    """How much of the calibration text is used."""

    num_samples: Annotated[int, Field(gt=0, lt=2**31)] = 128
    """Sequences."""
    sequence_length: Annotated[int, Field(gt=1, lt=2**31)] = 2048
    """Tokens per sequence; short texts are packed together, none is dropped."""
    quantized_activations: bool = True
    """Whether linears are calibrated on inputs that are quantized as the engine will quantize them. Static scales are
    found either way."""


def _translate_config(fields: dict[str, Any]) -> dict[str, Any]:
    """Quark's names: one algorithm or None for the list, `quant_mode`, fields without a meaning here."""
    fields = quark.translate_recipe(fields)
    if isinstance(fields.get("exclude"), str):
        fields["exclude"] = (fields["exclude"],)
    for table in ("layer_quant_config", "layer_type_quant_config"):
        if isinstance(fields.get(table), Mapping):  # None: leave these layers as they are
            entries = fields[table].items()
            fields[table] = {key: QuantizationConfig() if value is None else value for key, value in entries}
    if isinstance(fields.get("layer_type_quant_config"), Mapping):
        by_type = fields["layer_type_quant_config"]
        fields["layer_type_quant_config"] = {
            key.__name__ if isinstance(key, type) else key: value for key, value in by_type.items()
        }
    if "algo_config" in fields:
        given = fields["algo_config"]
        fields["algo_config"] = algorithm_configs([] if given is None else given)
    return fields


@config_class
class Config:
    """What is done to the whole model."""

    global_quant_config: QuantizationConfig
    """Applies to every linear of the repeating blocks that no other rule names."""
    layer_type_quant_config: dict[str, QuantizationConfig] = dataclasses.field(default_factory=dict)
    """By class name, e.g. {"Linear": …}."""
    layer_quant_config: dict[str, QuantizationConfig] = dataclasses.field(default_factory=dict)
    """By module name, wildcard or "re:" pattern; an exact name goes first, then patterns in order."""
    exclude: tuple[str, ...] = ()
    """Names, wildcards or "re:" patterns of modules that stay as they are."""
    algo_config: tuple[AlgorithmConfig, ...] = (GPTQConfig(),)
    """How scales of channels (awq, smoothquant) and codes (rtn, gptq) are found, in this order."""
    attention: AttentionConfig | None = None
    """What is quantized inside attention: the KV cache, the query, the probabilities."""
    calibration: CalibrationConfig = dataclasses.field(default_factory=CalibrationConfig)
    seed: Annotated[int, Field(ge=-(2**63), lt=2**64)] = 0
    """Chooses the calibration sequences. Same recipe, model and text: same bytes."""

    translate: ClassVar[Callable[[dict[str, Any]], dict[str, Any]]] = staticmethod(_translate_config)

    def __post_init__(self) -> None:
        configs = {"global_quant_config": self.global_quant_config, **self.layer_type_quant_config}
        for name, config in {**configs, **self.layer_quant_config}.items():
            for field in dataclasses.fields(config):
                _check_stored(f"{name} {field.name}", getattr(config, field.name))
        if self.attention is not None:
            for slot, spec in self.attention.specs.items():
                _check_stored(f"attention {slot}", spec)

    @property
    def codes(self) -> CodeConfig:
        """The algorithm that finds codes."""
        return next(config for config in self.algo_config if isinstance(config, CodeConfig))

    @property
    def scale_search(self) -> ScaleSearchConfig | None:
        """The algorithm that searches scales of channels, if there is one."""
        return next((config for config in self.algo_config if isinstance(config, ScaleSearchConfig)), None)

    SHORTHANDS: ClassVar[tuple[str, ...]] = ("scheme", "group_size", "algorithm")

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Config:
        """Build a Config from plain data (YAML, JSON). Besides the fields it takes the shorthands of the CLI:
        `scheme: W4A16`, `group_size: 64`, `algorithm: gptq`; a scheme's name may stand for any QuantizationConfig.
        """
        values = quark.translate_recipe(data)
        known = [field.name for field in dataclasses.fields(cls)] + list(cls.SHORTHANDS)
        for name in values:
            if name not in known:
                raise ConfigError(f"a recipe has no field {shown(name)}{nearest(name, known)}")
        group_size = values.pop("group_size", None)
        if group_size is not None and (not isinstance(group_size, int) or isinstance(group_size, bool)):
            raise ConfigError(f"group_size must be a whole number, not {shown(group_size)}")
        if "scheme" in values:
            if "global_quant_config" in values:
                raise ConfigError("a recipe gives either scheme or global_quant_config, not both")
            values["global_quant_config"] = values.pop("scheme")
        if "algorithm" in values:
            if "algo_config" in values:
                raise ConfigError("a recipe gives either algorithm or algo_config, not both")
            values["algo_config"] = values.pop("algorithm")
        if values.get("global_quant_config") is None:
            raise ConfigError("a recipe needs a scheme (scheme: W4A16) or a global_quant_config")
        if isinstance(values["global_quant_config"], str):
            suite = parse_scheme(values["global_quant_config"])[1]
            if suite is not None:
                if values.get("attention") is not None:
                    raise ConfigError("a recipe names the KV cache either in the scheme or in attention, not in both")
                values["attention"] = suite
        values["global_quant_config"], sized = _sized(values["global_quant_config"], group_size)
        for field in ("layer_type_quant_config", "layer_quant_config"):
            if field in values:
                made = {key: _of_layers(value, group_size) for key, value in _mapping(values[field], field).items()}
                values[field] = {key: config for key, (config, _) in made.items()}
                sized = sized or any(reached for _, reached in made.values())
        if group_size is not None and not sized:
            with_group_size(values["global_quant_config"], group_size)  # says why it has none
        if "exclude" in values:
            exclude = values["exclude"]
            if not isinstance(exclude, str | list | tuple):
                raise ConfigError(f"exclude must be a pattern or a list of patterns, not {shown(exclude)}")
            values["exclude"] = (exclude,) if isinstance(exclude, str) else tuple(exclude)
        if "algo_config" in values:
            values["algo_config"] = algorithm_configs(values["algo_config"])
        if isinstance(values.get("attention"), Mapping):
            slots = _mapping(values["attention"], "attention")
            values["attention"] = AttentionConfig(**_with_specs(slots, slots, "attention."))
        if "calibration" in values:
            values["calibration"] = CalibrationConfig(**_mapping(values["calibration"], "calibration"))
        return cls(**values)

    @classmethod
    def from_yaml(cls, path: str | Path) -> Config:
        """Read a recipe file."""
        return cls.from_dict(cls.read_yaml(path))

    @staticmethod
    def read_yaml(path: str | Path) -> dict[str, Any]:
        """A recipe file as plain data, shorthands and all."""
        return _mapping(read_yaml(Path(path)), f"recipe {path}")

    def to_dict(self) -> dict[str, Any]:
        """Plain data; `Config.from_dict(config.to_dict()) == config`."""
        plain: dict[str, Any] = _plain(dataclasses.asdict(self))
        return plain

    def to_yaml(self) -> str:
        """The recipe as a YAML text that `from_yaml` reads back."""
        return yaml.safe_dump(self.to_dict(), sort_keys=False)


def _check_stored(what: str, spec: QuantizationSpec | None) -> None:
    """ConfigError, which names `what`, for a spec whose codes nothing can store."""
    if spec is not None:
        spec.check_stored(what)
        _check_stored(f"{what} first_stage", spec.first_stage)


def _sized(value: Any, group_size: int | None) -> tuple[QuantizationConfig, bool]:
    """The config that a scheme's name or plain data stands for, with groups of that size if it has groups; whether it
    has."""
    if isinstance(value, str):
        config = parse_scheme(value)[0]
        if group_size is not None and takes_group_size(config):
            return parse_scheme(value, group_size)[0], True
        return config, False
    config = value if isinstance(value, QuantizationConfig) else _quantization_config(value)
    if group_size is None or not takes_group_size(config):
        return config, False
    return with_group_size(config, group_size), True


def _of_layers(value: Any, group_size: int | None) -> tuple[QuantizationConfig, bool]:
    """The same for a rule of some layers, where None means as they are. The size is for schemes by name: whoever
    writes a spec out says its own."""
    if isinstance(value, str):
        scheme_config(value)  # refuses one that names a KV cache
        return _sized(value, group_size)
    return _sized({} if value is None else value, None)


def _quantization_config(value: Any) -> QuantizationConfig:
    options = _mapping(value, "a quantization config")
    return QuantizationConfig(**_with_specs(options, ("weight", "input_tensors", "output_tensors", "bias")))


def _with_specs(fields: dict[str, Any], names: Collection[str], prefix: str = "") -> dict[str, Any]:
    """`fields` with specs for the tables of those names."""
    return {
        name: QuantizationSpec(**_mapping(value, prefix + name))
        if name in names and isinstance(value, Mapping)
        else value
        for name, value in fields.items()
    }


def _plain(value: Any) -> Any:
    """Tuples as lists, as YAML and JSON have them."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


def _mapping(value: Any, what: str) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise ConfigError(f"{what} must be a table of fields, not {shown(value)}")
    for key in value:
        if not isinstance(key, str):
            raise ConfigError(f"{what} has no field {shown(key)}: names are text")
    return dict(value)

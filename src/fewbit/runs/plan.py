"""What will be done to which linear, decided and checked before any work starts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property

from fewbit.config.matching import resolve
from fewbit.config.recipe import Config
from fewbit.config.spec import AttentionConfig, QuantizationConfig, QuantizationSpec
from fewbit.errors import ConfigError
from fewbit.models.architecture import Groups
from fewbit.models.blockwise import BlockwiseModel
from fewbit.models.stored import unexpected
from fewbit.models.untouched import Untouched, sentence, untouched
from fewbit.nn import attention


@dataclass(frozen=True)
class LinearPlan:
    """One linear: its spec if it is quantized, otherwise why not."""

    name: str
    shape: tuple[int, int]
    config: QuantizationConfig | None
    """What is quantized of it; None if nothing is."""
    rule: str
    """The matching rule that decided, or the reason for which a linear cannot be quantized."""

    @property
    def spec(self) -> QuantizationSpec | None:
        """Of the weight."""
        return self.config.weight if self.config is not None else None

    @property
    def status(self) -> str:
        if self.config is not None:
            return "quantized"
        return "excluded" if self.rule.startswith("exclude") else "skipped"


@dataclass(frozen=True)
class Plan:
    """Every linear of the model, and the groups of each block that have something to quantize."""

    linears: dict[str, LinearPlan]
    block_groups: list[Groups]
    """Per block: of each of the model's groups, in the same order, the linears whose weights are quantized (by their
    names inside the block); empty where none is."""
    warnings: list[str]
    attention: AttentionConfig | None = None
    attention_classes: Mapping[str, str] = field(default_factory=dict)
    """Class of every attention module in which something is quantized, by the module's name."""
    untouched: tuple[Untouched, ...] = ()
    """Tensors that are no linears and stay as they are."""

    @property
    def unquantized(self) -> list[str]:
        """Names of the linears that stay as they are."""
        return [linear.name for linear in self.linears.values() if linear.config is None]

    @property
    def weights(self) -> dict[str, QuantizationSpec]:
        """Spec of every weight that is quantized, by the weight's name."""
        return {f"{name}.weight": linear.spec for name, linear in self.linears.items() if linear.spec is not None}

    @property
    def shapes(self) -> dict[str, tuple[int, int]]:
        """[out, in] of every weight that is quantized, by the weight's name."""
        return {f"{name}.weight": linear.shape for name, linear in self.linears.items() if linear.spec is not None}

    @cached_property
    def activations(self) -> dict[str, QuantizationSpec]:
        """Spec of every activation that is quantized, by module and slot: MODULE.input, ATTENTION_MODULE.key …"""
        found: dict[str, QuantizationSpec] = {}
        for name, linear in self.linears.items():
            if linear.config is not None:
                slots = {"input": linear.config.input_tensors, "output": linear.config.output_tensors}
                found |= {f"{name}.{slot}": spec for slot, spec in slots.items() if spec is not None}
        inside = self.attention.specs if self.attention is not None else {}
        for name in self.attention_classes:
            found |= {f"{name}.{slot}": spec for slot, spec in inside.items() if spec is not None}
        return found

    @property
    def needs_data(self) -> bool:
        """Whether a static scale has to be found, whatever the algorithm."""
        return any(spec.needs_data for spec in self.activations.values())

    def spec(self, name: str) -> QuantizationSpec:
        spec = self.linears[name].spec
        assert spec is not None
        return spec


def make_plan(model: BlockwiseModel, config: Config) -> Plan:
    """Match the recipe against the model. ConfigError for what cannot be honoured, before anything is written."""
    modules = model.linears()
    found = resolve(config, {name: type(module).__name__ for name, module in modules.items()})
    grouped = {name for group in model.full_groups() for name in group}
    linears = {}
    for name, match in found.items():
        shape = (modules[name].out_features, modules[name].in_features)
        wanted = match.config if match.config is not None and match.config.quantizes else None
        rule = match.rule
        if name not in grouped and wanted is not None:
            if match.rule not in ("global",) and not match.rule.startswith("type"):
                raise ConfigError(
                    f"{name!r} cannot be quantized: it is in no group of the model's blocks ({match.rule})"
                )
            wanted, rule = None, "outside the blocks' groups"
        if wanted is not None and wanted.bias is not None and wanted.weight is None:
            raise ConfigError(f"bias of {name!r} is quantized with its weight only; give weight a spec, too ({rule})")
        linears[name] = LinearPlan(name, shape, wanted, rule)
    _check_divides(linears)
    if not any(linear.config for linear in linears.values()) and config.attention is None:
        raise ConfigError("the recipe quantizes nothing: every linear is excluded or has no spec")
    search = config.scale_search
    if search is not None and not any(linear.spec for linear in linears.values()):
        raise ConfigError(
            f"algorithm {search.name}: scales are searched before linears whose weights are quantized, which none is; "
            "give weights a spec, or leave it out"
        )
    groups = [_to_quantize(model, index, linears) for index in range(len(model))]
    warnings = _unlike_specs(model, linears) + _cut_blocks(model, linears) + _not_of_the_model(model)
    left = tuple(untouched(model.skeleton, linears))
    if left:
        warnings.append(sentence(left))
    inside: dict[str, str] = {}
    if config.attention is not None:
        attached, _ = attention.attaching(model.skeleton, config.attention)  # an error if it cannot be done
        inside = {name: type(model.skeleton.get_submodule(name)).__name__ for name in attached}
    return Plan(linears, groups, warnings, config.attention, inside, left)


def _check_divides(linears: dict[str, LinearPlan]) -> None:
    """ConfigError for the first group that does not divide, with a group size that fits all linears."""
    planned = [linear for linear in linears.values() if linear.config is not None]
    inputs = [linear.shape[1] for linear in planned]
    for linear in planned:
        for group, channels, which, is_free in _grouped(linear):
            if channels % group:
                fitting = [g for g in (256, 128, 64, 32, 16) if all(size % g == 0 for size in inputs)]
                advice = f"use --group-size {fitting[0]}" if fitting else "use --group-size -1 (one scale per channel)"
                raise ConfigError(
                    f"group size {group} does not divide the {channels} {which} of {linear.name!r}; "
                    f"{advice if is_free else 'exclude that layer'}, or give it its own spec"
                )


def _grouped(linear: LinearPlan) -> Iterator[tuple[int, int, str, bool]]:
    """Group sizes of a linear's tensors, the number of channels that each must divide, which these are, and whether
    --group-size can change it: activations and formats have their own."""
    config = linear.config
    assert config is not None
    inputs, outputs = (linear.shape[1], "inputs"), (linear.shape[0], "outputs")
    first = config.weight.first_stage if config.weight is not None else None
    tensors = (
        (config.weight, outputs if _runs_along_rows(config.weight) else inputs),
        (first, outputs if _runs_along_rows(first) else inputs),
        (config.input_tensors, inputs),
        (config.output_tensors, outputs),
        (config.bias, outputs),
    )
    for spec, (channels, which) in tensors:
        if spec is not None and spec.group_size is not None:
            size = spec.group_size if _runs_along_rows(spec) else spec.tiling.span
            yield size, channels, which, spec is config.weight and spec.scale_type == "float"


def _runs_along_rows(spec: QuantizationSpec | None) -> bool:
    return spec is not None and spec.ch_axis in (0, -2)


def _to_quantize(model: BlockwiseModel, index: int, linears: dict[str, LinearPlan]) -> Groups:
    prefix = model.prefix(index)
    return tuple(tuple(name for name in group if linears[prefix + name].spec is not None) for group in model.groups)


def _not_of_the_model(model: BlockwiseModel) -> list[str]:
    """Stored tensors that no module of the model has."""
    unknown = unexpected(model.skeleton, model.source.info())
    if not unknown:
        return []
    return [
        f"{len(unknown)} stored tensors are not part of {model.architecture.name} and are left out "
        f"(first: {unknown[0]})"
    ]


def _unlike_specs(model: BlockwiseModel, linears: dict[str, LinearPlan]) -> list[str]:
    """Engines fuse linears that share an input into one matrix, which works only if they are quantized alike."""
    mixed = []
    for index in range(len(model)):
        prefix = model.prefix(index)
        for group in model.groups:
            if len({linears[prefix + name].config for name in group}) > 1:
                mixed.append(f"{prefix}{{{', '.join(group)}}}")
    if not mixed:
        return []
    return [
        f"{len(mixed)} groups of linears that engines fuse have unlike specs (first: {mixed[0]}); "
        "vLLM will refuse them"
    ]


def _cut_blocks(model: BlockwiseModel, linears: dict[str, LinearPlan]) -> list[str]:
    """Engines fuse linears that share an input, whose blocks of rows must then end where the linears do."""
    for name in (
        prefix + name for prefix in map(model.prefix, range(len(model))) for g in model.groups for name in g[:-1]
    ):
        spec = linears[name].spec
        if spec is not None and spec.block_size is not None and linears[name].shape[0] % spec.block_size[0]:
            return [
                f"blocks of {spec.block_size[0]} rows do not divide the {linears[name].shape[0]} of {name}, which "
                "engines fuse with others; the run can be evaluated, but not exported"
            ]
    return []

"""What will be done to which linear, decided and checked before any work starts."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import groupby

from fewbit.config.matching import resolve
from fewbit.config.recipe import Config
from fewbit.config.spec import AttentionConfig, QuantizationConfig, QuantizationSpec
from fewbit.contents import AttentionEntry, Contents, LinearEntry
from fewbit.errors import ConfigError
from fewbit.models.architecture import Groups
from fewbit.models.blockwise import BlockwiseModel
from fewbit.models.stored import aliases, unexpected
from fewbit.models.untouched import Untouched, sentence, untouched
from fewbit.nn import attention
from fewbit.nn.linear import Linear


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
    contents: Contents
    warnings: list[str]
    attention: AttentionConfig | None = None
    untouched: tuple[Untouched, ...] = ()
    """Tensors that are no linears and stay as they are."""

    @property
    def weights(self) -> dict[str, QuantizationSpec]:
        """Spec of every weight that is quantized, by the weight's name."""
        return {f"{name}.weight": linear.spec for name, linear in self.linears.items() if linear.spec is not None}

    @property
    def activations(self) -> Mapping[str, QuantizationSpec]:
        """Spec of every activation that is quantized, by module and slot."""
        return self.contents.activations

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
    left = tuple(untouched(model.skeleton, linears))
    inside = _attention(model, config.attention)
    contents = _contents(model, linears, inside, left)
    warnings = _unlike_specs(contents, linears) + _cut_blocks(contents) + _not_of_the_model(model)
    if left:
        warnings.append(sentence(left))
    return Plan(linears, groups, contents, warnings, config.attention, left)


def _contents(
    model: BlockwiseModel,
    linears: Mapping[str, LinearPlan],
    inside: Mapping[str, AttentionEntry],
    left: Iterable[Untouched],
) -> Contents:
    """What will be in the run."""
    quantized = {}
    for index in range(len(model)):
        prefix = model.prefix(index)
        for name in (name for group in model.groups for name in group):
            config = linears[prefix + name].config
            if config is not None:
                quantized[prefix + name] = LinearEntry(
                    prefix + name,
                    linears[prefix + name].shape,
                    config.weight,
                    config.input_tensors,
                    config.output_tensors,
                    name,
                    index,
                    routed=".experts." in name,
                )
    return Contents(
        quantized,
        inside,
        tuple(_siblings(model.full_groups())),
        tuple(name for name, linear in linears.items() if linear.config is None),
        {tensor.name: tensor.shape for tensor in left},
        aliases(model.skeleton, model.source.info()),
        model.architecture.name,
        str(model.config.model_type),
        model.architecture.blocks,
    )


def _siblings(groups: Groups) -> Iterator[tuple[str, ...]]:
    """What engines fuse: of the linears that share an input those that lie in one module."""
    for group in groups:
        for _, members in groupby(sorted(group, key=_owner), key=_owner):
            found = tuple(members)
            if len(found) > 1:
                yield found


def _owner(name: str) -> str:
    """The module that a module lies in."""
    return name.rpartition(".")[0]


def _attention(model: BlockwiseModel, config: AttentionConfig | None) -> dict[str, AttentionEntry]:
    """All attention modules: those that can be reached, and those with linears of their own that cannot. An error if
    `config` cannot be honoured."""
    reached = set(attention.attention_modules(model.skeleton))
    if config is not None:
        reached = set(attention.check(model.skeleton, config))
    specs = {slot: spec for slot, spec in (config.specs if config else {}).items() if spec is not None}
    return {
        name: AttentionEntry(name, type(module).__name__, specs if name in reached else {})
        for name, module in model.skeleton.named_modules()
        if name in reached
        or ("attention" in type(module).__name__.lower() and any(isinstance(m, Linear) for m in module.children()))
    }


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


def _unlike_specs(contents: Contents, linears: Mapping[str, LinearPlan]) -> list[str]:
    """Engines fuse linears that share an input into one matrix, which works only if they are quantized alike."""
    mixed = [group for group in contents.fused if len({linears[name].config for name in group}) > 1]
    if not mixed:
        return []
    first = f"{_owner(mixed[0][0])}.{{{', '.join(name.rpartition('.')[2] for name in mixed[0])}}}"
    return [
        f"{len(mixed)} groups of linears that engines fuse have unlike specs (first: {first}); vLLM will refuse them"
    ]


def _cut_blocks(contents: Contents) -> list[str]:
    """Engines fuse linears that share an input, whose blocks of rows must then end where the linears do."""
    cut = contents.cut_block()
    if cut is None:
        return []
    linear, _ = cut
    return [
        f"blocks of {linear.block_rows} rows do not divide the {linear.shape[0]} of {linear.name}, which engines fuse "
        "with others; the run can be evaluated, but not exported"
    ]

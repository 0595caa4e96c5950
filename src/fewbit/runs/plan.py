"""What will be done to which linear, decided and checked before any work starts."""

from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby

from fewbit.config.matching import resolve
from fewbit.config.recipe import Config
from fewbit.config.spec import AttentionConfig
from fewbit.contents import AttentionEntry, Contents, LinearEntry
from fewbit.errors import ConfigError
from fewbit.models.blockwise import BlockwiseModel
from fewbit.models.stored import aliases, unexpected
from fewbit.models.untouched import Untouched, sentence, untouched
from fewbit.nn import attention
from fewbit.nn.linear import Linear


@dataclass(frozen=True)
class Plan:
    """What the run will hold."""

    contents: Contents
    warnings: list[str]
    untouched: tuple[Untouched, ...] = ()
    """Tensors that are no linears and stay as they are."""

    @property
    def needs_data(self) -> bool:
        """Whether a static scale has to be found, whatever the algorithm."""
        return any(spec.needs_data for spec in self.contents.activations.values())


def make_plan(model: BlockwiseModel, config: Config) -> Plan:
    """Match the recipe against the model. ConfigError for what cannot be honoured, before anything is written."""
    linears = _linears(model, config)
    _check_divides(linears)
    if not any(linear.config for linear in linears.values()) and config.attention is None:
        raise ConfigError("the recipe quantizes nothing: every linear is excluded or has no spec")
    searches = config.scale_searches
    if searches and not any(linear.weight for linear in linears.values()):
        raise ConfigError(
            f"algorithm {searches[0].name}: scales are searched before linears whose weights are quantized, which "
            "none is; give weights a spec, or leave it out"
        )
    left = tuple(untouched(model.skeleton, linears))
    contents = Contents(
        linears,
        _attention(model, config.attention),
        tuple(_siblings(model.full_groups())),
        {tensor.name: tensor.shape for tensor in left},
        aliases(model.skeleton, model.source.info()),
        model.architecture.name,
        str(model.config.model_type),
        model.architecture.blocks,
    )
    return Plan(contents, list(_warnings(model, contents, left)), left)


def _linears(model: BlockwiseModel, config: Config) -> dict[str, LinearEntry]:
    """Every linear of the model, with what the recipe says of it."""
    modules = model.linears()
    places = {
        f"{model.prefix(index)}{name}": (index, name, group.routed)
        for index in range(len(model))
        for group in model.groups(index)
        for name in group.members
    }
    linears = {}
    for name, match in resolve(config, {name: type(module).__name__ for name, module in modules.items()}).items():
        wanted = match.config if match.config is not None and match.config.quantizes else None
        reason = match.rule if wanted is None else ""
        if name not in places and wanted is not None:
            if match.rule not in ("global",) and not match.rule.startswith("type"):
                raise ConfigError(
                    f"{name!r} cannot be quantized: it is in no group of the model's blocks ({match.rule})"
                )
            wanted, reason = None, "outside the blocks' groups"
        if wanted is not None and wanted.bias is not None and wanted.weight is None:
            raise ConfigError(
                f"bias of {name!r} is quantized with its weight only; give weight a spec, too ({match.rule})"
            )
        shape = (modules[name].out_features, modules[name].in_features)
        linears[name] = LinearEntry(name, shape, wanted, reason, *places.get(name, (None, "", False)))
    return linears


def _siblings(groups: Iterable[tuple[str, ...]]) -> Iterator[tuple[str, ...]]:
    """What engines fuse: of the linears that share an input those that lie in one module."""
    for group in groups:
        for _, members in groupby(sorted(group, key=_owner), key=_owner):
            if len(found := tuple(members)) > 1:
                yield found


def _owner(name: str) -> str:
    """The module that a module lies in."""
    return name.rpartition(".")[0]


def _attention(model: BlockwiseModel, config: AttentionConfig | None) -> dict[str, AttentionEntry]:
    """All attention modules: those that can be reached, and those with linears of their own that cannot. An error if
    `config` cannot be honoured."""
    find = attention.attention_modules(model.skeleton) if config is None else attention.check(model.skeleton, config)
    reached = set(find)
    specs = {slot: spec for slot, spec in (config.specs if config else {}).items() if spec is not None}
    return {
        name: AttentionEntry(name, type(module).__name__, specs if name in reached else {})
        for name, module in model.skeleton.named_modules()
        if name in reached
        or ("attention" in type(module).__name__.lower() and any(isinstance(m, Linear) for m in module.children()))
    }


def _check_divides(linears: dict[str, LinearEntry]) -> None:
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


def _grouped(linear: LinearEntry) -> Iterator[tuple[int, int, str, bool]]:
    """Group sizes of a linear's tensors, the number of channels that each must divide, which these are, and whether
    --group-size can change it: activations and formats have their own."""
    tensors = {"weight": linear.weight, "first_stage": linear.weight and linear.weight.first_stage}
    tensors |= {name: getattr(linear.config, name) for name in ("input_tensors", "output_tensors", "bias")}
    for name, spec in tensors.items():
        if spec is not None and spec.group_size is not None:
            turned = spec.ch_axis in (0, -2)
            of_outputs = name in ("output_tensors", "bias") or (turned and name != "input_tensors")
            channels, which = (linear.shape[0], "outputs") if of_outputs else (linear.shape[1], "inputs")
            size = spec.group_size if turned else spec.tiling.span
            yield size, channels, which, name == "weight" and spec.scale_type == "float"


def _warnings(model: BlockwiseModel, contents: Contents, left: Collection[Untouched]) -> Iterator[str]:
    """What a user should know before the work."""
    mixed = [group for group in contents.fused if len({contents.linears[name].config for name in group}) > 1]
    if mixed:
        first = f"{_owner(mixed[0][0])}.{{{', '.join(name.rpartition('.')[2] for name in mixed[0])}}}"
        what = f"{len(mixed)} groups of linears that engines fuse have unlike specs"
        yield f"{what} (first: {first}); vLLM will refuse them"
    if (cut := contents.cut_block()) is not None:
        linear, _ = cut
        yield (
            f"blocks of {linear.block_rows} rows do not divide the {linear.shape[0]} of {linear.name}, which engines "
            "fuse with others; the run can be evaluated, but not exported"
        )
    if unknown := unexpected(model.skeleton, model.source.info()):
        yield (
            f"{len(unknown)} stored tensors are not part of {model.architecture.name} and are left out "
            f"(first: {unknown[0]})"
        )
    if left:
        yield sentence(left)

"""Scales of channels in the walk: searched when a stage's statistics are complete, applied at once, written folded.

The forwards that are suspended have made their input with the producer (a norm, a linear) as it was, so from then on
the stage's linears divide their input themselves (a step, nn/steps.py). What is written is the folded form, in which
the producer is divided. It computes the same but for rounding, so a resumed run, which must have the same bytes,
computes the finished blocks as the interrupted one did: the vectors are kept beside the weights.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace

from torch import Tensor

from fewbit.algorithms.clip import clip
from fewbit.algorithms.scale_search import is_cut, search_scales
from fewbit.calibration.statistics import Statistics
from fewbit.checkpoint.source import TensorSource
from fewbit.config.algorithms import AWQConfig, GPTQConfig, ScaleSearchConfig
from fewbit.config.recipe import Config
from fewbit.engine.block_work import BlockWork, Found
from fewbit.engine.stage_quantizer import LinearResult, Member
from fewbit.models import folding
from fewbit.models.architecture import Groups, Scaling
from fewbit.models.blockwise import BlockwiseModel
from fewbit.models.scalings import head_dim, scalings
from fewbit.runs.plan import Plan

logger = logging.getLogger("fewbit")


@dataclass(frozen=True)
class _Divided:
    """Who makes an input, divided."""

    taken: Tensor
    """[rows]: by what, which storage may round or refuse."""
    dense: dict[str, Tensor]
    """Tensors that change, by their full names."""
    quantized: LinearResult | None
    """What the producer becomes, if it is quantized."""


class Smoother:
    """Searches and folds the scales of every block of a model. None of its work outlives a block."""

    def __init__(self, model: BlockwiseModel, plan: Plan, config: Config, search: ScaleSearchConfig) -> None:
        self._plan = plan
        self._search = search
        self._compensated = isinstance(config.codes, GPTQConfig)
        self._head_dim = head_dim(model)
        self._source: TensorSource = model.source
        self._scalings = scalings(model, search.scaling_layers)
        self._turned = {name for name, linear in model.linears().items() if linear.scales_at > 0}

    def scaling(self, group: tuple[str, ...], prefix: str) -> Scaling | None:
        """What can be scaled before a group of linears; None if nothing can be without touching something else.

        Its readers are exactly the group, all quantized, and take its channels as they are; the producer, if it
        is quantized, has scales of its own for every row; and what it gives out is not quantized itself, neither as an
        output nor as the values of a KV cache.
        """
        for scaling in self._scalings:
            if set(scaling.readers) != set(group) or not self._turned.isdisjoint(f"{prefix}{name}" for name in group):
                continue
            readers = [self._plan.linears[f"{prefix}{name}"] for name in group]
            if any(linear.weight is not None and is_cut(linear.weight, linear.shape) for linear in readers):
                return None
            producer = f"{prefix}{scaling.producer}"
            activations = self._plan.activations  # what a linear inside attention gives to another are values
            quantized = f"{producer}.output" in activations or f"{producer.rpartition('.')[0]}.value" in activations
            divided = self._plan.weights.get(f"{producer}.weight")
            return None if quantized or (divided is not None and divided.tiling.rows != 1) else scaling
        return None

    def samples(self, groups: Groups, prefix: str) -> dict[int, int]:
        """Tokens that the search wants to see, of each scaled group whose input is quantized.

        H of such an input is gathered as it comes, for the search, and as the weights meet it, for the codes. Where
        nothing is quantized the second follows from the first (`Statistics.scaled`).
        """
        activations, wanted = self._plan.activations, self._search.sample_tokens
        return {
            order: wanted
            for order in self.scaled(groups, prefix)
            if f"{prefix}{groups[order][0]}.input" in activations
        }

    def scaled(self, groups: Groups, prefix: str) -> dict[int, Scaling]:
        """Which of a block's groups are scaled, by their number."""
        found = {order: self.scaling(group, prefix) for order, group in enumerate(groups)}
        return {order: scaling for order, scaling in found.items() if scaling is not None}

    def apply(self, scaling: Scaling, members: list[Member], statistics: Statistics, work: BlockWork) -> Tensor | None:
        """Search the scale before a stage and fold it into whoever makes its input.

        Args:
            members: the stage's linears.
            statistics: of the input as it comes.
            work: the block; a producer that is quantized already is rescaled there, another one changes there.

        Returns what the input is divided by, and the members' columns are to be multiplied by [in]; None if nothing is
        gained by scaling.
        """
        prefix, dense = work.prefix, work.dense
        name = f"{prefix}{scaling.producer}"
        shape = self._source.info()[f"{name}.weight"].shape
        rows, is_norm = shape[0], len(shape) == 1
        device = statistics.moment.device
        channels = folding.channel_map(members[0].weight.shape[1], rows, self._head_dim)

        def stored(scale: Tensor) -> Tensor:
            wanted = folding.per_row(scale.cpu(), channels, rows)
            return self._divided(name, scaling, wanted, channels, work).taken[channels].to(device)

        found = search_scales(
            [member.weight for member in members],
            [member.spec for member in members],
            statistics,
            self._search,
            dtype=members[0].dtype,
            input_spec=self._plan.activations.get(f"{members[0].name}.input"),
            tie=channels.to(device) if rows != channels.numel() else None,
            power_of_two=not is_norm or bool(scaling.others) or self._bias(f"{name}.bias", dense) is not None,
            compensated=self._compensated,
            stored=stored,
        )
        if found.alpha is None:
            if self._search.alpha is not None:
                logger.warning("%s is not scaled: alpha %s has no scales that can be stored", name, self._search.alpha)
            return None
        divided = self._divided(name, scaling, folding.per_row(found.scale.cpu(), channels, rows), channels, work)
        columns = divided.taken[channels]
        changed = divided.dense | {
            prefix + other: folding.scale_columns(self._read(prefix + other, dense), columns)
            for other in scaling.others
        }
        columns = columns.to(device)
        dense.update(changed)
        if divided.quantized is not None:
            work.results[name] = divided.quantized
        work.found.append(Found(scaling, found.alpha, columns, tuple(changed) if is_norm else ()))
        return columns

    def _divided(self, name: str, scaling: Scaling, wanted: Tensor, channels: Tensor, work: BlockWork) -> _Divided:
        """A norm or linear whose rows are divided by `wanted` [rows], as far as they and what reads them unquantized
        can be stored. Nothing of the block changes."""
        dense = work.dense
        others = [self._read(work.prefix + other, dense) for other in scaling.others]
        wanted = folding.where_scalable(others, wanted, channels)
        bias = self._bias(f"{name}.bias", dense)
        changed: dict[str, Tensor] = {}
        quantized: LinearResult | None = None
        if (producer := work.results.get(name)) is not None:
            there = producer.weight.scale.device
            moved = None if bias is None else bias.to(there)
            rescaled, bias, taken = folding.fold_into_quantized_rows(producer.weight, moved, wanted.to(there))
            quantized = replace(producer, weight=rescaled)
        else:
            weight = self._read(f"{name}.weight", dense)
            if weight.ndim == 1:  # a norm
                changed[f"{name}.weight"], bias, taken = folding.fold_into_norm(weight, bias, wanted, scaling.offset)
            else:
                changed[f"{name}.weight"], bias, taken = folding.fold_into_linear_rows(weight, bias, wanted)
        if bias is not None:
            changed[f"{name}.bias"] = bias.cpu()
        return _Divided(taken.cpu(), changed, quantized)

    def clipped(self, members: list[Member], moment: Tensor) -> list[Member]:
        """The members with their ranges clipped, if the recipe asks for it; `moment` is that of their input."""
        if not (isinstance(self._search, AWQConfig) and self._search.clip):
            return members
        return [self._clipped(member, moment) for member in members]

    def _clipped(self, member: Member, moment: Tensor) -> Member:
        spec = member.spec
        if spec.stored_as.has_global_scale:  # its scales search their range themselves, code by code
            return member
        return replace(member, start=clip(member.weight, moment, spec, spec.scale_format(member.dtype)))

    def _read(self, name: str, dense: Mapping[str, Tensor]) -> Tensor:
        return dense[name] if name in dense else self._source.read([name])[name]

    def _bias(self, name: str, dense: Mapping[str, Tensor]) -> Tensor | None:
        return self._read(name, dense) if name in dense or name in self._source.info() else None

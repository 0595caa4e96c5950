"""Channel scales: searched from a stage's statistics, folded into whoever makes the input.

While a block is calibrated, suspended forwards have made their input with the producer (a norm, a linear) as it was,
so from then on the stage's linears divide their input themselves. What is written is the folded form, in which the
producer is divided. It computes the same but for rounding, so a resumed run, which must have the same bytes, computes
the finished blocks as the interrupted one did: the vectors are kept beside the weights.
"""

import logging
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from fewbit.algorithms.clip import clip
from fewbit.algorithms.scale_search import ScaleSearch, is_cut, search_scales
from fewbit.calibration.statistics import Statistics
from fewbit.checkpoint.names import bias_of, weight_of
from fewbit.checkpoint.source import TensorSource
from fewbit.config.algorithms import ScaleSearchConfig
from fewbit.config.spec import QuantizationConfig, QuantizationSpec
from fewbit.engine.block_work import BlockWork, FoldedScale
from fewbit.engine.stage_quantizer import LinearResult, Member
from fewbit.models import folding
from fewbit.models.architecture import Scaling

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


@dataclass(frozen=True)
class ChannelScaler:
    """One search for channel scales, in every block of a stack. None of its work outlives a block."""

    search: ScaleSearchConfig
    source: TensorSource
    configs: Mapping[str, QuantizationConfig]
    """How linears are (or will be) quantized, by their full names."""
    activations: Mapping[str, QuantizationSpec]
    """Activations that are (or will be) quantized, by module and slot."""
    scalings: Sequence[Sequence[Scaling]]
    """What can be scaled, per block."""
    head_dim: int
    compensated: bool
    """The error of weights is what GPTQ will leave of it."""
    turned: Collection[str] = ()
    """Linears that do not take the channels as they come, by their full names."""
    stored: bool = False
    """The consumers' columns are multiplied as they are stored; else codes are found for them in float32."""

    def scaling(self, group: Sequence[str], work: BlockWork) -> Scaling | None:
        """What can be scaled before a group of linears; None if nothing can be without touching something else.

        Its consumers are exactly the group, all quantized, and take its channels as they come; the producer, if it is
        quantized, has scales of its own for every row; and what it gives out is not quantized itself, neither as an
        output nor as the values of a KV cache.
        """
        if not group or any(f"{work.prefix}{name}" in self.turned for name in group):
            return None
        for scaling in self.scalings[work.index]:
            if set(scaling.consumers) != set(group) or self.is_cut(work.prefix + name for name in group):
                continue
            producer = f"{work.prefix}{scaling.producer}"
            activations = self.activations  # what a linear inside attention gives to another are values
            quantized = f"{producer}.output" in activations or f"{producer.rpartition('.')[0]}.value" in activations
            divided = self.configs.get(producer)
            whole = divided is not None and divided.weight is not None and divided.weight.tiling.rows != 1
            return None if quantized or whole else scaling
        return None

    def is_cut(self, names: Iterable[str]) -> bool:
        """Whether the spec of a linear, by its full name, cuts its rows so that its columns cannot be scaled."""
        for name in names:
            config, (rows, columns) = self.configs.get(name), self.source.info()[weight_of(name)].shape
            if config is not None and config.weight is not None and is_cut(config.weight, (rows, columns)):
                return True
        return False

    def apply(self, scaling: Scaling, members: list[Member], statistics: Statistics, work: BlockWork) -> ScaleSearch:
        """Search the scale before a stage and fold it into whoever makes its input.

        Args:
            members: the stage's linears that count.
            statistics: of the input as it comes.
            work: the block; a producer that is quantized already is rescaled there, another one changes there.

        Returns what was found, with the scale [in] by which the input is to be divided and the members' columns
        multiplied; its alpha is None if nothing is gained.
        """
        name = f"{work.prefix}{scaling.producer}"
        shape = self.source.info()[weight_of(name)].shape
        rows, is_norm = shape[0], len(shape) == 1
        device = statistics.moment.device
        channels = folding.channel_map(members[0].weight.shape[1], rows, self.head_dim)

        def divided(scale: Tensor) -> _Divided:
            scale = scale.cpu().double() if self.stored else scale.cpu()
            return self._divided(name, scaling, folding.per_row(scale, channels, rows), channels, work)

        found = search_scales(
            [member.weight for member in members],
            [member.spec for member in members],
            statistics,
            self.search,
            dtype=members[0].dtype,
            input_spec=self.activations.get(f"{members[0].name}.input"),
            tie=channels.to(device) if rows != channels.numel() else None,
            power_of_two=self._power_of_two(name, scaling, is_norm, work),
            compensated=self.compensated,
            stored=lambda scale: divided(scale).taken[channels].float().to(device),
        )
        if found.alpha is None:
            if self.search.alpha is not None:
                logger.warning("%s is not scaled: alpha %s has no scales that can be stored", name, self.search.alpha)
            return found
        chosen = divided(found.scale)
        columns = chosen.taken[channels]
        changed = chosen.dense | {
            parameter: folding.scale_columns(self._read(parameter, work), columns)
            for parameter in self._stored_consumers(scaling, work.prefix)
        }
        work.dense.update(changed)
        if chosen.quantized is not None:
            work.results[name] = chosen.quantized
        columns = columns.float().to(device)
        work.scales.append(FoldedScale(scaling, found.alpha, columns, tuple(changed) if is_norm else ()))
        return replace(found, scale=columns)

    def clipped(self, members: list[Member], moment: Tensor) -> list[Member]:
        """The members with their ranges clipped, if the search asks for it; `moment` is that of their input."""
        return [self._clipped(member, moment) for member in members] if self.search.clips else members

    def _clipped(self, member: Member, moment: Tensor) -> Member:
        spec = member.spec
        if spec.stored_as.has_global_scale:  # its scales search their range themselves, code by code
            return member
        return replace(member, start=clip(member.weight, moment, spec, spec.scale_format(member.dtype)))

    def _power_of_two(self, name: str, scaling: Scaling, is_norm: bool, work: BlockWork) -> bool:
        """Whether other scales would cost something by their rounding."""
        if self.stored:
            return not is_norm and self._read(weight_of(name), work).dtype.itemsize < 4
        return not is_norm or bool(scaling.others) or self._bias(name, work) is not None

    def _stored_consumers(self, scaling: Scaling, prefix: str) -> list[str]:
        """Parameters whose columns are multiplied as they are stored."""
        linears = [weight_of(name) for name in scaling.consumers] if self.stored else []
        return [prefix + name for name in (*linears, *scaling.others)]

    def _divided(self, name: str, scaling: Scaling, wanted: Tensor, channels: Tensor, work: BlockWork) -> _Divided:
        """A norm or linear whose rows are divided by `wanted` [rows], as far as they and what reads them unquantized
        can be stored. Nothing of the block changes."""
        others = [self._read(parameter, work) for parameter in self._stored_consumers(scaling, work.prefix)]
        wanted = folding.where_scalable(others, wanted, channels)
        bias, producer = self._bias(name, work), work.results.get(name)
        if producer is None:
            folded, bias, taken = folding.fold_into(self._read(weight_of(name), work), bias, wanted, scaling.offset)
            changed = {weight_of(name): folded}
        else:
            there = producer.weight.scale.device
            moved = None if bias is None else bias.to(there)
            rescaled, bias, taken = folding.fold_into(producer.weight, moved, wanted.to(there))
            producer, changed = replace(producer, weight=rescaled), {}
        if bias is not None:
            changed[bias_of(name)] = bias.cpu()
        return _Divided(taken.cpu(), changed, producer)

    def _read(self, name: str, work: BlockWork) -> Tensor:
        return work.dense[name] if name in work.dense else self.source.read([name])[name]

    def _bias(self, module: str, work: BlockWork) -> Tensor | None:
        name = bias_of(module)
        return self._read(name, work) if name in work.dense or name in self.source.info() else None

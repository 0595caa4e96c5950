"""Quantizes one block after another, stage by stage, while calibration batches pass.

It knows blocks, batches and what is to be quantized; not where blocks come from, nor what becomes of a finished one.
"""

import logging
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Protocol

import torch
from torch import Tensor, nn

from fewbit.algorithms.rtn import rtn
from fewbit.calibration.passage import Passage, full_precision
from fewbit.checkpoint.names import bias_of, full_name, path_in
from fewbit.config.algorithms import AlgorithmConfig, CodeConfig
from fewbit.config.spec import QuantizationConfig, QuantizationSpec
from fewbit.engine.block_work import BlockWork
from fewbit.engine.channel_scaler import ChannelScaler
from fewbit.engine.phases import BLOCK_PHASES, QuantizedBlock
from fewbit.engine.reference import ReferenceForward
from fewbit.engine.stage_quantizer import LinearResult, Member, quantize_stage, round_stage
from fewbit.engine.staged import StagedForward, Strategy
from fewbit.engine.stages import Stage, calibration_stops, stages_of
from fewbit.models.architecture import Groups, Scaling
from fewbit.models.block_stack import BlockStack
from fewbit.models.token_identity import TokenIdentity
from fewbit.nn.stepped import Stepped

logger = logging.getLogger("fewbit")


@dataclass(frozen=True)
class Targets:
    """What is quantized."""

    configs: Mapping[str, QuantizationConfig]
    """By the full names of linears."""
    activations: Mapping[str, QuantizationSpec] = field(default_factory=dict)
    """By module and slot."""

    def weight(self, name: str) -> QuantizationSpec | None:
        """Spec of a linear's weight; None if that stays as it is."""
        config = self.configs.get(name)
        return None if config is None else config.weight


class Listener(Protocol):
    """Who watches."""

    def stage(self, block: int, name: str) -> None: ...
    def warn(self, text: str) -> None: ...


class Logged:
    """Nobody watches: warnings are logged."""

    def stage(self, block: int, name: str) -> None:
        pass

    def warn(self, text: str) -> None:
        logger.warning(text)


_NOBODY, _CPU = Logged(), torch.device("cpu")


@dataclass(frozen=True)
class BlockQuantizer:
    """Takes the blocks of a stack through calibration."""

    stack: BlockStack
    targets: Targets
    codes: CodeConfig
    device: torch.device = _CPU
    """Where blocks are loaded; layers in memory stay where they are."""
    listener: Listener = _NOBODY
    scalers: Sequence[ChannelScaler] = ()
    """Searches for channel scales, in order."""
    refinements: Sequence[AlgorithmConfig] = ()
    """What works on a block when its groups are done, in order."""

    def quantize(self, index: int, passage: Passage, strategy: Strategy) -> BlockWork:
        """A block quantized on the batches of `passage`, which go on to the next block."""
        work = BlockWork(index, self.stack.prefix(index))
        with self.stack.loaded(index, self.device) as block:
            probed = passage.forward(block, index)
            every = self.stack.groups(index, [partial(probed, batch) for batch in range(len(passage))])
            groups = self._quantized(every, work.prefix)
            matters = passage.full is not None or any(mask is not None for mask in passage.masks)
            identity = TokenIdentity() if matters and any(group.routed for group in groups) else None
            forward = passage.forward(block, index, identity=identity)
            reference = self._reference(block, index, groups, passage, identity)
            scalings = self._scalings(groups, work)

            def scale(stage: Stage) -> None:
                self._scale(stage, work, scalings[stage.order[0]])

            def decide(stage: Stage) -> None:
                self._quantize(stage, work, scalings.get(stage.order[0], []))

            stages = stages_of(
                block,
                groups,
                decide=decide,
                scale=scale,
                samples=self._samples(groups, work.prefix, scalings),
            )
            calibrations = calibration_stops(block, every, work.prefix)
            with nullcontext() if identity is None else identity:
                staged = StagedForward(stages, passage.masks, forward, reference, calibrations, identity)
                staged.run(partial(passage.emit, index=index) if not self.refinements else _keep, strategy)
            if self.refinements:
                self._refine(block, index, work, passage)
            self._take_steps(block, work)
        return work

    def _refine(self, block: nn.Module, index: int, work: BlockWork, passage: Passage) -> None:
        """Let methods change the block that is quantized, then pass the batches on."""
        target = None if passage.full is None else passage.full.get
        done = QuantizedBlock(
            block, work, range(len(passage)), passage.forward(block, index), target, passage.reference
        )
        for phase in self.refinements:
            with torch.set_grad_enabled(phase.needs.gradients):
                BLOCK_PHASES[phase.name](done, phase)
        with torch.no_grad():
            passage.cross(block, index)

    @staticmethod
    def _take_steps(block: nn.Module, work: BlockWork) -> None:
        """Note what happens to inputs, and leave what is folded into what is stored."""
        divided = work.divided_by_norms()
        for path, linear in block.named_modules():
            if isinstance(linear, Stepped):
                name = full_name(work.prefix, path)
                work.steps[name] = [s.stored() for s in linear.input_steps if not s.folded or name in divided]
                linear.leave_folded()

    def round(self, index: int) -> BlockWork:
        """A block rounded to nearest without data; nothing runs."""
        work = BlockWork(index, self.stack.prefix(index))
        read = partial(self.stack.source.read, self.stack.block_tensors(index))  # in the dtypes that are stored
        with self.stack.loaded(index, self.device, read) as block:
            for stage in stages_of(
                block, self._quantized(self.stack.groups(index), work.prefix), lambda stage: self._round(stage, work)
            ):
                stage.finish()
            self._take_steps(block, work)
        return work

    def _quantized(self, groups: Groups, prefix: str) -> Groups:
        """The groups with those members only whose weights are quantized, numbered as before."""

        def wanted(name: str) -> bool:
            return self.targets.weight(full_name(prefix, name)) is not None

        return tuple(replace(group, members=tuple(filter(wanted, group.members))) for group in groups)

    def _reference(
        self, block: nn.Module, index: int, groups: Groups, passage: Passage, identity: TokenIdentity | None
    ) -> ReferenceForward | None:
        """The block in full precision, if that is wanted. The block still has its own weights now."""
        if passage.full is None:
            return None
        original = full_precision(block)
        forward = passage.forward(original, index, passage.full, identity)
        return ReferenceForward(original, groups, passage.reference, forward, passage.full.put)

    def _scalings(self, groups: Groups, work: BlockWork) -> dict[int, list[tuple[ChannelScaler, Scaling]]]:
        """By number of a group: the searches before it, with what they scale."""
        found = {
            order: [
                (scaler, scaling)
                for scaler in self.scalers
                if (scaling := scaler.scaling(group.members, work)) is not None
            ]
            for order, group in enumerate(groups)
        }
        return {order: scalings for order, scalings in found.items() if scalings}

    def _samples(
        self, groups: Groups, prefix: str, scalings: Mapping[int, Sequence[tuple[ChannelScaler, Scaling]]]
    ) -> dict[int, int]:
        """Tokens that searches want to see, of each scaled group whose input is quantized.

        H of such an input is gathered as it comes, for the search, and as the weights meet it, for the codes. Where
        nothing is quantized the second follows from the first (`Statistics.scaled`).
        """
        return {
            order: max(scaler.search.needs.sample for scaler, _ in found)
            for order, found in scalings.items()
            if f"{full_name(prefix, groups[order].members[0])}.input" in self.targets.activations
        }

    def _scale(
        self, stage: Stage, work: BlockWork, scalings: Sequence[tuple[ChannelScaler, Scaling]]
    ) -> Tensor | None:
        """Scale the columns of a stage's linears, which divide their input by the same; returns it [in] if anything is
        gained. They compute what they did."""
        total: Tensor | None = None
        for scaler, scaling in scalings if stage.statistics is not None else ():
            assert stage.statistics is not None
            statistics = stage.statistics if total is None else stage.statistics.scaled(total)
            found = scaler.apply(scaling, self._members(stage, work), statistics, work)
            if found.alpha is None:
                continue
            total = found.scale if total is None else total * found.scale
            for linear in stage.members.values():
                linear.weight = nn.Parameter(linear.weight * found.scale, requires_grad=False)
                if isinstance(linear, Stepped):
                    linear.leave_folded()
                    linear.divide(total, folded=True)
        return total

    def _quantize(self, stage: Stage, work: BlockWork, scalings: Sequence[tuple[ChannelScaler, Scaling]]) -> None:
        self._tell(stage, work)
        statistics = stage.statistics
        if stage.before is None:
            columns = self._scale(stage, work, scalings)
            if columns is not None and statistics is not None:
                statistics = statistics.scaled(columns)
        members = self._members(stage, work)
        for scaler in self.scalers if statistics is not None else ():
            assert statistics is not None
            members = scaler.clipped(members, statistics.moment)
        for name, result in quantize_stage(members, statistics, self.codes).items():
            if stage.lost and result.fallback is not None:
                result = replace(result, fallback="round to nearest: padding could not be told from its tokens")
            linear = self._keep(name, result, stage, work)
            linear.weight = nn.Parameter(result.weight.dequantize(linear.weight.dtype), requires_grad=False)
            logger.info("%s loss %.4e tokens %d seconds %.2f", name, result.loss, result.tokens, result.seconds)

    def _round(self, stage: Stage, work: BlockWork) -> None:
        """Quantize a stage without data. Nothing runs through it afterwards."""
        self._tell(stage, work)
        for name, result in round_stage(self._members(stage, work, as_stored=True)).items():
            self._keep(name, result, stage, work)
            logger.info("%s loss %.4e seconds %.2f", name, result.loss, result.seconds)

    def _tell(self, stage: Stage, work: BlockWork) -> None:
        self.listener.stage(work.index, " ".join(name.rpartition(".")[2] for name in stage.members))

    def _keep(self, name: str, result: LinearResult, stage: Stage, work: BlockWork) -> nn.Linear:
        """Note what became of a linear; returns its module."""
        work.results[name] = result
        linear = stage.members[path_in(work.prefix, name)]
        self._quantize_bias(name, linear, work)
        if result.fallback is not None:
            self.listener.warn(f"{name} fell back: {result.fallback}")
        return linear

    def _members(self, stage: Stage, work: BlockWork, as_stored: bool = False) -> list[Member]:
        """What there is to quantize at a stage, in float32 or as it is stored."""
        members = []
        for name, linear in stage.members.items():
            full = full_name(work.prefix, name)
            weight = linear.weight.data
            if not as_stored or weight.itemsize == 1:  # 8-bit floats are for storage: torch computes nothing with them
                weight = weight.float()
            spec = self.targets.weight(full)
            assert spec is not None
            members.append(Member(full, weight, spec, self.stack.stored_dtype(full)))
        return members

    def _quantize_bias(self, name: str, linear: nn.Linear, work: BlockWork) -> None:
        """A bias stays a plain tensor; if it has a spec, one that holds values of its grid only."""
        spec = self.targets.configs[name].bias
        if spec is None or linear.bias is None:
            return
        stored = self.stack.source.read([bias_of(name)])[bias_of(name)]
        row = stored.float().unsqueeze(0)
        quantized = rtn(row, None, spec, spec.scale_format(stored.dtype)).weight.dequantize(stored.dtype)
        work.dense[bias_of(name)] = quantized.squeeze(0)
        linear.bias = nn.Parameter(quantized.squeeze(0).float().to(linear.bias.device), requires_grad=False)


def _keep(batch: int, output: Tensor) -> None:
    """The block is not done yet: the batch stays before it."""

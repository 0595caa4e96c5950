"""The walk: every block is loaded once, quantized stage by stage, written once, journalled, and left behind."""

from __future__ import annotations

import copy
import logging
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from fewbit.algorithms.rtn import rtn
from fewbit.calibration.tokens import CalibrationSet, padding_mask
from fewbit.checkpoint.native import NativePart, Smoothing, block_file, write_part
from fewbit.config.algorithms import GPTQConfig
from fewbit.config.recipe import Config
from fewbit.models.architecture import Scaling
from fewbit.models.blockwise import BlockCall, BlockwiseModel
from fewbit.models.linear import Linear
from fewbit.nn import attention
from fewbit.nn.activation import ActivationQuantizer
from fewbit.nn.attach import attach, detach, quantizers
from fewbit.pipeline.hidden_states import HiddenStates
from fewbit.pipeline.plan import Plan
from fewbit.pipeline.progress import ProgressView
from fewbit.pipeline.reference import Reference
from fewbit.pipeline.report import linear_row
from fewbit.pipeline.run_directory import RunDirectory
from fewbit.pipeline.smoothing import Found, Smoother, searched
from fewbit.pipeline.stage_quantizer import LinearResult, Member, quantize_stage
from fewbit.pipeline.staged import StagedForward, Strategy
from fewbit.pipeline.stages import Stage, calibration_stops, stages_of

logger = logging.getLogger("fewbit")


@dataclass
class _BlockWork:
    """What a block has become so far."""

    results: dict[str, LinearResult] = field(default_factory=dict)
    """Quantized linears by full name."""
    dense: dict[str, Tensor] = field(default_factory=dict)
    """Other tensors that changed."""
    found: list[Found] = field(default_factory=list)
    """Scales of channels that were folded."""

    def smoothing(self, prefix: str) -> Smoothing:
        """What a resumed run has to know: what norms were divided by. Linears are divided exactly."""
        by_norm = [found for found in self.found if found.folded]
        columns = {f"{prefix}{name}": found.columns.cpu() for found in by_norm for name in found.scaling.readers}
        return Smoothing(columns, tuple(name for found in by_norm for name in found.folded))

    def alpha_of(self, name: str, prefix: str) -> float | None:
        """Exponent of the scales that a linear's input was divided by; None if it was not."""
        exponents = [found.search.alpha for found in self.found if name.removeprefix(prefix) in found.scaling.readers]
        return exponents[0] if exponents else None


@dataclass(frozen=True)
class Walk:
    """Everything the walk over the blocks needs."""

    model: BlockwiseModel
    plan: Plan
    config: Config
    directory: RunDirectory
    progress: ProgressView
    device: torch.device
    activation_memory: int
    smoother: Smoother | None = None

    def run(self, calibration: CalibrationSet | None) -> list[dict[str, Any]]:
        """Quantize all blocks that the journal does not know yet; returns the report's rows of all of them."""
        finished = self.directory.finished_blocks()
        self.progress.start(len(self.model), len(finished))
        if len(finished) == len(self.model):
            shutil.rmtree(self.directory.work, ignore_errors=True)
            return [row for index in range(len(self.model)) for row in finished[index]]
        self._attach()
        if calibration is None:
            return self._without_data(finished)
        share = self.activation_memory // (2 if self._drift_batches(calibration) else 1)
        hidden = HiddenStates(share, self.directory.work / "quantized")
        reference = HiddenStates(share, self.directory.work / "reference")
        try:
            return self._with_data(calibration, hidden, reference, finished)
        finally:
            hidden.close()
            reference.close()
            shutil.rmtree(self.directory.work, ignore_errors=True)

    def strategy(self, calibration: CalibrationSet) -> Strategy:
        """`staged` if all suspended forwards of a block fit the activation memory, else `replay`: same result."""
        widest = max(
            (linear.shape[1] for linear in self.plan.linears.values() if linear.config is not None), default=0
        )
        if any(name.endswith(".input") for name in self.plan.activations):
            widest *= 2  # as it came, and quantized
        inside = self.plan.attention
        if inside is not None and inside.probabilities is not None and inside.probabilities.needs_data:
            return "replay"  # suspended with their square
        per_token = 4 * (3 * self._channels() + widest)  # residual, hidden states in and out, the suspended input
        if self._drift_batches(calibration):
            per_token *= 2  # the forward in full precision waits beside the other
        return "staged" if calibration.tokens * per_token <= self.activation_memory else "replay"

    def _drift_batches(self, calibration: CalibrationSet) -> list[int]:
        algorithm = self.config.codes
        return algorithm.drift_batches(len(calibration.batches)) if isinstance(algorithm, GPTQConfig) else []

    def _with_data(
        self,
        calibration: CalibrationSet,
        hidden: HiddenStates,
        reference_states: HiddenStates,
        finished: dict[int, list[dict[str, Any]]],
    ) -> list[dict[str, Any]]:
        calls: list[list[BlockCall]] = []
        drift_batches = self._drift_batches(calibration)
        for index, inputs in enumerate(self.model.enter(list(calibration.batches), self.device)):
            hidden.put(index, inputs.hidden)
            if index in drift_batches:
                reference_states.put(index, inputs.hidden)
            calls.append(inputs.calls)
        masks = [padding_mask(batch) for batch in calibration.batches]
        strategy = self.strategy(calibration)
        rows: list[dict[str, Any]] = []
        for index in range(len(self.model)):
            block_calls = [batch_calls[index] for batch_calls in calls]
            if index in finished:
                self._pass_through(index, hidden, block_calls)
                if drift_batches:
                    with self.model.loaded(index, self.device) as block, torch.no_grad():
                        forward = self._forward(_full_precision(block), reference_states, block_calls)
                        for batch in drift_batches:
                            reference_states.put(batch, forward(batch))
                rows += finished[index]
                self.progress.block_done(index, None)
                continue
            rows += self._quantize_block(index, hidden, reference_states, drift_batches, block_calls, masks, strategy)
        return rows

    def _quantize_block(
        self,
        index: int,
        hidden: HiddenStates,
        reference_states: HiddenStates,
        drift_batches: list[int],
        calls: list[BlockCall],
        masks: list[Tensor | None],
        strategy: Strategy,
    ) -> list[dict[str, Any]]:
        """One block from loading to writing; what it holds in memory goes with it."""
        work = _BlockWork()
        groups = self.plan.block_groups[index]
        prefix = self.model.block_name(index) + "."
        scaled = searched(groups, self.smoother, prefix)
        with self.model.loaded(index, self.device) as block:
            reference = None
            if drift_batches:
                original = _full_precision(block)
                reference_forward = self._forward(original, reference_states, calls)
                reference = Reference(original, groups, drift_batches, reference_forward, reference_states.put)

            def decide(stage: Stage) -> None:
                self._quantize(index, stage, work, scaled.get(stage.order[0]))

            smoother = self.smoother
            samples = {order: smoother.sample_tokens(groups[order], prefix) for order in scaled} if smoother else {}
            stages = stages_of(block, groups, decide, samples)
            forward = self._forward(block, hidden, calls)
            calibrations = calibration_stops(block, self.model.groups, prefix)
            StagedForward(stages, masks, forward, reference, calibrations).run(hidden.put, strategy)
            rows = self._write(index, work)
            for linear in self._linears(index):
                linear.smoothing = None
            return rows

    def _without_data(self, finished: dict[int, list[dict[str, Any]]]) -> list[dict[str, Any]]:
        rows: list[dict[str, Any]] = []
        for index in range(len(self.model)):
            if index in finished:
                rows += finished[index]
                self.progress.block_done(index, None)
                continue
            work = _BlockWork()
            with self.model.loaded(index, self.device) as block:

                def decide(stage: Stage) -> None:
                    self._quantize(index, stage, work, None)  # noqa: B023 (called here and now)

                for stage in stages_of(block, self.plan.block_groups[index], decide):
                    stage.finish()
                rows += self._write(index, work)
        return rows

    def _quantize(self, index: int, stage: Stage, work: _BlockWork, scaling: Scaling | None) -> None:
        prefix = self.model.block_name(index) + "."
        self.progress.stage(index, " ".join(name.rpartition(".")[2] for name in stage.members))
        info = self.model.source.info()
        members = []
        for name, linear in stage.members.items():
            dtype = info[f"{prefix}{name}.weight"].dtype
            members.append(Member(prefix + name, linear.weight.data, self.plan.spec(prefix + name), dtype))
        statistics = stage.statistics
        if scaling is not None and statistics is not None and self.smoother is not None:
            applied = self.smoother.apply(scaling, members, statistics, work.results, work.dense, prefix)
            if applied is not None:
                members, statistics, found = applied
                work.found.append(found)
                for linear in stage.members.values():
                    linear.smoothing = found.columns
        if self.smoother is not None and statistics is not None:
            members = self.smoother.clipped(members, statistics.moment)
        for name, result in quantize_stage(members, statistics, self.config.codes).items():
            work.results[name] = result
            linear = stage.members[name.removeprefix(prefix)]
            linear.weight = nn.Parameter(result.weight.dequantize(), requires_grad=False)
            self._quantize_bias(name, linear, work)
            logger.info("%s loss %.4e tokens %d seconds %.2f", name, result.loss, result.tokens, result.seconds)
            if result.fallback is not None:
                logger.warning("%s fell back: %s", name, result.fallback)
                self.progress.note(f"{name}: {result.fallback}")

    def _quantize_bias(self, name: str, linear: nn.Linear, work: _BlockWork) -> None:
        """A bias stays a plain tensor; if it has a spec, one that holds values of its grid only."""
        config = self.plan.linears[name].config
        if config is None or config.bias is None or linear.bias is None:
            return
        stored = self.model.source.read([f"{name}.bias"])[f"{name}.bias"]
        row = stored.float().unsqueeze(0)
        quantized = rtn(row, None, config.bias, config.bias.scale_format(stored.dtype)).weight.dequantize(stored.dtype)
        work.dense[f"{name}.bias"] = quantized.squeeze(0)
        linear.bias = nn.Parameter(quantized.squeeze(0).float().to(linear.bias.device), requires_grad=False)

    def _write(self, index: int, work: _BlockWork) -> list[dict[str, Any]]:
        results = work.results
        quantized = {f"{name}.weight": result.weight for name, result in results.items()}
        rest = [name for name in self.model.block_tensors(index) if name not in quantized]
        dense = self.model.source.read(rest) | work.dense
        activations = {name: quantizer.state() for name, quantizer in self._quantizers(index).items()}
        smoothing = work.smoothing(self.model.block_name(index) + ".")
        write_part(block_file(self.directory.path, index), quantized, dense, activations, smoothing)
        rows = [linear_row(name, index, result) for name, result in results.items()]
        for row in rows:
            row["scaling"] = work.alpha_of(row["name"], self.model.block_name(index) + ".")
        self.directory.record(index, rows)
        energy = sum(result.energy for result in results.values())
        self.progress.block_done(index, sum(r.error for r in results.values()) / energy if energy else 0.0)
        return rows

    def _pass_through(self, index: int, hidden: HiddenStates, calls: list[BlockCall]) -> None:
        """Hidden states through a block that an earlier run finished, computed as it did."""
        part = NativePart(block_file(self.directory.path, index))
        smoothing = part.smoothing()

        def read() -> dict[str, Tensor]:
            names = self.model.block_tensors(index)
            tensors = {name: part.read(name, torch.float32) for name in names if name not in smoothing.folded}
            return tensors | self.model.source.read(smoothing.folded, torch.float32)

        known = part.activations()
        for name, quantizer in self._quantizers(index).items():
            quantizer.load(known[name])
        linears = self.model.linears()
        for name, columns in smoothing.columns.items():
            linears[name].smoothing = columns.to(self.device)
        with self.model.loaded(index, self.device, read) as block, torch.no_grad():
            forward = self._forward(block, hidden, calls)
            for batch in range(len(calls)):
                hidden.put(batch, forward(batch))
        for name in smoothing.columns:
            linears[name].smoothing = None

    def _attach(self) -> None:
        """Quantize activations from here on, as the engine will."""
        configs = {name: linear.config for name, linear in self.plan.linears.items() if linear.config is not None}
        info = self.model.source.info()
        first = self.model.block_name(0)
        dtypes = {info[f"{first}.{name}.weight"].dtype for group in self.model.groups for name in group}
        groups = [
            [f"{self.model.block_name(index)}.{name}" for name in group]
            for index in range(len(self.model))
            for group in self.model.groups
        ]
        dtype = dtypes.pop() if len(dtypes) == 1 else torch.float32
        attach(self.model.linears(), configs, groups, dtype)
        if self.plan.attention is not None:
            attention.attach(self.model.skeleton, self.plan.attention, dtype=dtype)
        for quantizer in quantizers(self.model.skeleton).values():
            quantizer.passive = not self.config.calibration.quantized_activations

    def _linears(self, index: int) -> list[Linear]:
        prefix = self.model.block_name(index) + "."
        return [linear for name, linear in self.model.linears().items() if name.startswith(prefix)]

    def _quantizers(self, index: int) -> dict[str, ActivationQuantizer]:
        """Those of one block's activations, by module and slot."""
        return quantizers(self.model.skeleton, self.model.block_name(index) + ".")

    def _forward(self, block: nn.Module, hidden: HiddenStates, calls: list[BlockCall]) -> Callable[[int], Tensor]:
        def forward(batch: int) -> Tensor:
            return self.model.call_block(block, hidden.get(batch).to(self.device), calls[batch])

        return forward

    def _channels(self) -> int:
        return int(self.model.config.get_text_config().hidden_size)


def _full_precision(block: nn.Module) -> nn.Module:
    """A copy that quantizes no activations and shares its weights with the block until those are replaced."""
    copied = copy.deepcopy(block, {id(p): p for p in block.parameters()})
    detach(copied)
    return copied

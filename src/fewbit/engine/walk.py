"""The walk: every block is loaded once, quantized stage by stage, written once, journalled, and left behind."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fewbit.algorithms.rtn import rtn
from fewbit.calibration.tokens import CalibrationSet
from fewbit.checkpoint.native import NativePart, block_file, write_part
from fewbit.config.algorithms import GPTQConfig
from fewbit.config.recipe import Config
from fewbit.engine.block_work import BlockWork
from fewbit.engine.passage import Passage, entered
from fewbit.engine.smoothing import Smoother
from fewbit.engine.stage_quantizer import Member, quantize_stage, round_stage
from fewbit.engine.staged import StagedForward, Strategy
from fewbit.engine.stages import Stage, calibration_stops, stages_of
from fewbit.models.architecture import Scaling
from fewbit.models.blockwise import BlockwiseModel
from fewbit.nn.activation import ActivationQuantizer
from fewbit.nn.attach import attach, quantizers
from fewbit.nn.linear import Linear
from fewbit.runs.plan import Plan
from fewbit.runs.progress import ProgressView
from fewbit.runs.report import linear_row
from fewbit.runs.run_directory import RunDirectory

logger = logging.getLogger("fewbit")


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
        for text in self.directory.damaged:
            self.progress.warn(text)
        self.progress.start(len(self.model), len(finished))
        if len(finished) == len(self.model):
            return [row for index in range(len(self.model)) for row in finished[index]]
        self._attach()
        if calibration is None:
            return self._without_data(finished)
        drift = self._drift_batches(calibration)
        with (
            self.directory.scratch() as work,
            entered(self.model, calibration, self.device, drift, self.activation_memory, work) as passage,
        ):
            return self._with_data(passage, self.strategy(calibration), finished)

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
        positions = sum(batch["input_ids"].numel() for batch in calibration.batches)  # padding takes memory, too
        masks = self._mask_bytes(calibration)
        return "staged" if positions * per_token + masks <= self.activation_memory else "replay"

    def _mask_bytes(self, calibration: CalibrationSet) -> int:
        """What the masks of all padded batches take: [batch, 1, tokens, tokens] of truth values, or of numbers where
        attention is computed step by step; a suspended forward holds its own."""
        size = 4 if getattr(self.model.skeleton.config, "_attn_implementation", None) == "eager" else 1
        padded = [batch["input_ids"] for batch in calibration.batches if "attention_mask" in batch]
        return sum(size * ids.numel() * ids.shape[1] for ids in padded)

    def _drift_batches(self, calibration: CalibrationSet) -> list[int]:
        algorithm = self.config.codes
        return algorithm.drift_batches(len(calibration.batches)) if isinstance(algorithm, GPTQConfig) else []

    def _with_data(
        self, passage: Passage, strategy: Strategy, finished: dict[int, list[dict[str, Any]]]
    ) -> list[dict[str, Any]]:
        rows: list[dict[str, Any]] = []
        for index in range(len(self.model)):
            if index in finished:
                self._pass_through(index, passage)
                rows += finished[index]
                self.progress.block_done(index, None)
            else:
                rows += self._quantize_block(index, passage, strategy)
                if self.directory.changed(index) and finished:
                    self.progress.warn(f"block {index} came out otherwise than before, so what follows was made anew")
                    finished = {}
        return rows

    def _quantize_block(self, index: int, passage: Passage, strategy: Strategy) -> list[dict[str, Any]]:
        """One block from loading to writing; what it holds in memory goes with it."""
        work = BlockWork(index, self.model.prefix(index))
        groups = self.plan.block_groups[index]
        smoother = self.smoother
        scaled = smoother.scaled(groups, work.prefix) if smoother is not None else {}
        samples = smoother.samples(groups, work.prefix) if smoother is not None else {}
        with self.model.loaded(index, self.device) as block:
            reference = passage.reference(block, index, groups)

            def scale(stage: Stage) -> None:
                self._scale(stage, work, scaled[stage.order[0]])

            def decide(stage: Stage) -> None:
                self._quantize(stage, work, scaled.get(stage.order[0]))

            stages = stages_of(block, groups, decide, scale, samples)
            calibrations = calibration_stops(block, self.model.groups, work.prefix)
            forward = passage.forward(block, index)
            emit = partial(passage.emit, index=index)
            StagedForward(stages, passage.masks, forward, reference, calibrations).run(emit, strategy)
            rows = self._write(work)
            for linear in self._linears(work.prefix).values():
                linear.leave_folded()
            return rows

    def _without_data(self, finished: dict[int, list[dict[str, Any]]]) -> list[dict[str, Any]]:
        rows: list[dict[str, Any]] = []
        for index in range(len(self.model)):
            if index in finished:
                rows += finished[index]
                self.progress.block_done(index, None)
                continue
            work = BlockWork(index, self.model.prefix(index))
            decide = partial(self._round, work=work)
            read = partial(self.model.source.read, self.model.block_tensors(index))  # in the dtypes that are stored
            with self.model.loaded(index, self.device, read) as block:
                for stage in stages_of(block, self.plan.block_groups[index], decide):
                    stage.finish()
                rows += self._write(work)
        return rows

    def _scale(self, stage: Stage, work: BlockWork, scaling: Scaling) -> Tensor | None:
        """Scale the columns of a stage's linears, which divide their input by the same; returns it [in] if anything is
        gained. They compute what they did."""
        if stage.statistics is None or self.smoother is None:
            return None
        columns = self.smoother.apply(scaling, self._members(stage, work), stage.statistics, work)
        if columns is not None:
            for linear in stage.members.values():
                linear.weight = nn.Parameter(linear.weight * columns, requires_grad=False)
                if isinstance(linear, Linear):
                    linear.divide(columns, folded=True)
        return columns

    def _quantize(self, stage: Stage, work: BlockWork, scaling: Scaling | None) -> None:
        prefix = work.prefix
        self.progress.stage(work.index, " ".join(name.rpartition(".")[2] for name in stage.members))
        statistics = stage.statistics
        if scaling is not None and stage.before is None:
            columns = self._scale(stage, work, scaling)
            if columns is not None and statistics is not None:
                statistics = statistics.scaled(columns)
        members = self._members(stage, work)
        if self.smoother is not None and statistics is not None:
            members = self.smoother.clipped(members, statistics.moment)
        for name, result in quantize_stage(members, statistics, self.config.codes).items():
            work.results[name] = result
            linear = stage.members[name.removeprefix(prefix)]
            linear.weight = nn.Parameter(result.weight.dequantize(), requires_grad=False)
            self._quantize_bias(name, linear, work)
            logger.info("%s loss %.4e tokens %d seconds %.2f", name, result.loss, result.tokens, result.seconds)
            if result.fallback is not None:
                self.progress.warn(f"{name} fell back: {result.fallback}")

    def _round(self, stage: Stage, work: BlockWork) -> None:
        """Quantize a stage without data. Nothing runs through it afterwards."""
        self.progress.stage(work.index, " ".join(name.rpartition(".")[2] for name in stage.members))
        for name, result in round_stage(self._members(stage, work)).items():
            work.results[name] = result
            self._quantize_bias(name, stage.members[name.removeprefix(work.prefix)], work)
            logger.info("%s loss %.4e seconds %.2f", name, result.loss, result.seconds)

    def _members(self, stage: Stage, work: BlockWork) -> list[Member]:
        """What there is to quantize at a stage."""
        info, members = self.model.source.info(), []
        for name, linear in stage.members.items():
            full = work.prefix + name
            weight = linear.weight.data
            if weight.itemsize == 1:  # 8-bit floats are for storage: torch computes nothing with them
                weight = weight.float()
            members.append(Member(full, weight, self.plan.spec(full), info[f"{full}.weight"].dtype))
        return members

    def _quantize_bias(self, name: str, linear: nn.Linear, work: BlockWork) -> None:
        """A bias stays a plain tensor; if it has a spec, one that holds values of its grid only."""
        config = self.plan.linears[name].config
        if config is None or config.bias is None or linear.bias is None:
            return
        stored = self.model.source.read([f"{name}.bias"])[f"{name}.bias"]
        row = stored.float().unsqueeze(0)
        quantized = rtn(row, None, config.bias, config.bias.scale_format(stored.dtype)).weight.dequantize(stored.dtype)
        work.dense[f"{name}.bias"] = quantized.squeeze(0)
        linear.bias = nn.Parameter(quantized.squeeze(0).float().to(linear.bias.device), requires_grad=False)

    def _write(self, work: BlockWork) -> list[dict[str, Any]]:
        index, results = work.index, work.results
        quantized = {f"{name}.weight": result.weight for name, result in results.items()}
        rest = [name for name in self.model.block_tensors(index) if name not in quantized]
        dense = self.model.source.read(rest) | work.dense
        activations = {name: quantizer.state() for name, quantizer in self._quantizers(work.prefix).items()}
        steps = {
            name: [s.stored() for s in linear.input_steps if not s.folded or name in work.divided_by_norms()]
            for name, linear in self._linears(work.prefix).items()
        }
        file = block_file(self.directory.path, index)
        digest = write_part(file, quantized, dense, activations, steps, work.folded)
        rows = [linear_row(name, index, result) for name, result in results.items()]
        for row in rows:
            row["scaling"] = work.alpha_of(row["name"])
        self.directory.record(index, rows, digest)
        energy = sum(result.energy for result in results.values())
        self.progress.block_done(index, sum(r.error for r in results.values()) / energy if energy else 0.0)
        return rows

    def _pass_through(self, index: int, passage: Passage) -> None:
        """The batches through a block that an earlier run finished, computed as it did."""
        part = NativePart(block_file(self.directory.path, index))
        prefix = self.model.prefix(index)

        def read() -> dict[str, Tensor]:
            names = self.model.block_tensors(index)
            tensors = {name: part.read(name, torch.float32) for name in names if name not in part.folded}
            return tensors | self.model.source.read(part.folded, torch.float32)

        known = part.activations()
        for name, quantizer in self._quantizers(prefix).items():
            quantizer.load(known[name])
        linears = self._linears(prefix)
        for name, steps in part.steps().items():
            linears[name].restore_steps(steps, folded=True)
        with self.model.loaded(index, self.device, read) as block, torch.no_grad():
            passage.cross(block, index)
        for linear in linears.values():
            linear.leave_folded()
        if passage.drift_batches:
            with self.model.loaded(index, self.device) as block, torch.no_grad():
                passage.cross_in_full_precision(block, index)

    def _attach(self) -> None:
        """Quantize activations from here on, as the engine will."""
        info = self.model.source.info()
        first = self.model.prefix(0)
        dtypes = {info[f"{first}{name}.weight"].dtype for group in self.model.groups for name in group}
        dtype = dtypes.pop() if len(dtypes) == 1 else torch.float32
        attach(self.model.skeleton, self.plan.activations, groups=self.model.full_groups(), dtype=dtype)
        for quantizer in quantizers(self.model.skeleton).values():
            quantizer.passive = not self.config.calibration.quantized_activations

    def _linears(self, prefix: str) -> dict[str, Linear]:
        return {name: linear for name, linear in self.model.linears().items() if name.startswith(prefix)}

    def _quantizers(self, prefix: str) -> dict[str, ActivationQuantizer]:
        """Those of one block's activations, by module and slot."""
        return quantizers(self.model.skeleton, prefix)

    def _channels(self) -> int:
        return int(self.model.config.get_text_config().hidden_size)

"""The walk: every block is loaded once, quantized stage by stage, written once, journalled, and left behind."""

from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fewbit.calibration.passage import Passage, enter, spread
from fewbit.calibration.tokens import CalibrationSet
from fewbit.checkpoint.names import weight_of
from fewbit.checkpoint.native import NativePart, block_file, write_part
from fewbit.config.recipe import Config
from fewbit.engine.block_quantizer import BlockQuantizer
from fewbit.engine.block_work import BlockWork
from fewbit.engine.staged import Strategy
from fewbit.models.architecture import members_of
from fewbit.models.blockwise import BlockwiseModel
from fewbit.nn.attach import attach, quantizers
from fewbit.runs.plan import Plan
from fewbit.runs.progress import ProgressView
from fewbit.runs.report import linear_row
from fewbit.runs.run_directory import RunDirectory

Rows = list[dict[str, Any]]


@dataclass(frozen=True)
class Walk:
    """Everything the walk over the blocks needs."""

    model: BlockwiseModel
    plan: Plan
    config: Config
    quantizer: BlockQuantizer
    directory: RunDirectory
    progress: ProgressView
    activation_memory: int

    def run(self, calibration: CalibrationSet | None) -> Rows:
        """Quantize all blocks that the journal does not know yet; returns the report's rows of all of them."""
        finished = self.directory.finished_blocks()
        for text in self.directory.damaged:
            self.progress.warn(text)
        self.progress.start(len(self.model), len(finished))
        if len(finished) == len(self.model):
            return [row for index in range(len(self.model)) for row in finished[index]]
        self._attach()
        if calibration is None:
            return self._rows(finished, self.quantizer.round, lambda index: None)
        reference = self._reference_batches(calibration)
        device, memory = self.quantizer.device, self.activation_memory
        strategy = self.strategy(calibration)
        with (
            self.directory.scratch() as scratch,
            closing(enter(self.model, calibration.batches, device, memory, scratch, reference)) as passage,
        ):
            quantize = partial(self.quantizer.quantize, passage=passage, strategy=strategy)
            return self._rows(finished, quantize, partial(self._pass_through, passage=passage))

    def strategy(self, calibration: CalibrationSet) -> Strategy:
        """`staged` if all suspended forwards of a block fit the activation memory, else `replay`: same result."""
        contents = self.plan.contents
        widest = max((linear.shape[1] for linear in contents.linears.values() if linear.config), default=0)
        if any(name.endswith(".input") for name in contents.activations):
            widest *= 2  # as it came, and quantized
        if any(spec.needs_data for name, spec in contents.activations.items() if name.endswith(".probabilities")):
            return "replay"  # suspended with their square
        hidden = int(self.model.config.get_text_config().hidden_size)
        per_token = 4 * (3 * hidden + widest)  # residual, hidden states in and out, the suspended input
        if self._reference_batches(calibration):
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

    def _reference_batches(self, calibration: CalibrationSet) -> list[int]:
        """Numbers of the batches that also pass in full precision."""
        return spread(max(one.needs.reference for one in self.config.algo_config), len(calibration.batches))

    def _rows(
        self, finished: dict[int, Rows], quantize: Callable[[int], BlockWork], pass_through: Callable[[int], None]
    ) -> Rows:
        rows: Rows = []
        for index in range(len(self.model)):
            if index in finished:
                pass_through(index)
                rows += finished[index]
                self.progress.block_done(index, None)
                continue
            made, differs = self._write(quantize(index))
            rows += made
            if differs and finished:
                self.progress.warn(f"block {index} came out otherwise than before, so what follows was made anew")
                finished = {}
        return rows

    def _write(self, work: BlockWork) -> tuple[Rows, bool]:
        """Write a finished block, then journal it; whether it came out otherwise than in an earlier run."""
        index, results = work.index, work.results
        quantized = {weight_of(name): result.weight for name, result in results.items()}
        rest = [name for name in self.model.block_tensors(index) if name not in quantized]
        dense = self.model.source.read(rest) | work.dense
        activations = {name: found.state() for name, found in quantizers(self.model.skeleton, work.prefix).items()}
        file = block_file(self.directory.path, index)
        digest = write_part(file, quantized, dense, activations, work.steps, work.folded)
        rows = [linear_row(name, index, result, work.alpha_of(name)) for name, result in results.items()]
        differs = self.directory.record(index, rows, digest)
        energy = sum(result.energy for result in results.values())
        self.progress.block_done(index, sum(r.error for r in results.values()) / energy if energy else 0.0)
        return rows, differs

    def _pass_through(self, index: int, passage: Passage) -> None:
        """The batches through a block that an earlier run finished, computed as it did."""
        part = NativePart(block_file(self.directory.path, index))
        prefix, device = self.model.prefix(index), self.quantizer.device

        def read() -> dict[str, Tensor]:
            names = self.model.block_tensors(index)
            tensors = {name: part.read(name, torch.float32) for name in names if name not in part.folded}
            return tensors | self.model.source.read(part.folded, torch.float32)

        for name, quantizer in quantizers(self.model.skeleton, prefix).items():
            quantizer.load(part.activation(name))
        linears = {name: linear for name, linear in self.model.linears().items() if name.startswith(prefix)}
        for name, steps in part.steps().items():
            linears[name].restore_steps(steps, folded=True)
        with self.model.loaded(index, device, read) as block, torch.no_grad():
            passage.cross(block, index)
        for linear in linears.values():
            linear.leave_folded()
        if passage.reference:
            with self.model.loaded(index, device) as block, torch.no_grad():
                passage.cross_in_full_precision(block, index)

    def _attach(self) -> None:
        """Quantize activations from here on, as the engine will."""
        prefix, groups = self.model.prefix(0), self.model.groups(0)
        dtypes = {self.model.stored_dtype(prefix + name) for name in members_of(groups)}
        dtype = dtypes.pop() if len(dtypes) == 1 else torch.float32
        attach(self.model.skeleton, self.plan.contents.activations, groups=self.model.full_groups(), dtype=dtype)
        for quantizer in quantizers(self.model.skeleton).values():
            quantizer.passive = not self.config.calibration.quantized_activations

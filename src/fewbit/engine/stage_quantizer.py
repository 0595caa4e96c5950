"""From a stage with complete statistics to quantized weights: rows that share an input go through one loop."""

import time
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from fewbit.algorithms import quantize_weight
from fewbit.calibration.statistics import Statistics
from fewbit.config.algorithms import CodeConfig
from fewbit.config.spec import QuantizationSpec
from fewbit.numerics.second_moment import quadratic_form
from fewbit.tensor import PIECE, QuantTensor, after_first_stage, find_grid, quantize


@dataclass(frozen=True)
class LinearResult:
    """One quantized linear and its line in the report."""

    weight: QuantTensor
    tokens: int
    error: float
    """‖XΔᵀ‖², the squared output error; ‖Δ‖² where there are no statistics."""
    energy: float
    """‖XWᵀ‖² (or ‖W‖²), what the error is measured against."""
    damping: float | None
    fallback: str | None
    seconds: float

    @property
    def loss(self) -> float:
        """Relative squared error of the output."""
        return self.error / self.energy if self.energy > 0 else 0.0


@dataclass(frozen=True)
class Member:
    """One linear of a stage."""

    name: str
    weight: Tensor
    """[out, in] float32."""
    spec: QuantizationSpec
    dtype: torch.dtype
    """What the checkpoint holds the weight in."""
    start: Tensor | None = None
    """What codes are found for in its stead (the weight clipped, say); errors are measured against the weight."""


def quantize_stage(
    members: list[Member], statistics: Statistics | None, algorithm: CodeConfig
) -> dict[str, LinearResult]:
    """Quantize the linears of a stage; those with the same spec go through the algorithm as one matrix."""
    results: dict[str, LinearResult] = {}
    moment = statistics.moment if statistics is not None else None
    for batch in _alike(members):
        started = time.perf_counter()
        weight = batch[0].weight if len(batch) == 1 else torch.cat([member.weight for member in batch])
        spec = batch[0].spec
        # of all members together: engines that fuse them need one global scale
        format = spec.scale_format(batch[0].dtype, spec.global_scale(weight))
        start = weight
        if any(member.start is not None for member in batch):
            start = torch.cat([member.weight if member.start is None else member.start for member in batch])
        start = after_first_stage(start, spec, batch[0].dtype)
        outcome = quantize_weight(start, statistics, spec, format, algorithm)
        error = outcome.error if start is weight else None  # else it is measured against what codes were found for
        error = _errors(outcome.weight.dequantize().sub_(weight), moment) if error is None else error
        energy = _errors(weight, moment)
        seconds = time.perf_counter() - started
        first = 0
        for member in batch:
            rows = slice(first, first + member.weight.shape[0])
            first = rows.stop
            results[member.name] = LinearResult(
                weight=outcome.weight if len(batch) == 1 else outcome.weight.rows(rows),
                tokens=statistics.tokens if statistics is not None else 0,
                error=float(error[rows].sum()),
                energy=float(energy[rows].sum()),
                damping=outcome.damping,
                fallback=outcome.fallback,
                seconds=seconds * member.weight.shape[0] / weight.shape[0],
            )
    return results


def round_stage(members: list[Member]) -> dict[str, LinearResult]:
    """Round the linears of a stage to nearest, without data; weights of any float dtype."""
    results: dict[str, LinearResult] = {}
    for batch in _alike(members):
        spec = batch[0].spec
        format = spec.scale_format(batch[0].dtype, spec.global_scale(*(member.weight for member in batch)))
        shared = None
        if len(batch) > 1 and spec.tiling.rows != 1:  # one scale for all
            whole = torch.cat([member.weight for member in batch])
            shared = find_grid(whole, spec, format)
            del whole
        for member in batch:
            started = time.perf_counter()
            weight = after_first_stage(member.weight, spec, member.dtype)
            found = quantize(weight, spec, format, *(shared or find_grid(weight, spec, format)))
            results[member.name] = LinearResult(
                weight=found,
                tokens=0,
                error=float(found.squared_error(member.weight).sum()),
                energy=_energy(member.weight),
                damping=None,
                fallback=None,
                seconds=time.perf_counter() - started,
            )
    return results


def _energy(weight: Tensor) -> float:
    """‖W‖²."""
    rows = max(1, PIECE // weight.shape[1])
    return sum(
        float(torch.linalg.vector_norm(part.float(), dim=-1).double().square_().sum()) for part in weight.split(rows)
    )


def _alike(members: list[Member]) -> Iterable[list[Member]]:
    """Members in order, those joined whose rows are quantized alike or that share a scale per tensor."""
    batches: list[list[Member]] = []
    for member in members:
        for batch in batches:
            first = batch[0]
            shared = _shares_scale(member.spec) or member.spec.stored_as.has_global_scale  # stored as the first one's
            alike = member.dtype == first.dtype or shared
            if member.spec == first.spec and alike and _joins(member.spec):
                batch.append(member)
                break
        else:
            batches.append([member])
    return batches


def _joins(spec: QuantizationSpec) -> bool:
    """Whether every row is quantized by itself (in the first of two stages, too), or by a scale that the stage shares.

    A scale per tensor is shared where engines that fuse the linears have one for all: for floats, which lose next to
    nothing by it. Integers keep their own.
    """
    if spec.first_stage is not None and spec.first_stage.tiling.rows != 1:
        return False
    return spec.tiling.rows == 1 or _shares_scale(spec)


def _shares_scale(spec: QuantizationSpec) -> bool:
    """Whether linears of one input have one scale for all."""
    return spec.qscheme == "per_tensor" and not spec.format.is_integer


def _errors(delta: Tensor, moment: Tensor | None) -> Tensor:
    """Squared output of each row, or without statistics its own square: float64 [rows]."""
    return delta.square().sum(-1, dtype=torch.float64) if moment is None else quadratic_form(delta, moment)

"""What a model is and what a recipe would make of it, before any work."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedModel

from fewbit import process
from fewbit.config.recipe import Config
from fewbit.models.architecture import Architecture
from fewbit.models.untouched import Untouched, untouched
from fewbit.runs.plan import Plan, make_plan
from fewbit.runs.quantize import open_model


@dataclass(frozen=True)
class GroupSummary:
    """Linears of a block that share an input."""

    members: tuple[str, ...]
    shapes: tuple[tuple[int, int], ...]
    """[out, in] of each."""


@dataclass(frozen=True)
class Inspection:
    """What was found."""

    architecture: Architecture
    blocks: int
    groups: list[GroupSummary]
    """Of the first block."""
    parameters: int
    parameters_in_linears: int
    """Those inside the blocks' groups, which can be quantized."""
    bytes_stored: int
    bytes_largest_block: int
    """As float32: what a block needs in memory."""
    bytes_quantized: int | None
    """Size of the checkpoint that the recipe would make; None without a recipe."""
    plan: Plan | None
    untouched: tuple[Untouched, ...] = ()
    """Tensors that no recipe quantizes: no linears, no embeddings."""


@process.neutral()
def inspect(model: str | Path | PreTrainedModel, config: Config | None = None) -> Inspection:
    """Look at a model's structure and headers; no weight is read unless its family has to be detected."""
    blockwise = open_model(model)
    info = blockwise.source.info()
    sizes = {name: math.prod(entry.shape) for name, entry in info.items()}
    linears = blockwise.linears()
    grouped = [name for group in blockwise.full_groups() for name in group]
    plan = make_plan(blockwise, config) if config is not None else None
    stored = sum(size * info[name].dtype.itemsize for name, size in sizes.items())
    quantized = None
    if plan is not None:
        quantized = stored
        for name, linear in plan.linears.items():
            if linear.spec is not None:
                weight = info[f"{name}.weight"]
                quantized -= sizes[f"{name}.weight"] * weight.dtype.itemsize
                quantized += math.ceil(linear.spec.stored_bits(linear.shape, weight.dtype) / 8)
    prefix = blockwise.prefix(0)
    return Inspection(
        architecture=blockwise.architecture,
        blocks=len(blockwise),
        groups=[
            GroupSummary(
                group, tuple((linears[prefix + n].out_features, linears[prefix + n].in_features) for n in group)
            )
            for group in blockwise.groups
        ],
        parameters=sum(sizes.values()),
        parameters_in_linears=sum(sizes[f"{name}.weight"] for name in grouped),
        bytes_stored=stored,
        bytes_largest_block=max(4 * sum(sizes[n] for n in blockwise.block_tensors(i)) for i in range(len(blockwise))),
        bytes_quantized=quantized,
        plan=plan,
        untouched=tuple(untouched(blockwise.skeleton, linears)),
    )

"""What a model is and what a recipe would make of it, before any work."""

import math
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedModel

from fewbit import process
from fewbit.checkpoint.names import weight_of
from fewbit.config.recipe import Config
from fewbit.models.architecture import Architecture
from fewbit.models.untouched import Untouched, untouched
from fewbit.runs.plan import Plan, make_plan
from fewbit.runs.quantize import open_model


@dataclass(frozen=True)
class Inspection:
    """What was found."""

    architecture: Architecture
    blocks: int
    groups: list[dict[str, tuple[int, int]]]
    """Of the first block: [out, in] of the linears that share an input, by their names in the block."""
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
    info, linears, prefix = blockwise.source.info(), blockwise.linears(), blockwise.prefix(0)
    sizes = {name: math.prod(entry.shape) for name, entry in info.items()}
    stored = {name: size * info[name].dtype.itemsize for name, size in sizes.items()}
    plan = make_plan(blockwise, config) if config is not None else None
    quantized = dict(stored)
    for linear in plan.contents.weights if plan is not None else ():
        quantized[linear.weight_name] = math.ceil(linear.stored_bits(info[linear.weight_name].dtype) / 8)
    return Inspection(
        architecture=blockwise.architecture,
        blocks=len(blockwise),
        groups=[
            {name: (linears[prefix + name].out_features, linears[prefix + name].in_features) for name in group.members}
            for group in blockwise.groups(0)
        ],
        parameters=sum(sizes.values()),
        parameters_in_linears=sum(sizes[weight_of(name)] for group in blockwise.full_groups() for name in group),
        bytes_stored=sum(stored.values()),
        bytes_largest_block=max(4 * sum(sizes[n] for n in blockwise.block_tensors(i)) for i in range(len(blockwise))),
        bytes_quantized=sum(quantized.values()) if plan is not None else None,
        plan=plan,
        untouched=tuple(untouched(blockwise.skeleton, linears)),
    )

"""Structural detection: a model family that is not listed is looked at instead of looked up."""

import inspect
from collections.abc import Callable, Sequence

from torch import nn
from transformers import PreTrainedModel

from fewbit.errors import ArchitectureError
from fewbit.models.architecture import Architecture, Groups, members_of
from fewbit.models.probe import linears_in, shared_inputs
from fewbit.models.untouched import sentence, untouched

WHAT_TO_WRITE = (
    "add a row to FAMILIES in fewbit/models/architecture.py, for example Architecture({name!r}, ({name!r},), "
    '((Group(("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")), Group(("self_attn.o_proj",)), …),), '
    'blocks="model.layers", embeddings="model.embed_tokens", head="lm_head")'
)


def architecture(skeleton: PreTrainedModel, model_type: str) -> Architecture:
    """Where blocks, embeddings and head of an unlisted family are. Groups are found by `groups`."""
    names = {module: name for name, module in skeleton.named_modules()}
    lists = [
        (sum(p.numel() for p in module.parameters()), name)
        for name, module in skeleton.named_modules()
        if isinstance(module, nn.ModuleList) and len({type(child) for child in module}) == 1 and _has_linears(module)
    ]
    embeddings, head = skeleton.get_input_embeddings(), skeleton.get_output_embeddings()
    if not any(isinstance(module, nn.ModuleList) and _has_linears(module) for module in skeleton.modules()):
        handled = () if head is None else (names[head],)
        raise ArchitectureError(
            f"model type {model_type!r} has no linears in its blocks, so there is nothing to quantize: "
            + sentence(untouched(skeleton, handled))
        )
    if not lists or embeddings is None or head is None:
        missing = "list of like blocks with linears" if not lists else "token embeddings and output head"
        raise ArchitectureError(
            f"model type {model_type!r} is not listed and no {missing} could be found; "
            + WHAT_TO_WRITE.format(name=model_type)
        )
    blocks = max(lists)[1]
    owner = skeleton.get_submodule(blocks.rpartition(".")[0])
    if "input_ids" not in inspect.signature(owner.forward).parameters:
        raise ArchitectureError(
            f"model type {model_type!r}: {type(owner).__name__}, which holds the blocks, takes no token ids, and "
            "fewbit walks decoders. Any stack of layers in memory: run_gptq_for_sequential_layers"
        )
    return Architecture(
        name=model_type,
        model_types=(model_type,),
        blocks=blocks,
        embeddings=names[embeddings],
        head=names[head],
        detected=True,
    )


def groups(block: nn.Module, kind: str, forwards: Sequence[Callable[[], object]]) -> Groups:
    """Which linears of a block share an input, in execution order: seen while batches pass it.

    `forwards` run one each; ArchitectureError, which names the family `kind`, if a linear is reached by none.
    """
    linears = linears_in(block)
    found = shared_inputs(block, linears, forwards)
    if unseen := set(linears).difference(members_of(found)):
        raise ArchitectureError(
            f"model type {kind!r} is not listed and a probe of its blocks did not reach {sorted(unseen)[0]!r}; "
            + WHAT_TO_WRITE.format(name=kind)
        )
    return found


def get_module_list(skeleton: nn.Module, name: str) -> nn.ModuleList:
    """The list of blocks by its path."""
    try:
        blocks = skeleton.get_submodule(name)
    except AttributeError:
        raise ArchitectureError(
            f"{type(skeleton).__name__} has no module {name!r}, where its blocks should be"
        ) from None
    if not isinstance(blocks, nn.ModuleList) or not len(blocks):
        raise ArchitectureError(f"{name!r} of {type(skeleton).__name__} is no list of blocks")
    return blocks


def _has_linears(module: nn.Module) -> bool:
    return any(isinstance(child, nn.Linear) for child in module.modules())

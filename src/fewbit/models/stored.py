"""What a checkpoint stores, beside what the model that is built from config.json needs.

As transformers loads: a tensor that is tied to another takes that one's values if it is not stored itself, and its own
if it is. What transformers would only warn of is an error here where values would be made up.
"""

import re
from collections.abc import Iterable, Mapping

import torch
from transformers import PreTrainedModel

from fewbit.checkpoint.source import TensorInfo, TensorSource
from fewbit.errors import CheckpointError
from fewbit.models.skeleton import is_composite

Stored = Mapping[str, TensorInfo]
_OF_CODES = re.compile(
    r"\.(weight_(scale(_inv|_2)?|packed|zero_point|shape|g_idx)|qweight|qzeros|scales|g_idx|SCB|absmax|quant_map"
    r"|weight\.(absmax|quant_map|quant_state\.\w+|nested_\w+)|input_scale|\w*blocks|\w*_scales)$"
)
"""Names of what lies beside a quantized weight."""


def tied_pairs(skeleton: PreTrainedModel) -> dict[str, str]:
    """What the configuration ties: {a tensor: the one that it is tied to}."""
    return dict(skeleton.get_expanded_tied_weights_keys(all_submodels=True))


def aliases(skeleton: PreTrainedModel, stored: Iterable[str]) -> dict[str, str]:
    """Tensors that are not stored but tied to one that is: {missing name: stored name}."""
    stored, found = set(stored), {}
    for one, other in tied_pairs(skeleton).items():
        if other in stored and one not in stored:
            found[one] = other
        elif one in stored and other not in stored:
            found[other] = one
    return found


def untied(skeleton: PreTrainedModel, source: TensorSource) -> list[str]:
    """Tensors that the configuration ties to others, though other values are stored for them: transformers then keeps
    both, and so must whatever is written."""
    stored = source.info()
    found = []
    for one, other in tied_pairs(skeleton).items():
        if one in stored and other in stored:
            values = source.read([one, other])
            if not torch.equal(values[one], values[other]):
                found.append(one)
    return found


def check(skeleton: PreTrainedModel, stored: Stored, family: str) -> None:
    """CheckpointError for the first tensor that is missing or has another shape or kind of numbers than the model."""
    needed = skeleton.state_dict()
    tied = aliases(skeleton, stored)
    parameters = {name for name, _ in skeleton.named_parameters(remove_duplicate=False)}
    for name, tensor in needed.items():
        if name not in stored:
            if name in tied or not (tensor.is_meta or name in parameters):
                continue
            raise CheckpointError(_missing(skeleton, name, family))
        info = stored[name]
        if info.shape != tuple(tensor.shape):
            raise CheckpointError(
                f"tensor {name!r} has shape {info.shape}, config.json says {tuple(tensor.shape)}; they are not "
                "of one model"
            )
        if info.dtype.is_floating_point != tensor.is_floating_point():
            holds = str(info.dtype).removeprefix("torch.")
            wanted = "floats" if tensor.is_floating_point() else "whole numbers"
            raise CheckpointError(
                f"tensor {name!r} holds {holds} where {family} has {wanted}; is the checkpoint quantized without "
                "config.json saying so? give the original one"
            )


def refuse_codes(skeleton: PreTrainedModel, stored: Stored) -> None:
    """CheckpointError for a checkpoint that is quantized, though its config.json does not say so."""
    needed = skeleton.state_dict().keys()
    modules = {name.rpartition(".")[0] for name in needed}
    for name in sorted(set(stored) - needed):
        if (match := _OF_CODES.search(name)) and name[: match.start()] in modules:
            raise CheckpointError(
                f"{name!r} belongs to a quantized weight, but config.json does not say that the checkpoint is "
                "quantized; give the original one"
            )


def unexpected(skeleton: PreTrainedModel, stored: Stored) -> list[str]:
    """Stored tensors that no module has, without those that transformers passes over in silence."""
    ignored = list(skeleton._keys_to_ignore_on_load_unexpected or ())
    ignored += [r"rotary_emb\.inv_freq", r"(^|\.)position_ids$"]  # were stored once, are computed now
    unknown = sorted(set(stored) - skeleton.state_dict().keys())
    return [name for name in unknown if not any(re.search(pattern, name) for pattern in ignored)]


def _missing(skeleton: PreTrainedModel, name: str, family: str) -> str:
    why = f", which {family} needs; if transformers loads it (it renames the tensors of some families), give the "
    why += "loaded model instead"
    if is_composite(skeleton.config):
        why = (
            ": it is a vision-language model whose tensors transformers renames; load it with transformers' "
            f"{type(skeleton).__name__}.from_pretrained(…) and give the loaded model, whose text blocks are quantized"
        )
    return f"the checkpoint holds no tensor {name!r}{why}"

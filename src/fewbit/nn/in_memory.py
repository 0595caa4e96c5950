"""What a user's model in memory has that quantization would silently lose: found, and refused by name."""

from collections.abc import Collection, Iterator
from functools import partial
from itertools import chain

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from fewbit.errors import ArchitectureError, CheckpointError, ConfigError

_WRAPPERS = ("DataParallel", "DistributedDataParallel", "FullyShardedDataParallel")
DISPATCH = "_hf_hook"
"""Where accelerate keeps its hook, which moves inputs between devices by a forward of the instance."""
_OF_STATE = ("_state_dict_hooks", "_state_dict_pre_hooks", "_load_state_dict_pre_hooks", "_load_state_dict_post_hooks")
_OBSERVING = ("transformers", "accelerate", "fewbit")
"""Whose hooks look on or move tensors between devices: the model computes the same without them."""
_ADVICE = (
    "fewbit builds the blocks anew from class and configuration and would leave that out; undo it, or quantize the "
    "layers as they are with run_gptq_for_sequential_layers"
)


def unwrapped(model: nn.Module) -> nn.Module:
    """The model itself, out of torch.compile's wrapper. ConfigError, which says what to give instead, for other
    wrappers and adapters that were not merged; CheckpointError for weights that are no plain tensors in memory."""
    model = getattr(model, "_orig_mod", model)
    kind = type(model).__name__
    if kind in _WRAPPERS:
        raise ConfigError(f"{kind} wraps the model for training; give the model inside (model.module)")
    if hasattr(model, "merge_and_unload"):
        raise ConfigError(f"{kind} has adapters that were not merged; give what model.merge_and_unload() returns")
    for name, module in model.named_modules():
        if {"base_layer", "lora_A"} & module._modules.keys():
            raise ConfigError(
                f"{name} ({type(module).__name__}) is an adapter that was not merged; merge the adapters into the "
                "weights first (PEFT: model = model.merge_and_unload())"
            )
        if "_orig_mod" in module._modules:
            raise ConfigError(f"{name} was wrapped by torch.compile; put the module itself back (its _orig_mod)")
    refuse_elsewhere(model)
    return model


def refuse_elsewhere(model: nn.Module, name: str = "") -> None:
    """CheckpointError for the first tensor that is on the meta device or in a library's own format."""
    for own, tensor in chain(model.named_parameters(), model.named_buffers()):
        full = ".".join(part for part in (name, own) if part)
        if nn.parameter.is_lazy(tensor):
            raise CheckpointError(f"{full!r} has no values yet; run data through the model once")
        if tensor.is_meta:
            raise CheckpointError(
                f"{full!r} is on the meta device, so its values are not in memory (accelerate has offloaded them?); "
                "load the model without offloading (device_map='cpu'), or give the checkpoint's directory"
            )
        if type(tensor) not in (Tensor, nn.Parameter, nn.Buffer):
            raise CheckpointError(
                f"{full!r} is a {type(tensor).__name__}, not a plain tensor (sharded, or quantized by another "
                "library?); give the model with its whole weights in memory, or the checkpoint's directory"
            )


def check_as_built(model: nn.Module, built: nn.Module) -> None:
    """ArchitectureError, which names it, for what is in `model` and not in `built`, the same class made from the same
    configuration: other modules and numbers, tensors that were added, forwards and hooks of single instances."""
    known = dict(built.named_modules(remove_duplicate=False))
    for name, module in model.named_modules(remove_duplicate=False):
        what = f"{name or 'the model'} ({type(module).__name__})"
        _refuse_parametrized(module, what)
        if name in known and type(known[name]) is not type(module):
            raise ArchitectureError(f"{what} is a {type(known[name]).__name__} in {type(model).__name__}; {_ADVICE}")
        if _has_own_forward(module):
            raise ArchitectureError(f"{what} has a forward of its own; {_ADVICE}")
        for hook in _hooks(module):
            raise ArchitectureError(f"{what} has a {hook}; {_ADVICE}")
        if name in known and (changed := _other_number(module, known[name])):
            raise ArchitectureError(f"{what}: {changed} is another one than its configuration says; {_ADVICE}")
    stored = built.state_dict().keys()
    if added := [name for name in model.state_dict() if name not in stored]:
        raise ArchitectureError(
            f"{added[0]!r} was added to {type(model).__name__}, whose class has none there; {_ADVICE}"
        )


def check_plain(module: nn.Module, name: str = "", known: Collection[str] = ()) -> None:
    """FewbitError, which names the module, if it does or holds something that its counterpart would drop: a forward of
    its own, a parametrization, a weight that is computed anew in every forward, and whatever it holds besides weight,
    bias and what `known` names."""
    what = check_weight(module, name)
    held = module._parameters | module._buffers | module._modules
    extra = sorted({key for key, value in held.items() if value is not None} - {"weight", "bias", *known})
    if _has_own_forward(module):
        lost = "has a forward of its own (del module.forward takes it off)"
    elif extra:
        lost = f"holds {extra[0]!r} beside weight and bias"
    elif any(getattr(module, hooks, None) for hooks in _OF_STATE):
        lost = "has a hook on its state dict"
    else:
        return
    raise ConfigError(f"{what} {lost}, which its quantized counterpart would drop; take it off, or exclude the module")


def check_weight(module: nn.Module, name: str = "") -> str:
    """The words that name a module. FewbitError if its weight is not the parameter that it seems to be, so that other
    values would not last."""
    refuse_elsewhere(module, name)
    what = f"{name or 'the module'} ({type(module).__name__})"
    _refuse_parametrized(module, what)
    if module._parameters.get("weight") is None:
        raise ConfigError(
            f"the weight of {what} is computed anew in every forward (pruned, normalized?); make that permanent "
            "first (remove_weight_norm, prune.remove), or exclude the module"
        )
    return what


def _refuse_parametrized(module: nn.Module, what: str) -> None:
    if parametrize.is_parametrized(module):
        raise ConfigError(
            f"{what} is parametrized; make that permanent first (torch.nn.utils.parametrize.remove_parametrizations)"
        )


def _has_own_forward(module: nn.Module) -> bool:
    """Whether an instance has another forward than its class, and not just accelerate's."""
    return "forward" in vars(module) and not hasattr(module, DISPATCH)


def _other_number(module: nn.Module, built: nn.Module) -> str | None:
    """The name of a number or computed buffer of a module that the one built from the configuration has otherwise.
    Dropout is none of inference. Rotary frequencies that follow the length of what came last may differ."""
    for name, value in vars(module).items():
        other = vars(built).get(name)
        if type(value) is float and type(other) is float and value != other and name != "p" and "dropout" not in name:
            return name
    if getattr(module, "rope_type", "default") in ("dynamic", "longrope"):
        return None
    for name in module._non_persistent_buffers_set & built._non_persistent_buffers_set:
        mine, its = module._buffers.get(name), built._buffers.get(name)
        if mine is None or its is None or its.is_meta or mine.shape != its.shape or not mine.is_floating_point():
            continue
        if not torch.allclose(mine.detach().float().cpu(), its.float().cpu(), rtol=0.02, atol=1e-4):
            return name  # what half precision rounds away is no change
    return None


def _hooks(module: nn.Module) -> Iterator[str]:
    """Hooks that may change what the module computes, in words."""
    for kind, hooks in (("forward", module._forward_hooks), ("forward pre-", module._forward_pre_hooks)):
        for hook in hooks.values():
            while isinstance(hook, partial):
                hook = hook.func
            home = getattr(hook, "__module__", None) or type(hook).__module__  # where it was written
            if home.partition(".")[0] not in _OBSERVING:
                yield f"{kind} hook ({getattr(hook, '__qualname__', type(hook).__name__)})"

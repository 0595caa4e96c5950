"""Keeps transformers' save_pretrained (and push_to_hub) from writing what nobody could load.

A model that is quantized in memory has codes where its class has weights, and from_pretrained would fill the linears
with random numbers. So saving is refused, also of a model that was copied, unpickled or quantized below the top.
"""

import sys
from collections.abc import Callable
from functools import wraps
from typing import Any

from torch import nn

from fewbit.errors import ConfigError

_GUARDED = "_fewbit_guarded"
_HOME = "fewbit.nn."
"""Where the classes of quantized modules are."""


def guard() -> None:
    """Called by whatever makes quantized modules; does nothing if transformers has made no model yet, or twice."""
    kind: Any = getattr(sys.modules.get("transformers.modeling_utils"), "PreTrainedModel", None)
    if kind is not None and not hasattr(kind.save_pretrained, _GUARDED):
        for name in ("save_pretrained", "push_to_hub"):
            setattr(kind, name, _guarded(getattr(kind, name)))


def _guarded(save: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(save)
    def refusing(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if found := quantized_in(self):
            raise ConfigError(
                f"the model is quantized in memory by fewbit ({found}), which from_pretrained could not load again; "
                "export the run instead (ModelQuantizer's or fewbit.quantize's output, Run.export), or save the state "
                "dict (torch.save(model.state_dict(), …)), which loads into a model after the same steps"
            )
        return save(self, *args, **kwargs)

    setattr(refusing, _GUARDED, True)
    return refusing


def quantized_in(model: nn.Module) -> str | None:
    """What fewbit has quantized in a model, in a few words: its first module of that kind; None if there is none."""
    found = ((name, type(module)) for name, module in model.named_modules())
    return next((f"{name} is a {kind.__name__}" for name, kind in found if kind.__module__.startswith(_HOME)), None)

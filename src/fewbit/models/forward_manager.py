"""One way to run any block: decoder layer, attention, MLP, linear, whatever their signatures and outputs are.

    forward_manager.forward(layer, hidden_states, position_ids=…, position_embeddings=…) -> Tensor

KNOWN is a table of class names; `register` adds to it. An unknown block is called with its input and the
keyword arguments that its forward takes, with a warning.

A registered forward often ends in `return output[0]`, since layers used to return tuples. Under transformers 5 many
return a tensor, of which that is the first row: what the layer gave back is taken instead.
"""

import inspect
import warnings
from collections.abc import Callable, Mapping
from fnmatch import fnmatchcase
from functools import partial
from typing import Any

from torch import Tensor, nn
from transformers.masking_utils import create_bidirectional_mask, create_masks_for_generate

from fewbit.errors import ArchitectureError, ConfigError
from fewbit.models.hooks import removed_at_the_end

LayerForward = Callable[..., Any]
"""fn(layer, inputs, **kwargs) -> the block's output, or something whose first tensor it is."""


def input_only(layer: nn.Module, inputs: Tensor, **kwargs: Any) -> Any:
    """A layer that works on each token by itself, without positions and masks."""
    return layer(inputs)


def with_attention(layer: nn.Module, inputs: Tensor, **kwargs: Any) -> Any:
    """A transformers layer with attention in it; `inputs` [batch, tokens, channels].

    attention_mask: 2-D [batch, tokens] (true or 1 where a token counts), or as the layer wants it, or left out. A mask
    that is needed (causal, sliding window) is built as transformers builds it.
    position_embeddings: what the layer wants, or a table of it by layer type ({"sliding_attention": (cos, sin), …}).
    """
    attention = attention_of(layer)
    if attention is not None:
        kwargs["attention_mask"] = _mask(attention, inputs, kwargs)
        if isinstance(kwargs.get("position_embeddings"), Mapping):
            kwargs["position_embeddings"] = kwargs["position_embeddings"][layer_type(attention)]
    try:
        return layer(inputs, **_accepted(layer, kwargs))
    except TypeError as error:
        if kwargs.get("position_embeddings") is None and "position_embeddings" in _parameters(layer):
            raise ArchitectureError(
                f"{type(layer).__name__} needs position_embeddings; record them with register_pos_embed_hooks"
            ) from error
        raise


def default_forward(layer: nn.Module, inputs: Tensor, **kwargs: Any) -> Any:
    """The plain call: one positional argument, and the keyword arguments that the layer's forward takes."""
    return layer(inputs, **_accepted(layer, kwargs))


KNOWN: dict[str | type[nn.Module], LayerForward] = {
    "Linear": input_only,
    "*MLP": input_only,
    "*MoeBlock": input_only,
    "*Attention": with_attention,
    "*DecoderLayer": with_attention,
    "ViTLayer": with_attention,
}


class LayerForwardManager:
    """A table of forwards by class, class name or wildcard; the most particular one wins.

    That is: a registered class, then the name of the class, then the same for its base classes, then a wildcard, of
    those the one that was registered last.
    """

    def __init__(self, known: Mapping[str | type[nn.Module], LayerForward] | None = None) -> None:
        self._table: dict[str | type[nn.Module], LayerForward] = dict(known or {})
        self._warned: set[type[nn.Module]] = set()

    def register(
        self, name_or_class: str | type[nn.Module], fn: LayerForward | None = None, *, override: bool = False
    ) -> Any:
        """Run layers of this class (or of a class of this name, or wildcard) by `fn(layer, inputs, **kwargs)`.

        Without `fn` it is a decorator. ConfigError for a second forward of the same key unless `override` is given, or
        it is the same function defined anew, as when a notebook's cell runs again.
        """
        if fn is None:
            return partial(self.register, name_or_class, override=override)
        if not callable(fn):
            raise ConfigError(f"a forward is a function (layer, inputs, **kwargs), not {fn!r}")
        if name_or_class in self._table and not override and not _same(self._table[name_or_class], fn):
            name = name_or_class if isinstance(name_or_class, str) else name_or_class.__name__
            raise ConfigError(f"{name!r} has a forward already; pass override=True to replace it")
        self._table.pop(name_or_class, None)  # a wildcard that is registered anew comes last
        self._table[name_or_class] = fn
        return fn

    def find(self, layer: nn.Module) -> LayerForward | None:
        """The forward for a layer; None if its type is not known."""
        for base in type(layer).__mro__:
            for key in (base, base.__name__):
                if key in self._table:
                    return self._table[key]
        patterns = [key for key in self._table if isinstance(key, str) and fnmatchcase(type(layer).__name__, key)]
        return self._table[patterns[-1]] if patterns else None

    def forward(self, layer: nn.Module, inputs: Tensor, **kwargs: Any) -> Tensor:
        """Run a layer and return its output tensor; keyword arguments that it does not take are dropped.

        ArchitectureError if there is no tensor in the output, or the batch is not in it any more.
        """
        fn = self.find(layer)
        if fn is None:
            fn = default_forward
            name = type(layer).__name__
            if type(layer) not in self._warned:
                self._warned.add(type(layer))
                warnings.warn(
                    f"{name} is no layer that is known, so it is called plainly with its input; if that is not right, "
                    f"forward_manager.register({name!r}, fn)",
                    stacklevel=2,
                )
        given: list[Any] = []
        with removed_at_the_end() as hooks:
            hooks.append(layer.register_forward_hook(lambda _layer, _args, output: given.append(output)))
            output = first_tensor(fn(layer, inputs, **kwargs))
        if given and isinstance(whole := given[-1], Tensor) and _is_first_row(output, whole):
            return whole
        if _lost_batch(inputs, output):
            raise ArchitectureError(
                f"the forward of {type(layer).__name__} gave back {list(output.shape)} for {list(inputs.shape)}: the "
                "batch is gone, as when output[0] is taken where the layer returns a tensor; return the output itself"
            )
        return output


def _is_first_row(output: Tensor, whole: Tensor) -> bool:
    """Whether `output` is whole[0], by its place in memory."""
    return (
        output is not whole
        and output.shape == whole.shape[1:]
        and output.data_ptr() == whole.data_ptr()
        and output.stride() == whole.stride()[1:]
    )


def _lost_batch(inputs: Tensor, output: Tensor) -> bool:
    """Whether the output [tokens, …] of inputs [batch, tokens, channels] has no batch; it may be one vector a row."""
    return (
        inputs.ndim > 2
        and output.ndim == inputs.ndim - 1
        and output.shape[:-1] == inputs.shape[1:-1]
        and output.shape[0] != inputs.shape[0]
    )


def _same(one: LayerForward, other: LayerForward) -> bool:
    """Whether two functions are one and the same, or the same place of a module defined twice."""
    place, again = ((getattr(fn, "__module__", None), getattr(fn, "__qualname__", None)) for fn in (one, other))
    return one is other or (place == again and None not in place and "<lambda>" not in str(place[1]))


def first_tensor(output: Any) -> Tensor:
    """The tensor that a module gives back: its output, or the first one in it. ArchitectureError if there is none."""
    values = output.values() if isinstance(output, Mapping) else output
    if isinstance(values, Tensor):
        return values
    try:
        return next(value for value in values if isinstance(value, Tensor))
    except (TypeError, StopIteration):
        raise ArchitectureError(f"a layer gave back {type(output).__name__}, in which there is no tensor") from None


def layer_type(attention: nn.Module) -> str | None:
    """ "full_attention", "sliding_attention" … where a model has several kinds of attention layers."""
    types = getattr(attention.config, "layer_types", None)
    return None if types is None else str(types[int(attention.layer_idx)])  # type: ignore[arg-type]


def attention_of(layer: nn.Module) -> nn.Module | None:
    """The attention of a transformers layer, which knows the model's configuration."""
    return next((m for m in layer.modules() if hasattr(m, "is_causal") and hasattr(m, "config")), None)


def _mask(attention: nn.Module, inputs: Tensor, kwargs: Mapping[str, Any]) -> Any:
    """The mask as the attention implementation wants it; None where that means the same."""
    mask = kwargs.get("attention_mask")
    if mask is not None and mask.ndim != 2:
        return mask
    if not attention.is_causal:
        return None if mask is None else create_bidirectional_mask(attention.config, inputs, mask.bool())
    masks = create_masks_for_generate(attention.config, inputs, mask, None, kwargs.get("position_ids"))
    return masks[layer_type(attention)] if isinstance(masks, dict) else masks


def _parameters(layer: nn.Module) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(layer.forward).parameters


def _accepted(layer: nn.Module, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Keyword arguments that the layer's forward takes."""
    parameters = _parameters(layer)
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        return dict(kwargs)
    return {name: value for name, value in kwargs.items() if name in parameters}


forward_manager = LayerForwardManager(KNOWN)

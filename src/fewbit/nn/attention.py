"""Quantizes key, value, query and probabilities inside attention, after rotary embeddings.

transformers' attention modules look their computation up by the name in their config (`_attn_implementation`).
`attach` puts quantizers on the modules and one of fewbit's names into the config: "fewbit" over "sdpa", "fewbit-eager"
over the family's own eager attention. Under it a module without quantizers computes exactly what it did before.
"""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from fewbit.config.spec import AttentionConfig, QuantizationSpec
from fewbit.contents import ATTENTION_SLOTS
from fewbit.errors import ArchitectureError, ConfigError
from fewbit.nn import saving
from fewbit.nn.activation import ActivationQuantizer
from fewbit.nn.exchange import Exchange
from fewbit.tensor import QuantizedActivation

IMPLEMENTATION = "fewbit"
IMPLEMENTATION_OVER = {"sdpa": IMPLEMENTATION, "eager": "fewbit-eager"}
ATTRIBUTE = "attention_quantizers"
"""Where an attention module holds its AttentionQuantizers."""

OWN_WAYS = dict.fromkeys(("DecisionTransformerGPT2Attention", "GPT2Attention"), ("eager",)) | dict.fromkeys(
    ("AXK2Attention", "DeepseekV32Attention", "GlmMoeDsaAttention", "HYV4Attention", "MiniMaxM3VLAttention"),
    ("eager", "sdpa"),
)
"""Attention classes of transformers that do something else under some implementations: those."""

_REGISTRY, _EAGER = "ALL_ATTENTION_FUNCTIONS", "eager_attention_forward"  # in modeling files that have the interface
CACHED = "_fewbit_quantized_by_cache"
"""Attribute of keys and values that a cache has quantized, so that attention can refuse to do it again."""
_GUARDED = "_fewbit_attention_guarded"
_PREVIOUS = {name: previous for previous, name in IMPLEMENTATION_OVER.items()}


class HeadsQuantizer(ActivationQuantizer):
    """An ActivationQuantizer for tensors with heads [batch, heads, tokens, channels]. Granularities become tilings of
    a matrix, which is also what an `observer` gets:

        per_tensor    [batch · heads · tokens, channels], one scale [1, 1]
        per_channel   [batch · tokens · channels, heads], a scale per head [1, heads]
        per_token     [batch · tokens, heads · channels], a scale per token [batch · tokens, 1]
        per_group     [batch · heads · tokens, channels], scales [batch · heads · tokens, groups]

    `pad`: channels may be no multiple of the group size; zeros fill the last group while its scale is found.
    """

    def __init__(self, spec: QuantizationSpec, *args: Any, pad: bool = False, **options: Any) -> None:
        _check(spec)
        if spec.qscheme == "per_channel":
            spec = replace(spec, ch_axis=1)  # heads are the matrix's columns
        super().__init__(spec, *args, **options)
        self.pad = pad

    def forward(self, x: Tensor) -> Tensor:
        if x.numel() == 0:
            return x
        if self.observer is not None and self.observed(self.to_matrix(x)):
            return x
        channels = x.shape[-1]
        if self.pad and self.spec.group_size is not None and channels % self.spec.tiling.span:
            x = nn.functional.pad(x, (0, -channels % self.spec.tiling.span))
        quantized = self.from_matrix(super().forward(self.to_matrix(x)), x.shape)
        return quantized[..., :channels].contiguous()  # one layout, so one rounding, whatever the granularity

    def to_matrix(self, x: Tensor) -> Tensor:
        """[batch, heads, tokens, channels] → the matrix whose tiles share scales."""
        if self.spec.qscheme == "per_channel":
            return x.permute(0, 2, 3, 1).flatten(0, 2)
        if self.spec.qscheme == "per_token":
            return x.transpose(1, 2).flatten(2).flatten(0, 1)
        return x.reshape(-1, x.shape[-1])

    def from_matrix(self, matrix: Tensor, shape: tuple[int, ...]) -> Tensor:
        """Inverse of `to_matrix` for a tensor of `shape`."""
        batch, heads, tokens, channels = shape
        if self.spec.qscheme == "per_channel":
            return matrix.reshape(batch, tokens, channels, heads).permute(0, 3, 1, 2)
        if self.spec.qscheme == "per_token":
            return matrix.reshape(batch, tokens, heads, channels).transpose(1, 2)
        return matrix.reshape(shape)


class AttentionQuantizers(nn.ModuleDict):
    """What one attention module quantizes: HeadsQuantizers by slot."""

    def quantized(self, slot: str, x: Tensor) -> Tensor:
        """x as its slot quantizes it; as it is, if the slot is not there."""
        return self[slot](x) if slot in self else x


def register() -> None:
    """Make fewbit's implementations, and the masks they take, known to transformers; again is no difference."""
    saving.guard()
    masks = AttentionMaskInterface()
    for previous, name in IMPLEMENTATION_OVER.items():
        AttentionInterface.register(name, partial(_attention, previous))
        AttentionMaskInterface.register(name, masks[previous])


def attach(
    model: nn.Module,
    config: AttentionConfig,
    states: Mapping[str, QuantizedActivation] | None = None,
    dtype: torch.dtype = torch.float32,
    persistent: bool = False,
    changes: Exchange | None = None,
) -> dict[str, AttentionQuantizers]:
    """Quantize inside every attention module of a transformers model or of one of its blocks, in place of quantizers
    that are there: all of them, or none if something is raised.

    Args:
        states: what calibration found, by MODULE.key, MODULE.value, MODULE.query, MODULE.probabilities (other names
            are left to others). Static specs without a state have to be calibrated before they quantize.
        dtype, persistent: see ActivationQuantizer.
        changes: take what is to be done, which is done at once without it.

    Returns the quantizers by the names of their modules. ArchitectureError if the attention cannot be reached.
    """
    implementations, modules = check(model, config), attention_modules(model)
    register()
    made, attached = Exchange(), {}
    for name, module in modules.items():
        known = states_of(name, states)
        quantizers = {
            slot: HeadsQuantizer(spec, known.get(slot), dtype, persistent, pad=slot == "probabilities")
            for slot, spec in config.specs.items()
        }
        attached[name] = AttentionQuantizers(quantizers)
        weight = next(module.parameters(), None)
        if weight is not None and not weight.is_meta:  # a skeleton's scales go where its block is loaded
            attached[name].to(weight.device)
        made.item(module._modules, ATTRIBUTE, attached[name])
        if not hasattr(module, _GUARDED):
            hooks = module._forward_pre_hooks
            made.item(hooks, RemovableHandle(hooks).id, _refuse_bypass)
            made.item(vars(module), _GUARDED, True)
        made.beforehand(module.config, "_attn_implementation", implementations[name])
    made.commit() if changes is None else changes.include(made)
    return attached


def check(model: nn.Module, config: AttentionConfig) -> dict[str, str]:
    """The implementation that each attention module would run, by its name. ArchitectureError or ConfigError if
    `attach` could not quantize as `config` says."""
    for spec in config.specs.values():
        _check(spec)
    modules = attention_modules(model)
    if not modules:
        raise ArchitectureError(
            f"{type(model).__name__} has no attention that goes through transformers' attention interface, so its "
            "keys and values cannot be quantized; leave attention (the KV cache) out of the recipe"
        )
    return {name: _implementation_for(name, module, config) for name, module in modules.items()}


def detach(model: nn.Module) -> None:
    """Take the quantizers of a model or block off. A whole model gets its implementation back, too; a block shares its
    config with others, whose quantizers would stop working, and computes what it did before either way."""
    for module in model.modules():
        if hasattr(module, ATTRIBUTE):
            delattr(module, ATTRIBUTE)
    if isinstance(model, PreTrainedModel):
        for module in attention_modules(model).values():
            name = module.config._attn_implementation
            module.config._attn_implementation = _PREVIOUS.get(name, name)


def attention_modules(model: nn.Module) -> dict[str, Any]:
    """Attention modules of the decoder that can be reached, by name: their file looks implementations up by name, and
    they have a layer's index (a place in the KV cache) and what logits are scaled by."""
    return {
        name: module
        for name, module in model.named_modules()
        if getattr(module, "layer_idx", None) is not None
        and hasattr(module, "scaling")
        and hasattr(getattr(module, "config", None), "_attn_implementation")
        and _REGISTRY in _names(module)
    }


def states_of(module: str, states: Mapping[str, QuantizedActivation] | None) -> dict[str, QuantizedActivation]:
    """One module's states by slot, of those by MODULE.SLOT."""
    return {slot: states[f"{module}.{slot}"] for slot in ATTENTION_SLOTS if states and f"{module}.{slot}" in states}


def _attention(
    previous: str,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """What transformers calls under fewbit's names. query [batch, heads, queries, channels], key and value [batch, KV
    heads, tokens, channels] → output [batch, queries, heads, channels], and probabilities where they are computed."""
    quantizers: AttentionQuantizers | None = getattr(module, ATTRIBUTE, None)
    if quantizers is None:
        return _previous(module, previous)(module, query, key, value, attention_mask, **kwargs)
    for slot, x in (("key", key), ("value", value)):
        if slot in quantizers and hasattr(x, CACHED):
            raise ConfigError(
                f"the cache has quantized {slot}s already and attention is set to do it again; "
                "use QuantizedCache on a model without quantized keys and values (detach), or a plain cache"
            )
    query, key, value = (quantizers.quantized(s, x) for s, x in (("query", query), ("key", key), ("value", value)))
    if "probabilities" not in quantizers:
        return _previous(module, previous)(module, query, key, value, attention_mask, **kwargs)

    if previous == "sdpa":
        attention_mask = _additive_mask(module, query, key, attention_mask, kwargs.get("is_causal"))
    # The family's own code computes probabilities (soft caps, sinks …). One channel of value: the product is not used.
    _, weights = _previous(module, "eager")(module, query, key, value[..., :1], attention_mask, **kwargs)
    assert weights is not None
    weights = quantizers.quantized("probabilities", weights)
    output = weights @ value.repeat_interleave(weights.shape[1] // value.shape[1], dim=1)
    return output.transpose(1, 2).contiguous(), weights


def _additive_mask(
    module: nn.Module, query: Tensor, key: Tensor, mask: Tensor | None, is_causal: bool | None
) -> Tensor | None:
    """The mask of sdpa (True: attend; None: causal unless there is one query) as eager attention adds it to logits."""
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    if mask is None and query.shape[2] > 1 and causal:
        mask = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=query.device).tril()[None, None]
    if mask is None or mask.dtype != torch.bool:
        return mask
    return torch.zeros_like(mask, dtype=query.dtype).masked_fill(~mask, torch.finfo(query.dtype).min)


def _refuse_bypass(module: Any, _args: Any) -> None:
    """ConfigError if somebody gave the model another attention implementation, which knows of no quantizers."""
    name = module.config._attn_implementation
    if hasattr(module, ATTRIBUTE) and name not in _PREVIOUS:
        raise ConfigError(
            f"attention implementation {name!r} would leave out the quantizers of {type(module).__name__}; "
            f"set {IMPLEMENTATION!r} again, or take them off (fewbit.nn.attention.detach)"
        )


def _names(module: nn.Module) -> dict[str, Any]:
    """What the file defines in which a module's forward is written."""
    return inspect.unwrap(type(module).forward).__globals__  # type: ignore[no-any-return]


def _previous(module: nn.Module, name: str) -> Callable[..., tuple[Tensor, Tensor | None]]:
    """What the module's own file understands by an implementation's name."""
    names = _names(module)
    return names[_REGISTRY].get(name, names.get(_EAGER))  # type: ignore[no-any-return]


def _implementation_for(name: str, module: Any, config: AttentionConfig) -> str:
    """The name under which a module is to run, after a look at whether it can and at what does not fit its heads."""
    current = module.config._attn_implementation or "eager"
    previous = _PREVIOUS.get(current, current)
    if previous not in IMPLEMENTATION_OVER:
        raise ConfigError(
            f"{name} runs attention implementation {previous!r}, inside which nothing can be quantized; load the "
            "model with attn_implementation='sdpa'"
        )
    if any(previous in OWN_WAYS.get(kind.__name__, ()) for kind in type(module).__mro__):
        raise ArchitectureError(
            f"{name} ({type(module).__name__}) does something of its own under {previous!r}, which would be lost with "
            "quantized attention; leave attention (the KV cache) out of the recipe"
        )
    if _EAGER not in _names(module) and (previous == "eager" or config.probabilities is not None):
        raise ArchitectureError(
            f"{name} ({type(module).__name__}) has no eager attention, whose probabilities could be quantized; leave "
            "probabilities out of the recipe"
        )
    head_dim: Any = getattr(module, "head_dim", None)
    for slot, spec in config.specs.items() if isinstance(head_dim, int) else ():
        if slot != "probabilities" and spec.group_size and head_dim % spec.tiling.span:
            raise ConfigError(
                f"attention {slot}: group_size {spec.tiling.span} does not divide {name}'s {head_dim} channels"
            )
    return IMPLEMENTATION_OVER[previous]


def _check(spec: QuantizationSpec) -> None:
    """ConfigError for what has no meaning for tensors with heads."""
    if spec.qscheme == "per_block":
        raise ConfigError("attention: qscheme per_block is for matrices; use per_group, per_token or per_channel")
    if spec.qscheme == "per_channel" and spec.ch_axis not in (None, 1):
        raise ConfigError(f"attention: per_channel is a scale per head (ch_axis 1), not along ch_axis {spec.ch_axis}")
    if spec.qscheme == "per_group" and spec.ch_axis not in (None, 1, -1):
        raise ConfigError(f"attention: groups run along a head's channels, not along ch_axis {spec.ch_axis}")
    if spec.first_stage is not None:
        raise ConfigError("attention: first_stage is for weights; use residual, or leave it out")

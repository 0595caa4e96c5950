"""A KV cache that holds codes and scales: transformers' Cache for `model(…, past_key_values=)` and `generate`.

Every token's keys and values are encoded once, when they arrive, and decoded whenever attention reads them. The result
is what attention computes over a whole sequence with the same quantizers on the model (nn/attention.py), up to the
rounding of products of one token and of many; the two are alternatives.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import CacheLayerMixin, DynamicLayer, DynamicSlidingWindowLayer

from fewbit.config.spec import AttentionConfig
from fewbit.errors import ConfigError
from fewbit.nn.attention import CACHED, HeadsQuantizer, attention_modules, states_of
from fewbit.numerics.packing import pack, unpack
from fewbit.tensor import QuantizedActivation, from_unsigned

Parts = dict[str, Tensor]
"""What is stored of keys or values: packed codes, and scales and zero points if they come with the tokens. All are
[batch, heads or 1, tokens, …], so that tokens and sequences can be appended and dropped without decoding."""


class QuantizedCache(Cache):  # type: ignore[misc]
    """A growing cache of quantized keys and values; sliding windows keep what transformers' own cache keeps of them.

    Args:
        config: of the model.
        attention: specs of key and value; one that is None is stored as it is. Query and probabilities are refused.
        states: per layer, what calibration found for static specs ({"key": …, "value": …}).
        dtype: what static scales are stored in where the spec leaves it to the checkpoint.

    ConfigError for dynamic scales that tokens share (per_tensor, per_channel): a cache sees one token after the other.
    """

    def __init__(
        self,
        config: PreTrainedConfig,
        attention: AttentionConfig,
        states: Sequence[Mapping[str, QuantizedActivation]] | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        for slot in sorted(attention.specs.keys() - {"key", "value"}):
            raise ConfigError(f"a cache holds no {slot}; quantize it inside attention (fewbit.nn.attention.attach)")
        known, layers = dict(enumerate(states or ())), []
        for index, plain in enumerate(DynamicCache(config=config).layers):
            stores = [
                _TokenStore(_quantizer(f"{slot} of layer {index}", spec, known.get(index, {}).get(slot), dtype))
                for slot, spec in (("key", attention.key), ("value", attention.value))
            ]
            layers.append(_quantized_layer(plain, *stores))
        super().__init__(layers=layers)

    @classmethod
    def for_model(
        cls,
        model: PreTrainedModel,
        attention: AttentionConfig,
        states: Mapping[str, QuantizedActivation] | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> QuantizedCache:
        """A cache for `model`, with states by the full names of its attention modules (MODULE.key, MODULE.value)."""
        modules = attention_modules(model).items()
        by_layer = {module.layer_idx: states_of(name, states) for name, module in modules}
        of_layers = [by_layer.get(index, {}) for index in range(max(by_layer, default=-1) + 1)]
        return cls(model.config, attention, of_layers, dtype)

    def nbytes(self) -> int:
        """Bytes that keys and values take: codes, scales and zero points."""
        return sum(
            store.nbytes() for layer in self.layers if isinstance(layer, QuantizedLayer) for store in layer.stores
        )


@torch.no_grad()
def encode(quantizer: HeadsQuantizer, x: Tensor) -> Parts:
    """Keys or values [batch, heads, tokens, channels] as codes packed along the channels, and their own scales."""
    parts = _encode_once(quantizer, x)
    if quantizer.spec.residual:
        rest = x - _decode_once(quantizer, parts, x.shape[-1]).to(x.dtype)
        parts |= {f"residual_{name}": part for name, part in _encode_once(quantizer, rest).items()}
    return parts


@torch.no_grad()
def decode(quantizer: HeadsQuantizer, parts: Parts, channels: int, dtype: torch.dtype) -> Tensor:
    """Inverse of `encode`, up to what quantization loses: [batch, heads, tokens, channels] in `dtype`."""
    x = _decode_once(quantizer, parts, channels).to(dtype)
    if quantizer.spec.residual:
        x = x + _decode_once(quantizer, parts, channels, "residual_").to(dtype)
    return x


def _decode_once(quantizer: HeadsQuantizer, parts: Parts, channels: int, stage: str = "") -> Tensor:
    """Values (float32, or what they were cast to) of one stage of codes."""
    spec = quantizer.spec
    packed, scale, offset = (parts.get(stage + name) for name in ("codes", "scale", "zero_point"))
    assert packed is not None
    if spec.format.is_cast:
        return packed
    codes = from_unsigned(unpack(packed, spec.bits, channels), spec)
    stored = quantizer.scale if scale is None else quantizer.to_matrix(scale)
    zero = quantizer.zero_point if offset is None else quantizer.to_matrix(offset)
    assert stored is not None
    values = quantizer.state().decode(quantizer.to_matrix(codes), quantizer.format(), stored, zero)
    return quantizer.from_matrix(values, codes.shape)


def _encode_once(quantizer: HeadsQuantizer, x: Tensor) -> Parts:
    spec = quantizer.spec
    if spec.format.is_cast:
        return {"codes": x.to(spec.format.code_dtype)}
    codes, stored, zero = quantizer.encode(quantizer.to_matrix(x))
    codes = quantizer.from_matrix(codes, x.shape)
    offset = int(spec.format.smallest) if spec.format.is_integer else 0
    parts = {"codes": pack(codes.to(torch.int16) - offset, spec.bits)}
    if spec.is_dynamic:
        batch, heads, tokens, _ = x.shape
        shape = (batch, 1 if spec.qscheme == "per_token" else heads, tokens, stored.shape[-1])
        parts["scale"] = quantizer.from_matrix(stored, shape)
        if zero is not None:
            parts["zero_point"] = quantizer.from_matrix(zero, shape)
    return parts


class _TokenStore:
    """Keys or values of one layer, encoded."""

    def __init__(self, quantizer: HeadsQuantizer | None) -> None:
        self.quantizer = quantizer
        self.parts: Parts = {}
        self.channels = 0
        self.dtype = torch.float32

    @property
    def tokens(self) -> int:
        return self.parts["codes"].shape[-2] if self.parts else 0

    def append(self, x: Tensor) -> None:
        """Add tokens [batch, heads, tokens, channels]."""
        self.channels, self.dtype = x.shape[-1], x.dtype
        if self.quantizer is not None:
            self.quantizer.to(x.device)
        new = {"codes": x} if self.quantizer is None else encode(self.quantizer, x)
        before = self.parts
        self.parts = {name: torch.cat([before[name], new[name]], -2) for name in before} if before else new

    def read(self) -> Tensor:
        """All tokens [batch, heads, tokens, channels] in the dtype they came in."""
        if self.quantizer is None:
            return self.parts["codes"]
        x = decode(self.quantizer, self.parts, self.channels, self.dtype)
        setattr(x, CACHED, True)
        return x

    def nbytes(self) -> int:
        scales = () if self.quantizer is None else self.quantizer.buffers()
        return sum(tensor.nbytes for tensor in (*self.parts.values(), *scales))


class QuantizedLayer(DynamicLayer):  # type: ignore[misc]
    """Keeps all tokens in its stores; `keys` and `values` of the base class stay empty."""

    def __init__(self, key: _TokenStore, value: _TokenStore, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.stores = (key, value)

    def update(self, key_states: Tensor, value_states: Tensor, *_args: Any, **_kwargs: Any) -> tuple[Tensor, Tensor]:
        """Add tokens and give back all that the new tokens may attend to."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        for store, x in zip(self.stores, (key_states, value_states), strict=True):
            store.append(x)
        return self.stores[0].read(), self.stores[1].read()

    def get_seq_length(self) -> int:
        return self.stores[0].tokens

    def reset(self) -> None:
        for store in self.stores:
            store.parts = {}

    def crop(self, tokens_to_remove: int) -> None:
        """Drop the last tokens; their number is given as a negative one, as transformers does."""
        if tokens_to_remove > 0:
            raise ConfigError(f"crop({tokens_to_remove}): give a negative number, that of the tokens to drop")
        self._change(lambda part: part[..., : part.shape[-2] + tokens_to_remove, :])

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._change(lambda part: part.index_select(0, beam_idx.to(part.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._change(lambda part: part.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        self._change(lambda part: part[indices.to(part.device)])

    def offload(self) -> None:
        self._change(lambda part: part.to("cpu"))

    def prefetch(self) -> None:
        if self.is_initialized:
            self._change(lambda part: part.to(self.device))

    def _change(self, change: Callable[[Tensor], Tensor]) -> None:
        """Replace every part by change(part); copies, so that nothing keeps what was dropped in memory."""
        for store in self.stores:
            store.parts = {name: change(part).clone() for name, part in store.parts.items()}


class QuantizedSlidingWindowLayer(QuantizedLayer, DynamicSlidingWindowLayer):  # type: ignore[misc]
    """Keeps the tokens that the next one may attend to. Mask sizes are those of transformers' own layer."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        self.cumulative_length += key_states.shape[-2]
        everything = super().update(key_states, value_states, *args, **kwargs)
        if not getattr(self, "record_past", False):
            self._keep_window()
        return everything

    def get_seq_length(self) -> int:
        return int(self.cumulative_length)

    def reset(self) -> None:
        super().reset()
        self.cumulative_length = 0

    def crop(self, tokens_to_remove: int) -> None:
        length = self.cumulative_length + tokens_to_remove
        if self.stores[0].tokens + tokens_to_remove < min(self.sliding_window - 1, length):
            raise ConfigError(
                "a sliding window has dropped the tokens that a crop would bring back; "
                "call activate_past_recording before the tokens that may be cropped"
            )
        super().crop(tokens_to_remove)
        self.cumulative_length = length
        self._keep_window()

    def _keep_window(self) -> None:
        kept = self.sliding_window - 1
        if self.stores[0].tokens > kept:
            self._change(lambda part: part[..., part.shape[-2] - kept :, :])


def _quantized_layer(plain: Any, key: _TokenStore, value: _TokenStore) -> Any:
    """The layer that stands in for one of transformers' DynamicCache."""
    if type(plain) is DynamicLayer:
        return QuantizedLayer(key, value)
    if type(plain) is DynamicSlidingWindowLayer:
        return QuantizedSlidingWindowLayer(key, value, sliding_window=plain.sliding_window)
    if not isinstance(plain, CacheLayerMixin):
        return plain  # linear attention: it has a state, but neither keys nor values
    raise ConfigError(
        f"the model caches more than keys and values ({type(plain).__name__}), which cannot be quantized"
    )


def _quantizer(what: str, spec: Any, state: QuantizedActivation | None, dtype: torch.dtype) -> HeadsQuantizer | None:
    if spec is None:
        return None
    spec.check_stored(what)
    quantizer = HeadsQuantizer(spec, state, dtype)
    if spec.is_dynamic and not spec.format.is_cast and spec.qscheme in ("per_tensor", "per_channel"):
        raise ConfigError(
            f"{what}: a cache sees one token after the other, so they cannot share dynamic scales ({spec.qscheme}); "
            "use per_token, per_group, or static scales"
        )
    if quantizer.needs_calibration:
        raise ConfigError(f"{what}: its static scale is missing; give `states`, what calibration found")
    return quantizer

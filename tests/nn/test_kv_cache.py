"""The quantized KV cache: token by token it equals quantized attention over the whole sequence, in less memory."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, LlamaConfig, PreTrainedModel
from transformers.cache_utils import DynamicIndexedLayer

from fewbit.config.spec import AttentionConfig, QuantizationSpec
from fewbit.errors import ConfigError
from fewbit.nn.attention import HeadsQuantizer, attach, attention_modules, detach
from fewbit.nn.kv_cache import QuantizedCache, _quantized_layer, _TokenStore, decode, encode
from fewbit.tensor import QuantizedActivation

TOKENS = 24  # more than the sliding windows of the tiny models
WINDOW = 8


def spec(dtype: str = "int8", qscheme: str = "per_token", **fields: Any) -> QuantizationSpec:
    """A dynamic minmax spec; unsigned formats are affine."""
    return QuantizationSpec(
        **{
            "dtype": dtype,
            "qscheme": qscheme,
            "symmetric": not dtype.startswith("u"),
            "observer": "minmax",
            "is_dynamic": True,
        }
        | fields
    )


def short(given: object) -> str:
    """A test's name."""
    if isinstance(given, QuantizationSpec):
        return f"{given.dtype}-{given.qscheme}-{given.scale_type}"
    return str(given)


UINT4_GROUPS = spec("uint4", "per_group", group_size=8)
STATIC_FP8 = spec("e4m3", "per_tensor", is_dynamic=False)
STATIC_HEADS = spec("int8", "per_channel", is_dynamic=False)
STATIC_AFFINE = spec("uint8", "per_tensor", is_dynamic=False)

PAIRS = {  # key and value
    "int8 per token": (spec(), spec()),
    "int4 groups, affine": (UINT4_GROUPS, UINT4_GROUPS),
    "fp8, static": (STATIC_FP8, STATIC_FP8),
    "int8 heads, static": (STATIC_HEADS, STATIC_HEADS),
    "uint8, static": (STATIC_AFFINE, spec("int3", residual=True)),
    "mxfp4": (spec("e2m1", "per_group", group_size=16, scale_type="e8m0"), spec("e4m3")),
    "only values": (None, spec("int4")),
    "only keys, cast": (spec("bfloat16", "per_tensor", observer="placeholder"), None),
}


@pytest.fixture
def precise_model(random_model: Callable[..., PreTrainedModel]) -> Callable[..., PreTrainedModel]:
    """random_model in float64: products of one token and of many differ in the last bit, and in float32 that moves
    some values across the edge between two codes."""

    def make(family: str) -> PreTrainedModel:
        return random_model(family).double()

    return make


def static_states(config: AttentionConfig, model: PreTrainedModel) -> dict[str, QuantizedActivation]:
    """Scales and zero points of every layer's own, as calibration might have found them."""
    states = {}
    for layer, name in enumerate(attention_modules(model)):
        for slot, given in (("key", config.key), ("value", config.value)):
            if given is None or not given.needs_data:
                continue
            columns = model.config.num_key_value_heads if given.qscheme == "per_channel" else 1
            steps = torch.linspace(0.9, 1.1, columns) * (1 + layer / 10)
            scale = (steps * (0.1 if given.format.name == "e4m3" else 0.05)).unsqueeze(0)
            zero = None if given.symmetric else torch.full((1, columns), 120, dtype=torch.uint8)
            states[f"{name}.{slot}"] = QuantizedActivation(given, scale, zero)
    return states


def token_ids(batch: int = 2, tokens: int = TOKENS) -> Tensor:
    return torch.randint(1, 300, (batch, tokens), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def logits(model: PreTrainedModel, ids: Tensor, **inputs: Any) -> Tensor:
    return model(ids, **inputs).logits


def in_steps(model: PreTrainedModel, ids: Tensor, cache: Any, steps: list[int]) -> Tensor:
    """Logits of `ids`, a few tokens at a time."""
    return torch.cat([logits(model, part, past_key_values=cache) for part in ids.split(steps, dim=1)], dim=1)


# Every pair with and without a window; every family with zero points of both kinds, found for each token and fixed.
FAMILIES_AND_PAIRS = [
    *((family, pair) for family in ("llama", "mistral") for pair in PAIRS),
    *(
        (family, pair)
        for family in ("qwen2", "qwen3", "gemma3_text")
        for pair in ("int4 groups, affine", "uint8, static")
    ),
]


@pytest.mark.parametrize(("family", "pair"), FAMILIES_AND_PAIRS)
def test_token_by_token_equals_the_whole_sequence(
    precise_model: Callable[..., PreTrainedModel], family: str, pair: str
) -> None:
    model, ids = precise_model(family), token_ids()
    key, value = PAIRS[pair]
    config = AttentionConfig(key=key, value=value)
    states = static_states(config, model)
    full = logits(model, ids)
    attach(model, config, states)
    whole = logits(model, ids)
    detach(model)
    assert float((whole - full).abs().max()) > 1e-3  # something is quantized
    for steps in ([1] * TOKENS, [5, 1, 1, WINDOW + 2, 1, 6]):
        cached = in_steps(model, ids, QuantizedCache.for_model(model, config, states), steps)
        torch.testing.assert_close(cached, whole, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("search", [{}, {"num_beams": 3}, {"prompt_lookup_num_tokens": 2}])
def test_generate_gives_the_tokens_of_quantized_attention(
    precise_model: Callable[..., PreTrainedModel], family: str, search: dict[str, Any]
) -> None:
    model, ids = precise_model(family), token_ids(batch=1, tokens=12).repeat(1, 2)
    config = AttentionConfig(key=spec("int4"), value=UINT4_GROUPS)
    settings = {"max_new_tokens": 16, "do_sample": False, "eos_token_id": None, "pad_token_id": 0} | search
    attach(model, config)
    expected = model.generate(ids, **settings)
    detach(model)
    assert not torch.equal(model.generate(ids, **settings), expected)
    assert torch.equal(model.generate(ids, past_key_values=QuantizedCache(model.config, config), **settings), expected)


def test_a_padded_sequence_generates_what_it_does_alone(
    precise_model: Callable[..., PreTrainedModel], family: str
) -> None:
    model, ids = precise_model(family), token_ids()
    config = AttentionConfig(key=spec("int8"), value=spec("int8"))
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    settings = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    padded = model.generate(ids, attention_mask=mask, past_key_values=QuantizedCache(model.config, config), **settings)
    alone = model.generate(ids[:1, 5:], past_key_values=QuantizedCache(model.config, config), **settings)
    assert torch.equal(padded[:1, 5:], alone)


def test_more_bits_lose_less(precise_model: Callable[..., PreTrainedModel], family: str) -> None:
    model, ids = precise_model(family), token_ids()
    full = logits(model, ids)
    loss = {}
    for bits in (4, 8):
        config = AttentionConfig(key=spec(f"int{bits}"), value=spec(f"int{bits}"))
        cached = in_steps(model, ids, QuantizedCache(model.config, config), [1] * TOKENS)
        loss[bits] = float((cached - full).square().mean())
    assert 0 < 20 * loss[8] < loss[4]


X = torch.randn(2, 3, 5, 32, generator=torch.Generator().manual_seed(0)) * torch.logspace(0, 1, 32)


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "quantized",
    [
        *(spec(name) for name in ("int2", "int3", "int8", "uint5", "e4m3", "e5m2", "e3m2", "e2m3", "e2m1")),
        spec("int4", "per_group", group_size=16, scale_type="e8m0"),
        spec("int5", "per_group", group_size=2, scale_type="microexponent"),
        spec("int4", round_method="floor", scale_type="pof2", clip_ratio=0.8),
        spec("float16", "per_tensor", observer="placeholder"),
    ],
    ids=short,
)
def test_decoding_gives_what_the_fake_quantizer_computes(
    quantized: QuantizationSpec, dtype: torch.dtype, residual: bool
) -> None:
    quantizer, x = HeadsQuantizer(replace(quantized, residual=residual)), X.to(dtype)
    parts = encode(quantizer, x)
    assert torch.equal(decode(quantizer, parts, x.shape[-1], dtype), quantizer(x))
    assert any(name.startswith("residual") for name in parts) == residual


def test_two_level_scales_take_their_global_scale_from_calibration() -> None:
    nvfp4 = spec("e2m1", "per_group", group_size=16, scale_type="e4m3")
    quantizer = HeadsQuantizer(nvfp4, QuantizedActivation(nvfp4, global_scale=2.0**-5))
    parts = encode(quantizer, X)
    assert torch.equal(decode(quantizer, parts, 32, X.dtype), quantizer(X))
    assert sum(part.nbytes for part in parts.values()) == X.numel() * 4.5 / 8
    with pytest.raises(ConfigError, match=r"key of layer 0.*give `states`"):
        QuantizedCache(LlamaConfig(num_hidden_layers=1), AttentionConfig(key=nvfp4))


@pytest.mark.parametrize(
    ("quantized", "bits"),
    [
        (spec("int8"), 8 + 32 / 32),  # a float32 scale per token, that is for 2 heads of 16 channels
        (spec("int4"), 4 + 32 / 32),
        (spec("uint4", "per_group", group_size=8), 4 + (32 + 8) / 8),
        (spec("int4", "per_group", group_size=16, scale_dtype="bfloat16"), 4 + 16 / 16),
        (spec("e2m1", "per_group", group_size=16, scale_type="e8m0"), 4 + 8 / 16),
    ],
    ids=short,
)
def test_memory_is_that_of_codes_and_scales(
    random_model: Callable[..., PreTrainedModel], quantized: QuantizationSpec, bits: float
) -> None:
    model, ids = random_model("llama"), token_ids()
    plain, cache = (
        DynamicCache(config=model.config),
        QuantizedCache.for_model(model, AttentionConfig(quantized, quantized)),
    )
    for filled in (plain, cache):
        in_steps(model, ids, filled, [TOKENS - 1, 1])
    elements = sum(layer.keys.numel() + layer.values.numel() for layer in plain.layers)
    assert cache.nbytes() == elements * bits / 8
    held = [part for layer in cache.layers for store in layer.stores for part in store.parts.values()]
    assert sum(part.untyped_storage().nbytes() for part in held) == cache.nbytes()  # and nothing else is kept alive


def test_sliding_windows_keep_the_window_only(precise_model: Callable[..., PreTrainedModel]) -> None:
    model, ids = precise_model("mistral"), token_ids(tokens=2 * TOKENS)
    cache = QuantizedCache.for_model(model, AttentionConfig(key=spec(), value=spec()))
    plain = DynamicCache(config=model.config)
    sizes = []
    for token in ids.split(1, dim=1):
        for filled in (cache, plain):
            logits(model, token, past_key_values=filled)
        sizes.append(cache.nbytes())
        assert cache.layers[0].stores[0].tokens == plain.layers[0].keys.shape[-2]
        assert cache.get_seq_length() == plain.get_seq_length()
        assert cache.get_mask_sizes(1, 0) == plain.get_mask_sizes(1, 0)
    assert len(set(sizes[WINDOW:])) == 1
    held = [part for layer in cache.layers for store in layer.stores for part in store.parts.values()]
    assert sum(part.untyped_storage().nbytes() for part in held) == cache.nbytes()


def test_tokens_that_were_cropped_leave_no_trace(precise_model: Callable[..., PreTrainedModel], family: str) -> None:
    model, ids = precise_model(family), token_ids()
    config = AttentionConfig(key=spec("int4"), value=UINT4_GROUPS)
    expected = in_steps(model, ids, QuantizedCache(model.config, config), [1] * TOKENS)
    cache = QuantizedCache(model.config, config)
    cache.activate_past_recording()
    steps = list(ids.split(4, dim=1))
    found = []
    for part, other in zip(steps, steps[1:] + steps[:1], strict=True):
        found.append(logits(model, part, past_key_values=cache))
        cache.crop(0)
        logits(model, other[:, :3], past_key_values=cache)
        cache.crop(-3)
    torch.testing.assert_close(torch.cat(found, dim=1), expected, atol=1e-5, rtol=1e-5)


def test_a_crop_that_needs_dropped_tokens_is_refused(random_model: Callable[..., PreTrainedModel]) -> None:
    model = random_model("mistral")
    cache = QuantizedCache.for_model(model, AttentionConfig(key=spec()))
    logits(model, token_ids(), past_key_values=cache)
    with pytest.raises(ConfigError, match="activate_past_recording"):
        cache.crop(-1)
    with pytest.raises(ConfigError, match="negative"):
        cache.crop(3)


def test_a_reset_cache_is_as_new(precise_model: Callable[..., PreTrainedModel], family: str) -> None:
    model, ids = precise_model(family), token_ids()
    cache = QuantizedCache.for_model(model, AttentionConfig(key=spec(), value=spec()))
    first = in_steps(model, ids, cache, [TOKENS - 2, 2])
    cache.reset()
    assert (cache.nbytes(), cache.get_seq_length()) == (0, 0)
    assert torch.equal(in_steps(model, ids, cache, [TOKENS - 2, 2]), first)


def test_sequences_can_be_selected_and_repeated(precise_model: Callable[..., PreTrainedModel], family: str) -> None:
    model, ids = precise_model(family), token_ids(batch=3)
    config = AttentionConfig(key=spec("int4"), value=UINT4_GROUPS)
    chosen = torch.tensor([2, 0])
    expected = in_steps(model, ids[chosen].repeat_interleave(2, dim=0), QuantizedCache(model.config, config), [20, 4])
    cache = QuantizedCache(model.config, config)
    logits(model, ids[:, :20], past_key_values=cache)
    cache.batch_select_indices(chosen)
    cache.batch_repeat_interleave(2)
    found = logits(model, ids[chosen].repeat_interleave(2, dim=0)[:, 20:], past_key_values=cache)
    torch.testing.assert_close(found, expected[:, 20:], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("slot", ["key", "value"])
def test_quantizing_twice_is_refused(random_model: Callable[..., PreTrainedModel], slot: str) -> None:
    model = random_model("llama")
    config = AttentionConfig(**{slot: spec()})
    attach(model, config)
    with pytest.raises(ConfigError, match=f"the cache has quantized {slot}s already"):
        logits(model, token_ids(), past_key_values=QuantizedCache(model.config, config))


def test_the_cache_goes_with_attention_that_quantizes_something_else(
    precise_model: Callable[..., PreTrainedModel], family: str
) -> None:
    model, ids = precise_model(family), token_ids()
    attach(model, AttentionConfig(key=spec("int4"), query=spec("int8"), value=spec("int4")))
    expected = logits(model, ids)
    attach(model, AttentionConfig(query=spec("int8"), value=spec("int4")))
    cache = QuantizedCache(model.config, AttentionConfig(key=spec("int4")))
    torch.testing.assert_close(in_steps(model, ids, cache, [1] * TOKENS), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (AttentionConfig(key=spec("int8", "per_tensor")), "key of layer 0.*cannot share dynamic scales"),
        (AttentionConfig(value=spec("int8", "per_channel")), "value of layer 0.*cannot share dynamic scales"),
        (AttentionConfig(key=STATIC_FP8), "key of layer 0: its static scale is missing"),
        (AttentionConfig(key=spec(), query=spec()), "a cache holds no query"),
        (AttentionConfig(probabilities=spec()), "a cache holds no probabilities"),
    ],
)
def test_what_a_cache_cannot_hold_is_refused(config: AttentionConfig, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        QuantizedCache(LlamaConfig(num_hidden_layers=1), config)


def test_layers_that_cache_more_than_keys_and_values_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"more than keys and values \(DynamicIndexedLayer\)"):
        _quantized_layer(DynamicIndexedLayer(), _TokenStore(None), _TokenStore(None))


def test_a_cache_filled_where_gradients_are_on_keeps_no_graph(random_model: Callable[..., PreTrainedModel]) -> None:
    model = random_model("llama")
    cache = QuantizedCache.for_model(model, AttentionConfig(key=UINT4_GROUPS, value=UINT4_GROUPS))
    with torch.enable_grad():
        model(torch.arange(1, 9).unsqueeze(0), past_key_values=cache)
    parts = [part for layer in cache.layers for store in layer.stores for part in store.parts.values()]
    assert parts
    assert not any(part.requires_grad for part in parts)
    copied = copy.deepcopy(cache)  # for a second answer to the same prompt
    model(torch.ones(1, 2, dtype=torch.int64), past_key_values=copied)
    assert (cache.get_seq_length(), copied.get_seq_length()) == (8, 10)

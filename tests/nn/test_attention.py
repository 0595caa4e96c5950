"""Quantization inside attention: bit-equal without quantizers, what each granularity means, where it is refused."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import greenlet
import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel

from fewbit.config.spec import AttentionConfig, QuantizationSpec
from fewbit.errors import ArchitectureError, ConfigError
from fewbit.models.blockwise import BlockwiseModel
from fewbit.nn.attention import (
    IMPLEMENTATION_OVER,
    OWN_WAYS,
    AttentionQuantizers,
    HeadsQuantizer,
    attach,
    attention_modules,
    detach,
    register,
)
from fewbit.tensor import QuantizedActivation

TOKENS = 24  # more than the sliding windows of the tiny models


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


STATIC_FP8 = spec("e4m3", "per_tensor", is_dynamic=False)
STATIC_HEADS = spec("int8", "per_channel", is_dynamic=False)


class MinMax:
    """An observer: the range of every tile over all batches."""

    def __init__(self, quantizer: HeadsQuantizer) -> None:
        self.spec, self.dtype = quantizer.spec, quantizer.dtype
        self.low = self.high = torch.zeros(())

    def __call__(self, x: Tensor) -> None:
        low, high = self.spec.tiling.split(x).aminmax(dim=-1)
        self.low, self.high = self.low.minimum(low), self.high.maximum(high)

    def result(self) -> QuantizedActivation:
        rule = self.spec.grid_rule(self.spec.scale_format(self.dtype))
        return QuantizedActivation(self.spec, *rule.from_range(self.low, self.high))


def calibrate(model: PreTrainedModel, attached: dict[str, AttentionQuantizers], ids: Tensor) -> Tensor:
    """Give every static quantizer the ranges of `ids`; returns the logits during calibration."""
    slots = [quantizer for found in attached.values() for quantizer in found.values()]
    quantizers = [quantizer for quantizer in slots if quantizer.needs_calibration]
    for quantizer in quantizers:
        quantizer.observer = MinMax(quantizer)
    seen = logits(model, ids)
    for quantizer in quantizers:
        quantizer.load(quantizer.observer.result())  # type: ignore[union-attr]
        quantizer.observer = None
    return seen


def token_ids(batch: int = 2, tokens: int = TOKENS) -> Tensor:
    return torch.randint(1, 300, (batch, tokens), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def logits(model: PreTrainedModel, ids: Tensor, **inputs: Any) -> Tensor:
    return model(ids, **inputs).logits


def left_padding(ids: Tensor, pad: int = 5) -> Tensor:
    mask = torch.ones_like(ids)
    mask[0, :pad] = 0
    return mask


@pytest.mark.parametrize("previous", ["sdpa", "eager"])
@pytest.mark.parametrize("padded", [False, True])
def test_without_quantizers_logits_are_bit_equal(
    random_model: Callable[..., PreTrainedModel], family: str, previous: str, padded: bool
) -> None:
    model, ids = random_model(family), token_ids()
    inputs = {"attention_mask": left_padding(ids)} if padded else {}
    model.config._attn_implementation = previous
    expected = logits(model, ids, **inputs)
    register()
    model.config._attn_implementation = IMPLEMENTATION_OVER[previous]
    assert torch.equal(logits(model, ids, **inputs), expected)


@pytest.mark.parametrize("previous", ["sdpa", "eager"])
def test_detach_gives_the_model_back_as_it_was(random_model: Callable[..., PreTrainedModel], previous: str) -> None:
    model, ids = random_model("qwen3"), token_ids()
    model.config._attn_implementation = previous
    expected, stored = logits(model, ids), set(model.state_dict())
    attach(model, AttentionConfig(key=spec("int4"), value=spec("int4")))
    assert set(model.state_dict()) == stored
    assert not torch.equal(logits(model, ids), expected)
    detach(model)
    assert model.config._attn_implementation == previous
    assert torch.equal(logits(model, ids), expected)


def test_attaching_twice_is_attaching_once(random_model: Callable[..., PreTrainedModel]) -> None:
    model, ids = random_model("llama"), token_ids()
    config = AttentionConfig(key=spec("int4"))
    attach(model, config)
    once = logits(model, ids)
    attach(model, config)
    assert torch.equal(logits(model, ids), once)
    detach(model)
    assert model.config._attn_implementation == "sdpa"


class QuantizingCache(DynamicCache):
    """What the hook must amount to, on another way: quantizers before the cache, which gets keys after RoPE."""

    def __init__(self, config: Any, key: HeadsQuantizer, value: HeadsQuantizer) -> None:
        super().__init__(config=config)
        self.key, self.value = key, value

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        return super().update(self.key(key_states), self.value(value_states), *args, **kwargs)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        (spec("int8"), spec("int4")),
        (spec("uint4", "per_group", group_size=8), spec("int8", "per_channel")),
        (spec("e4m3", "per_tensor"), spec("int4", "per_token", residual=True, clip_ratio=0.9)),
    ],
)
def test_keys_after_rope_and_values_are_what_is_quantized(
    random_model: Callable[..., PreTrainedModel], family: str, key: QuantizationSpec, value: QuantizationSpec
) -> None:
    model, ids = random_model(family), token_ids()
    cache = QuantizingCache(model.config, HeadsQuantizer(key), HeadsQuantizer(value))
    expected = logits(model, ids, past_key_values=cache)
    attach(model, AttentionConfig(key=key, value=value))
    assert torch.equal(logits(model, ids), expected)


def test_more_bits_lose_less(random_model: Callable[..., PreTrainedModel], family: str) -> None:
    model, ids = random_model(family), token_ids()
    full = logits(model, ids)
    loss = {}
    for bits in (2, 4, 8):
        attach(model, AttentionConfig(key=spec(f"int{bits}"), value=spec(f"int{bits}"), query=spec(f"int{bits}")))
        loss[bits] = float((logits(model, ids) - full).square().mean())
    assert 0 < 20 * loss[8] < loss[4] < loss[2]


X = torch.randn(2, 3, 5, 16, generator=torch.Generator().manual_seed(0)) * torch.logspace(0, 1, 16)


@pytest.mark.parametrize("dtype", ["int4", "uint4", "e4m3", "e2m1"])
def test_a_granularity_is_per_tensor_on_what_shares_a_scale(dtype: str) -> None:
    tensor = HeadsQuantizer(spec(dtype, "per_tensor"))
    of = {name: HeadsQuantizer(spec(dtype, name))(X) for name in ("per_channel", "per_token")}
    groups = HeadsQuantizer(spec(dtype, "per_group", group_size=8))(X)
    for head in range(3):
        assert torch.equal(of["per_channel"][:, [head]], tensor(X[:, [head]]))
    for batch in range(2):
        for token in range(5):
            assert torch.equal(of["per_token"][[batch], :, [token]], tensor(X[[batch], :, [token]].unsqueeze(0))[0])
    assert torch.equal(groups[1:, 2:, 3:4, 8:], tensor(X[1:, 2:, 3:4, 8:]))


@pytest.mark.parametrize("qscheme", ["per_tensor", "per_channel", "per_token", "per_group"])
def test_matrix_and_back_is_the_identity(qscheme: str) -> None:
    size = {"group_size": 8} if qscheme == "per_group" else {}
    quantizer = HeadsQuantizer(spec(qscheme=qscheme, **size))
    assert torch.equal(quantizer.from_matrix(quantizer.to_matrix(X), X.shape), X)


def test_padding_of_groups_does_not_change_whole_groups() -> None:
    padding = HeadsQuantizer(spec(qscheme="per_group", group_size=8), pad=True)
    plain = HeadsQuantizer(spec(qscheme="per_group", group_size=8))
    quantized = padding(X[..., :13])
    assert quantized.shape == (2, 3, 5, 13)
    assert torch.equal(quantized[..., :8], plain(X[..., :8]))


def test_observing_leaves_the_forward_as_it_is_and_static_states_can_be_stored(
    random_model: Callable[..., PreTrainedModel], family: str
) -> None:
    model, ids = random_model(family), token_ids()
    attach(model, AttentionConfig(query=spec("int8")))
    unobserved = logits(model, ids)
    config = AttentionConfig(key=STATIC_FP8, value=STATIC_HEADS, query=spec("int8"))
    attached = attach(model, config)
    assert torch.equal(calibrate(model, attached, ids), unobserved)
    quantized = logits(model, ids)
    assert not torch.equal(quantized, unobserved)

    stored = {
        f"{name}.{slot}": quantizer.state() for name, found in attached.items() for slot, quantizer in found.items()
    }
    first = next(iter(attached))
    heads = model.config.num_key_value_heads
    assert stored[f"{first}.key"].scale.shape == (1, 1)  # type: ignore[union-attr]
    assert stored[f"{first}.value"].scale.shape == (1, heads)  # type: ignore[union-attr]
    assert stored[f"{first}.query"].scale is None
    fresh = random_model(family)
    attach(fresh, config, stored)
    assert torch.equal(logits(fresh, ids), quantized)


@pytest.mark.parametrize("padded", [False, True])
def test_exact_probabilities_give_the_logits_of_sdpa(
    random_model: Callable[..., PreTrainedModel], family: str, padded: bool
) -> None:
    model, ids = random_model(family), token_ids()
    mask = left_padding(ids) if padded else torch.ones_like(ids)
    expected = logits(model, ids, attention_mask=mask)
    for quantizers in attach(model, AttentionConfig(probabilities=spec())).values():
        quantizers.probabilities = nn.Identity()  # type: ignore[assignment]
    found = logits(model, ids, attention_mask=mask)
    torch.testing.assert_close(found[mask == 1], expected[mask == 1], atol=2e-5, rtol=1e-5)


def test_probabilities_come_from_the_familys_own_eager_attention(
    random_model: Callable[..., PreTrainedModel],
) -> None:
    model, ids = random_model("gemma2", head_dim=16, attn_logit_softcapping=0.5, sliding_window=8), token_ids()
    model.config._attn_implementation = "eager"
    expected = logits(model, ids)
    blocks = [layer.self_attn for layer in model.model.layers]
    for block in blocks:
        block.attn_logit_softcapping = None
    uncapped = logits(model, ids)
    for block in blocks:
        block.attn_logit_softcapping = 0.5
    assert float((expected - uncapped).abs().max()) > 1e-2  # the soft cap matters
    for quantizers in attach(model, AttentionConfig(probabilities=spec())).values():
        quantizers.probabilities = nn.Identity()  # type: ignore[assignment]
    torch.testing.assert_close(logits(model, ids), expected, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("qscheme", ["per_tensor", "per_channel", "per_token", "per_group"])
def test_probabilities_of_more_bits_lose_less(random_model: Callable[..., PreTrainedModel], qscheme: str) -> None:
    model, ids = random_model("llama"), token_ids(tokens=TOKENS - 1)  # no multiple of the group size
    full = logits(model, ids)
    size = {"group_size": 16} if qscheme == "per_group" else {}
    loss = {}
    for bits in (4, 8):
        attach(model, AttentionConfig(probabilities=spec(f"uint{bits}", qscheme, **size)))
        loss[bits] = float((logits(model, ids) - full).square().mean())
    assert 0 < 20 * loss[8] < loss[4]


def test_padding_does_not_change_a_sequence(random_model: Callable[..., PreTrainedModel], family: str) -> None:
    model, ids = random_model(family), token_ids()
    attach(model, AttentionConfig(key=spec("int8"), value=spec("uint4", "per_group", group_size=8)))
    mask = left_padding(ids)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    padded = logits(model, ids, attention_mask=mask, position_ids=positions)
    alone = logits(model, ids[:1, 5:])
    torch.testing.assert_close(padded[:1, 5:], alone, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("first", ["attach", "enter"])
@pytest.mark.parametrize("probabilities", [None, spec("uint8")])
def test_blocks_loaded_one_by_one_compute_what_the_whole_model_does(
    checkpoint: Callable[..., Path], family: str, first: str, probabilities: QuantizationSpec | None
) -> None:
    config = AttentionConfig(key=spec("int8"), value=spec("int8"), probabilities=probabilities)
    ids = token_ids()
    whole = AutoModelForCausalLM.from_pretrained(checkpoint(family), dtype=torch.float32).eval()
    attach(whole, config)
    expected = logits(whole, ids)

    model = BlockwiseModel.from_directory(checkpoint(family))
    names: list[str] = []
    if first == "enter":  # the calls were recorded before anything was attached
        (inputs,) = model.enter([{"input_ids": ids}])
    for index, block in enumerate(model.blocks):
        names += [model.prefix(index) + name for name in attach(block, config)]
    if first == "attach":
        (inputs,) = model.enter([{"input_ids": ids}])
    hidden = inputs.hidden
    for index, call in enumerate(inputs.calls):
        with model.loaded(index) as block, torch.no_grad():
            hidden = model.call_block(block, hidden, call)
    assert names == list(attention_modules(whole))
    with model.head_loaded() as head, torch.no_grad():
        torch.testing.assert_close(head(hidden), expected, atol=2e-4, rtol=1e-4)


def test_detaching_a_block_leaves_the_others_quantized(random_model: Callable[..., PreTrainedModel]) -> None:
    model, ids = random_model("llama"), token_ids()
    full = logits(model, ids)
    attach(model, AttentionConfig(key=spec("int4")))
    detach(model.model.layers[0])
    only_second = logits(model, ids)
    detach(model.model.layers[1])
    assert not torch.equal(only_second, full)
    assert torch.equal(logits(model, ids), full)


def test_suspended_forwards_do_not_mix(random_model: Callable[..., PreTrainedModel]) -> None:
    model = random_model("llama")
    attach(model, AttentionConfig(key=spec("int4"), value=spec("int4"), probabilities=spec("uint8")))
    batches = [token_ids(), token_ids().flip(0, 1)]
    expected = [logits(model, ids) for ids in batches]
    main = greenlet.getcurrent()

    def suspend(*_: Any) -> None:
        main.switch(None)

    handles = [layer.self_attn.q_proj.register_forward_hook(suspend) for layer in model.model.layers]
    forwards = [greenlet.greenlet(lambda ids=ids: logits(model, ids)) for ids in batches]
    results: list[Tensor | None] = [None, None]
    with torch.no_grad():
        while any(result is None for result in results):
            results = [
                forward.switch() if result is None else result
                for forward, result in zip(forwards, results, strict=True)
            ]
    for handle in handles:
        handle.remove()
    for result, known in zip(results, expected, strict=True):
        assert torch.equal(result, known)  # type: ignore[arg-type]


def test_families_without_the_attention_interface_are_refused(random_model: Callable[..., PreTrainedModel]) -> None:
    with pytest.raises(ArchitectureError, match=r"FalconForCausalLM has no attention .* leave attention"):
        attach(random_model("falcon"), AttentionConfig(key=spec()))


def test_an_attention_that_treats_its_implementation_specially_is_refused(
    random_model: Callable[..., PreTrainedModel],
) -> None:
    model = random_model("gpt2")
    attach(model, AttentionConfig(key=spec()))  # over sdpa nothing is special
    detach(model)
    model.config._attn_implementation = "eager"
    with pytest.raises(ArchitectureError, match="does something of its own under 'eager'"):
        attach(model, AttentionConfig(key=spec()))


def test_every_attention_of_transformers_that_treats_an_implementation_specially_is_known() -> None:
    found = {}
    for file in sorted((Path(transformers.__file__).parent / "models").glob("*/modeling_*.py")):
        text = file.read_text(encoding="utf-8")
        if "ALL_ATTENTION_FUNCTIONS" not in text or not re.search("_attn_implementation.*(==|!=| in )", text):
            continue
        classes = [node for node in ast.parse(text).body if isinstance(node, ast.ClassDef)]
        for own in (node for node in classes if "layer_idx" in ast.unparse(node)):
            for forward in (node for node in own.body if getattr(node, "name", "") == "forward"):
                nodes = list(ast.walk(forward))
                names = {node.id for node in nodes if isinstance(node, ast.Name)}
                constants = {node.value for node in nodes if isinstance(node, ast.Constant)}
                if "ALL_ATTENTION_FUNCTIONS" in names and (special := {"eager", "sdpa"} & constants):
                    found[own.name] = tuple(sorted(special))
    assert found == OWN_WAYS


def test_other_implementations_are_refused(random_model: Callable[..., PreTrainedModel]) -> None:
    model = random_model("llama")
    model.config._attn_implementation = "flex_attention"
    with pytest.raises(ConfigError, match=r"'flex_attention'.*attn_implementation='sdpa'"):
        attach(model, AttentionConfig(key=spec()))


@pytest.mark.parametrize(
    ("refused", "message"),
    [
        (spec(qscheme="per_group", group_size=12), "group_size 12 does not divide"),
        (spec(qscheme="per_group", group_size=8, ch_axis=0), "groups run along a head's channels"),
        (spec(qscheme="per_channel", ch_axis=-1), "a scale per head"),
        (spec(qscheme="per_block", block_size=(8, 8)), "per_block"),
        (spec(first_stage=QuantizationSpec(dtype="e4m3", qscheme="per_channel")), "first_stage"),
    ],
)
def test_specs_without_meaning_for_heads_are_refused_before_anything_changes(
    random_model: Callable[..., PreTrainedModel], refused: QuantizationSpec, message: str
) -> None:
    model = random_model("llama")
    with pytest.raises(ConfigError, match=message):
        attach(model, AttentionConfig(key=refused))
    assert model.config._attn_implementation == "sdpa"
    assert "attention_quantizers" not in dict(model.model.layers[0].self_attn.named_children())


def test_another_implementation_set_afterwards_is_refused_instead_of_leaving_quantizers_out(random_model):
    model = random_model("llama")
    ids = torch.arange(8)[None]
    attach(model, AttentionConfig(key=spec(), value=spec()))
    model.set_attn_implementation("sdpa")
    with pytest.raises(ConfigError, match="'sdpa' would leave out the quantizers"):
        model(input_ids=ids)
    detach(model)
    model(input_ids=ids)


def test_residual_needs_dynamic_scales():
    static = QuantizationSpec(dtype="int4", qscheme="per_tensor", observer="minmax", residual=True)
    with pytest.raises(ConfigError, match="attention key: residual needs is_dynamic=True"):
        AttentionConfig(key=static)

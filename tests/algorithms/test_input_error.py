"""What quantizing an input costs is estimated on tokens that the scales have not seen, where scales stay."""

import pytest
import torch

from fewbit.algorithms.input_error import scored_tokens
from fewbit.algorithms.scale_search import search_scales
from fewbit.calibration.statistics import Statistics
from fewbit.config.algorithms import SmoothQuantConfig
from fewbit.config.spec import QuantizationSpec
from fewbit.nn.activation import ActivationQuantizer

STATIC = QuantizationSpec(dtype="int8", qscheme="per_tensor", observer="minmax")
TOKEN = QuantizationSpec(dtype="int8", qscheme="per_token", observer="minmax", is_dynamic=True)
WEIGHT = QuantizationSpec(dtype="int8", qscheme="per_channel")


def tokens(count, channels=64, seed=0):
    """Heavy-tailed channels of unlike size: what other tokens hold exceeds the largest of a few."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, channels, generator=generator)
    x /= torch.randn(count, channels, generator=generator).abs().clamp(min=0.1)
    return x * torch.logspace(-1, 1, channels)[torch.randperm(channels, generator=torch.Generator().manual_seed(9))]


def statistics_of(*batches, sample=512):
    found = Statistics.empty(batches[0].shape[-1], sample=sample)
    for x in batches:
        found.add(x)
    return found.finish("linear")


def test_static_ranges_are_found_on_other_tokens_than_those_they_are_scored_on():
    x = tokens(300)
    x = torch.cat([x, x[:40]])  # some come twice
    sets = scored_tokens(statistics_of(x), STATIC)
    assert len(sets) == 4
    for each in sets:
        seen = {tuple(row.tolist()) for row in each.fitted}
        assert seen.isdisjoint(tuple(row.tolist()) for row in each.tokens)
        assert 0.6 < len(seen) / 300 < 0.9
    assert sum(each.tokens.shape[0] for each in sets) == 340 + 64  # the largest come on top


@pytest.mark.parametrize("rounded", [torch.float32, torch.bfloat16])
def test_parts_are_the_same_however_tokens_are_batched(rounded):
    x = tokens(256).to(rounded).float()
    whole = scored_tokens(statistics_of(x), STATIC)
    parts = scored_tokens(statistics_of(*x.split(37)), STATIC)
    assert all(torch.equal(a.fitted.sum(0), b.fitted.sum(0)) for a, b in zip(whole, parts, strict=True))
    assert all(0.1 < len(each.tokens) / (256 + 64) < 0.4 for each in whole)


@pytest.mark.parametrize("x", [tokens(1), tokens(3).expand(3, 64) * 0 + tokens(1)], ids=["one token", "one kind"])
def test_where_there_is_one_kind_of_token_all_tokens_are_scored(x):
    (only,) = scored_tokens(statistics_of(x), STATIC)
    assert only.fitted is None
    assert torch.isfinite(only.deviation(torch.ones(64))).all()


def test_dynamic_ranges_are_scored_on_all_tokens_and_without_a_sample_nothing_is():
    x = tokens(100)
    (only,) = scored_tokens(statistics_of(x), TOKEN)
    assert only.fitted is None
    torch.testing.assert_close(only.deviation(torch.ones(64)), ActivationQuantizer(TOKEN)(only.tokens) - only.tokens)
    assert scored_tokens(statistics_of(x, sample=0), TOKEN) == scored_tokens(statistics_of(x), None) == []


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_smoothing_for_static_ranges_holds_on_other_tokens(seed):
    """Channels made all alike on the tokens that were seen: each is as likely to exceed the range on others."""
    seen, other = tokens(400, seed=seed), tokens(4000, seed=100 + seed)
    weight = torch.randn(48, 64, generator=torch.Generator().manual_seed(seed))
    statistics = statistics_of(seen)

    def error(scale):
        step = float((seen / scale).abs().max()) / 127.5
        scaled = other / scale
        noise = (scaled / step).round().clamp(-128, 127) * step - scaled
        return float(((noise @ (weight * scale).T).square().sum(1) / other.square().sum(1)).mean())

    def found(**options):
        return search_scales([weight], [WEIGHT], statistics, SmoothQuantConfig(**options), input_spec=STATIC).scale

    best = min(error(found(alpha=step / 9)) for step in range(10))
    assert error(found()) < 1.4 * best
    assert error(found()) < 0.7 * error(found(alpha=1.0))  # the best one on the tokens that were seen

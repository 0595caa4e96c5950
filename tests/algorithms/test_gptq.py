"""GPTQ: better than rounding where it should be, the same whatever the blocking, honest about failure."""

from dataclasses import replace
from importlib import import_module

import pytest
import torch

from fewbit.algorithms.columns import Problem, column_order, factored, inverse_factor, solve
from fewbit.algorithms.gptq import drifted, gptq
from fewbit.algorithms.grids import Grid
from fewbit.algorithms.rtn import rtn
from fewbit.config.algorithms import GPTQConfig
from fewbit.config.spec import QuantizationSpec
from fewbit.numerics.scale_format import Float
from fewbit.numerics.second_moment import importance, quadratic_form

BF16, FP32 = Float(torch.bfloat16), Float(torch.float32)
SYMMETRIC = QuantizationSpec(dtype="int4", group_size=32)
AFFINE = QuantizationSpec(dtype="uint4", group_size=32, symmetric=False)
PLAIN = replace(SYMMETRIC, observer="minmax")
PER_CHANNEL = QuantizationSpec(dtype="int4", qscheme="per_channel")
PER_TENSOR = QuantizationSpec(dtype="int4", qscheme="per_tensor")
GRIDS = {
    "affine": AFFINE,
    "affine-channel": QuantizationSpec(dtype="uint4", qscheme="per_channel", symmetric=False),
    "affine-tensor": QuantizationSpec(dtype="uint4", qscheme="per_tensor", symmetric=False),
    "FP8-tensor": QuantizationSpec(dtype="e4m3", qscheme="per_tensor"),
    "FP8-channel": QuantizationSpec(dtype="e4m3", qscheme="per_channel"),
    "FP8-block": QuantizationSpec(dtype="e4m3", qscheme="per_block", block_size=(32, 32)),
    "E5M2": QuantizationSpec(dtype="e5m2", qscheme="per_channel"),
    "FP6-e3m2": replace(SYMMETRIC, dtype="e3m2"),
    "FP6-e2m3": QuantizationSpec(dtype="e2m3", qscheme="per_channel"),
    "FP4": replace(SYMMETRIC, dtype="e2m1"),
    "NVFP4": QuantizationSpec(dtype="e2m1", group_size=16, scale_type="e4m3"),
    "INT4-e4m3": QuantizationSpec(dtype="int4", group_size=16, scale_type="e4m3"),
    "MXFP4": replace(SYMMETRIC, dtype="e2m1", scale_type="e8m0"),
    "MXFP6": replace(SYMMETRIC, dtype="e2m3", scale_type="e8m0"),
    "MXINT8": replace(SYMMETRIC, dtype="int8", scale_type="e8m0"),
    "MX9": QuantizationSpec(dtype="mx9"),
    "MX6": QuantizationSpec(dtype="mx6"),
    "BFP16": QuantizationSpec(dtype="bfp16"),
    "block": QuantizationSpec(dtype="int4", qscheme="per_block", block_size=(32, 32)),
    "affine-block": QuantizationSpec(dtype="uint4", qscheme="per_block", block_size=(16, 8), symmetric=False),
    "columns": QuantizationSpec(dtype="int4", qscheme="per_channel", ch_axis=1),
    "affine-columns": QuantizationSpec(dtype="uint4", qscheme="per_channel", ch_axis=1, symmetric=False),
    "groups-of-rows": QuantizationSpec(dtype="int4", group_size=32, ch_axis=0),
    "pof2": replace(SYMMETRIC, scale_type="pof2"),
    "affine-pof2": replace(AFFINE, scale_type="pof2"),
    "pof2-tensor": QuantizationSpec(dtype="int8", qscheme="per_tensor", scale_type="pof2"),
}
every_grid = pytest.mark.parametrize("name", GRIDS)
OF_ROWS = [name for name, spec in GRIDS.items() if spec.tiling.rows == 1]  # no scale is shared by rows


def format_of(spec, weight):
    return spec.scale_format(torch.bfloat16, spec.global_scale(weight))


def correlated(rows=96, columns=128, tokens=2048, seed=0):
    """A weight and H of inputs whose channels are correlated and of unlike size."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(columns, columns, generator=generator) / columns**0.5
    size = torch.logspace(-1, 1, columns)[torch.randperm(columns, generator=generator)]
    x = (
        torch.randn(tokens, columns, generator=generator) @ mixing + torch.randn(tokens, 1, generator=generator)
    ) * size
    return torch.randn(rows, columns, generator=generator), x.T @ x


def loss(weight, moment, outcome):
    return float(quadratic_form(outcome.weight.dequantize() - weight, moment).sum())


@pytest.mark.parametrize("name", ["affine", "NVFP4", "FP4", "affine-channel", "FP8-channel"])
@pytest.mark.parametrize("tokens", [1, 2, 8, 32])
def test_few_tokens_never_cost_more_than_rounding_does(name, tokens):
    """An expert that a handful of tokens reached: H says nothing of most scales, so they must not follow it."""
    spec = GRIDS[name]
    weight, everything = correlated()
    generator = torch.Generator().manual_seed(tokens)
    roots = torch.linalg.cholesky(everything.double()).float()
    x = torch.randn(tokens, weight.shape[1], generator=generator) @ roots.T
    found = gptq(weight, x.T @ x, spec, format_of(spec, weight), GPTQConfig())
    plain = rtn(weight, None, spec, format_of(spec, weight))
    assert loss(weight, everything, found) < 1.2 * loss(weight, everything, plain)


def test_one_huge_channel_leaves_the_scales_of_other_groups_alone():
    weight = torch.randn(64, 512, generator=torch.Generator().manual_seed(0))
    size = torch.ones(512)
    size[5] = 1e4
    x = torch.randn(2048, 512, generator=torch.Generator().manual_seed(1)) * size
    found = gptq(weight, x.T @ x, SYMMETRIC, BF16, GPTQConfig()).weight.dequantize()[:, 32:]
    rest = weight[:, 32:]
    assert float((found * rest).sum() / rest.square().sum()) == pytest.approx(1.0, abs=0.01)


@pytest.mark.parametrize("spec", [SYMMETRIC, AFFINE, PLAIN, PER_CHANNEL, PER_TENSOR])
@pytest.mark.parametrize("order", ["activation", "group-aware", "none"])
def test_gptq_loses_far_less_than_rounding_on_correlated_inputs(spec, order):
    weight, moment = correlated()
    found = gptq(weight, moment, spec, BF16, GPTQConfig(order=order))
    assert loss(weight, moment, found) < 0.6 * loss(weight, moment, rtn(weight, moment, spec, BF16))


@pytest.mark.parametrize("dtype", ["int2", "int3", "int8"])
def test_every_width_gains(dtype):
    weight, moment = correlated()
    spec = replace(SYMMETRIC, dtype=dtype)
    found = gptq(weight, moment, spec, BF16, GPTQConfig())
    assert loss(weight, moment, found) < 0.8 * loss(weight, moment, rtn(weight, moment, spec, BF16))


@every_grid
@pytest.mark.parametrize("observer", ["search", "minmax"])
@pytest.mark.parametrize("order", ["activation", "none"])
def test_every_grid_gains(name, observer, order):
    weight, moment = correlated()
    spec = replace(GRIDS[name], observer=observer)
    format = format_of(spec, weight)
    found = gptq(weight, moment, spec, format, GPTQConfig(order=order))
    assert loss(weight, moment, found) < 0.5 * loss(weight, moment, rtn(weight, moment, spec, format))
    assert found.weight.spec == spec
    assert found.weight.global_scale == format.global_scale


@pytest.mark.parametrize("spec", [SYMMETRIC, AFFINE, replace(SYMMETRIC, dtype="e2m1"), GRIDS["block"]])
@pytest.mark.parametrize("method", ["round", "floor"])
def test_every_way_of_rounding_gains(spec, method):
    weight, moment = correlated()
    spec = replace(spec, round_method=method)
    found = gptq(weight, moment, spec, BF16, GPTQConfig())
    assert loss(weight, moment, found) < 0.5 * loss(weight, moment, rtn(weight, moment, spec, BF16))


@every_grid
def test_what_is_stored_can_be_stored(name):
    weight, moment = correlated()
    spec = GRIDS[name]
    weight[3] = 0
    weight[:, 32:64] = 0
    format = format_of(spec, weight)
    found = gptq(weight, moment, spec, format, GPTQConfig()).weight
    assert found.scale.dtype == format.dtype
    assert torch.equal(format.store(found.scale_value).float(), found.scale.float())
    assert (found.scale.float() != 0).all()
    assert (found.dequantize()[3] == 0).all()
    assert torch.isfinite(found.dequantize()).all()


def test_scales_chosen_by_the_loss_beat_scales_fixed_before():
    weight, moment = correlated()
    searched = gptq(weight, moment, SYMMETRIC, BF16, GPTQConfig())
    fixed = gptq(weight, moment, PLAIN, BF16, GPTQConfig())
    assert loss(weight, moment, searched) < 0.85 * loss(weight, moment, fixed)


@pytest.mark.parametrize("refits", [1, 3])
def test_refits_never_lose(refits):
    weight, moment = correlated()
    without = gptq(weight, moment, SYMMETRIC, BF16, GPTQConfig(refits=0, order="group-aware"))
    refitted = gptq(weight, moment, SYMMETRIC, BF16, GPTQConfig(refits=refits, order="group-aware"))
    assert loss(weight, moment, refitted) <= loss(weight, moment, without) * 1.001


BLOCKED = GRIDS | {"symmetric": SYMMETRIC, "plain": PLAIN, "channel": PER_CHANNEL}


@pytest.mark.parametrize("name", BLOCKED)
@pytest.mark.parametrize("order", ["activation", "none"])
def test_the_result_does_not_depend_on_the_block_size(name, order):
    weight, moment = correlated()
    spec = BLOCKED[name]
    losses = []
    codes = []
    for block_size in (32, 128, 1000):
        format = FP32 if spec.scale_type == "float" else format_of(spec, weight)
        found = gptq(weight, moment, spec, format, GPTQConfig(order=order, block_size=block_size))
        losses.append(loss(weight, moment, found))
        codes.append(found.weight.codes)
    assert max(losses) <= min(losses) * 1.002  # a tie that rounds the other way changes a code, not the loss
    assert all((other != codes[0]).float().mean() < 0.01 for other in codes[1:])


@pytest.mark.parametrize("name", [*OF_ROWS, "symmetric"])
def test_rows_are_independent(name):
    weight, moment = correlated()
    spec = BLOCKED[name]
    format = format_of(spec, weight)
    whole = gptq(weight, moment, spec, format, GPTQConfig()).weight
    half = gptq(weight[:40], moment, spec, format, GPTQConfig()).weight
    assert (whole.codes[:40] != half.codes).float().mean() < 0.01


@pytest.mark.parametrize("name", ["block", "affine-block", "FP8-block", "columns", "FP8-tensor", "NVFP4"])
def test_how_many_rows_are_worked_on_at_a_time_does_not_matter(name, monkeypatch):
    weight, moment = correlated(rows=192)
    spec = GRIDS[name]
    format = format_of(spec, weight)
    whole = gptq(weight, moment, spec, format, GPTQConfig()).weight
    monkeypatch.setattr(import_module("fewbit.algorithms.gptq"), "CHUNK_ELEMENTS", 1)  # 64 rows
    pieces = gptq(weight, moment, spec, format, GPTQConfig()).weight
    assert (whole.codes != pieces.codes).float().mean() < 0.01
    assert torch.equal(whole.scale.float(), pieces.scale.float()) or name == "NVFP4"


def test_columns_that_never_fire_do_no_harm():
    weight, moment = correlated()
    moment[:, 5] = moment[5] = 0
    found = gptq(weight, moment, SYMMETRIC, BF16, GPTQConfig())
    assert torch.isfinite(found.weight.dequantize()).all()
    assert loss(weight, moment, found) < 0.6 * loss(weight, moment, rtn(weight, moment, SYMMETRIC, BF16))


def test_zero_moment_cannot_be_factored():
    weight, moment = correlated()
    assert gptq(weight, torch.zeros_like(moment), SYMMETRIC, BF16, GPTQConfig()) is None


def test_damping_rises_until_the_factorization_succeeds():
    _, moment = correlated()
    moment -= 0.05 * moment.diagonal().mean() * torch.eye(moment.shape[0])  # indefinite: 0.01 is not enough
    _, damping = inverse_factor(moment, torch.arange(moment.shape[0]), 0.01)
    assert damping == pytest.approx(0.1)


def test_a_hopeless_moment_is_refused():
    assert inverse_factor(torch.diag(torch.tensor([1.0, 1.0, -50.0, 100.0])), torch.arange(4), 0.001) is None


@pytest.mark.parametrize("order", ["activation", "group-aware", "none"])
def test_the_factor_is_that_of_the_damped_inverse(order):
    _, moment = correlated(columns=64)
    permutation = column_order(moment.diagonal(), 16, order)
    upper, damping = inverse_factor(moment, permutation, 0.01)
    damped = moment.double() + damping * moment.diagonal().mean(dtype=torch.float64) * torch.eye(64).double()
    inverse = torch.linalg.inv(damped)[permutation][:, permutation]
    assert torch.equal(upper, upper.triu())
    torch.testing.assert_close(upper.T.double() @ upper.double(), inverse, rtol=1e-3, atol=1e-4 * float(inverse.max()))


def test_group_aware_order_keeps_groups_together():
    order = column_order(torch.rand(96), 16, "group-aware")
    assert sorted(order.tolist()) == list(range(96))
    assert all(len(set((order[start : start + 16] // 16).tolist())) == 1 for start in range(0, 96, 16))


def test_a_drifted_weight_gives_the_output_of_the_original_inputs():
    generator = torch.Generator().manual_seed(0)
    original = torch.randn(4096, 32, generator=generator)
    seen = original @ (torch.eye(32) + 0.1 * torch.randn(32, 32, generator=generator))  # a drift that can be undone
    weight = torch.randn(8, 32, generator=generator)
    factor = factored(seen.T @ seen, 32, "activation", 1e-6)
    corrected = drifted(weight, (original - seen).T @ seen, factor, 1.0)
    torch.testing.assert_close(seen @ corrected.T, original @ weight.T, rtol=1e-3, atol=1e-2)
    assert torch.equal(drifted(weight, torch.zeros(32, 32), factor, 1.0), weight)


@pytest.mark.parametrize("block", [(1, 48), (1, 200), (32, 48)])
@pytest.mark.parametrize("observer", ["search", "minmax"])
def test_blocks_may_be_cut_at_the_edge(block, observer):
    weight, moment = correlated()
    spec = QuantizationSpec(dtype="int4", qscheme="per_block", block_size=block, observer=observer)
    found = gptq(weight, moment, spec, BF16, GPTQConfig())
    assert loss(weight, moment, found) < 0.7 * loss(weight, moment, rtn(weight, moment, spec, BF16))


# --- never worse than rounding to nearest ---------------------------------------------------------------------------


def weights(kind, rows=16, columns=64):
    generator = torch.Generator().manual_seed(0)
    normal = torch.randn(rows, columns, generator=generator)
    if kind == "away from zero":
        return 1 + 0.2 * normal
    if kind == "heavy-tailed":
        return normal / torch.randn(rows, columns, generator=generator).abs().clamp(min=0.02)
    return normal


def second_moment_of(kind, columns=64, tokens=512):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(tokens, columns, generator=generator)
    if kind == "positive":
        x = x.abs()
    if kind == "few tokens":
        x = x[:9]
    return x.T @ x


INTEGERS = {
    f"{sign}{bits}-{name}": QuantizationSpec(dtype=f"{sign}{bits}", symmetric=sign == "int", **options)
    for bits in (2, 3, 4, 8)
    for sign in ("int", "uint")
    for name, options in (("group", {"group_size": 32}), ("channel", {"qscheme": "per_channel"}))
}


@pytest.mark.parametrize("name", GRIDS | INTEGERS)
@pytest.mark.parametrize("inputs", ["uncorrelated", "positive", "few tokens"])
def test_no_row_loses_more_than_by_rounding_to_nearest(name, inputs):
    spec, moment = (GRIDS | INTEGERS)[name], second_moment_of(inputs)
    for kind in ("normal", "away from zero", "heavy-tailed"):
        weight = weights(kind, rows=64 if spec.tiling.rows > 1 else 16)
        format = format_of(spec, weight)
        found, plain = (
            each.weight
            for each in (gptq(weight, moment, spec, format, GPTQConfig()), rtn(weight, moment, spec, format))
        )
        ours, rounded = (quadratic_form(each.dequantize() - weight, moment) for each in (found, plain))
        if spec.tiling.rows != 1:  # rows that share a scale share their fate
            tile_rows, _ = spec.tiling.tile(*weight.shape)
            ours, rounded = (each.view(-1, tile_rows).sum(1) for each in (ours, rounded))
        assert (ours <= rounded * (1 + 1e-9)).all(), kind


@pytest.mark.parametrize("name", ["int3-group", "uint3-group", "int4-group", "uint4-group", "uint4-channel"])
@pytest.mark.parametrize("kind", ["normal", "away from zero", "heavy-tailed"])
def test_where_columns_cannot_make_up_for_each_other_scales_are_as_good_as_those_of_rounding(name, kind):
    spec, weight, moment = INTEGERS[name], weights(kind), torch.diag(torch.logspace(-1, 1, 64))
    found, plain = gptq(weight, moment, spec, BF16, GPTQConfig()), rtn(weight, moment, spec, BF16)
    assert loss(weight, moment, found) <= loss(weight, moment, plain)
    exact = Float(torch.float32)
    found, plain = gptq(weight, moment, spec, exact, GPTQConfig()), rtn(weight, moment, spec, exact)
    assert loss(weight, moment, found) < loss(weight, moment, plain)  # fitted, they gain what bfloat16 cannot hold


def test_the_error_that_is_given_is_that_of_the_weight():
    weight, moment = correlated()
    found = gptq(weight, moment, AFFINE, BF16, GPTQConfig())
    torch.testing.assert_close(found.error, quadratic_form(found.weight.dequantize() - weight, moment))
    assert gptq(weight, moment, AFFINE, BF16, GPTQConfig(drift=0.5), torch.eye(128)).error is None


# --- the smallest weights -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*BLOCKED, *INTEGERS])
@pytest.mark.parametrize(
    ("rows", "columns", "tokens"), [(1, 64, 100), (65, 64, 100), (1, 32, 1), (2, 1, 3), (1, 1, 1)]
)
def test_weights_of_any_size_are_quantized(name, rows, columns, tokens, monkeypatch):
    monkeypatch.setattr(import_module("fewbit.algorithms.gptq"), "CHUNK_ELEMENTS", 1)  # 65 rows: a chunk of one row
    spec = (BLOCKED | INTEGERS)[name]
    try:
        spec.tiling.tile(rows, columns)
    except ValueError:
        pytest.skip("such a weight has no whole tiles")
    generator = torch.Generator().manual_seed(0)
    weight, x = torch.randn(rows, columns, generator=generator), torch.randn(tokens, columns, generator=generator)
    format = format_of(spec, weight)
    found, plain = gptq(weight, x.T @ x, spec, format, GPTQConfig()), rtn(weight, x.T @ x, spec, format)
    assert loss(weight, x.T @ x, found) <= loss(weight, x.T @ x, plain)
    nothing = torch.zeros_like(weight)
    assert (gptq(nothing, x.T @ x, spec, format_of(spec, nothing), GPTQConfig()).weight.dequantize() == 0).all()


@pytest.mark.parametrize("dtype", ["int3", "int4"])
def test_one_scale_per_row_is_found_by_what_errors_cost_in_the_end(dtype):
    """Not by diag(H): a column with huge inputs is cheap if its neighbours can make up for it."""
    weight, moment = correlated()
    loud = torch.ones(128)
    loud[:4] = 30.0  # multiples of one signal, together with their neighbours
    moment = moment * loud * loud.unsqueeze(1)
    weight = weight.clone()
    weight[:, 0] *= 4
    spec = QuantizationSpec(dtype=dtype, qscheme="per_channel")
    blind = replace(spec, observer="mse")
    found = {s.observer: gptq(weight, moment, s, format_of(s, weight), GPTQConfig(refits=0)) for s in (spec, blind)}
    assert loss(weight, moment, found["search"]) < loss(weight, moment, found["mse"])


@pytest.mark.parametrize("observer", ["search", "mse"])
@pytest.mark.parametrize("dtype", ["int2", "int3", "int4"])
def test_one_scale_per_row_is_as_good_as_textbook_gptq_with_scales_by_brute_force(dtype, observer):
    weight, moment = correlated(rows=64)
    spec = QuantizationSpec(dtype=dtype, qscheme="per_channel", observer=observer)
    rule, largest = spec.grid_rule(BF16), weight.abs().amax(1) / 2 ** (spec.bits - 1)
    weights = importance(moment) if observer == "search" else None
    tried = [rule.scale.round(sign * largest * share) for sign in (1, -1) for share in torch.linspace(0.1, 1.3, 160)]
    errors = torch.stack([rule.error(weight, scale, None, weights) for scale in tried])
    scale = torch.stack(tried).gather(0, errors.argmin(0, keepdim=True))
    problem = Problem(weight, moment, 0.0, weight.shape[1], rule)
    grid = Grid(scale, None, spec.format, spec.round_method)
    levels = solve(problem, factored(moment, 128, "activation", 0.01), grid, 128).levels
    textbook = float(quadratic_form(levels * scale.T - weight, moment).sum())
    assert loss(weight, moment, gptq(weight, moment, spec, BF16, GPTQConfig())) < 1.02 * textbook

"""Quantize, calibrate, freeze: any model with linears and convolutions, in place."""

import copy
import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from fewbit.config.spec import QuantizationSpec
from fewbit.errors import CalibrationError, ConfigError
from fewbit.nn.fake_quant import FakeQuant, FakeQuantConv2d, FakeQuantLinear
from fewbit.nn.quant_linear import QuantLinear
from fewbit.nn.words import named_input
from fewbit.ptq import calibrate, freeze, quantize_

TOKEN = QuantizationSpec(dtype="int8", qscheme="per_token", observer="minmax", is_dynamic=True)
IMAGES = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def network(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(512, 64),
        nn.ReLU(),
        nn.Linear(64, 10),
    ).eval()


def distance(model: nn.Module, reference: nn.Module, x: torch.Tensor = IMAGES) -> float:
    """Squared error of the output relative to the reference's."""
    with torch.no_grad():
        expected = reference(x)
        return float((model(x) - expected).square().sum() / expected.square().sum())


def finished(seed: int = 0, weights="int4", activations=None, batch=IMAGES) -> nn.Sequential:
    model = network(seed)
    quantize_(model, weights, activations)
    if activations == "int8":
        with calibrate(model):
            model(batch)
    return freeze(model)


class TestQuantize:
    @pytest.mark.parametrize(
        ("weights", "worst"), [("int8", 1e-4), ("fp8", 2e-3), ("uint4", 0.02), ("int4", 0.02), ("int2", 0.5)]
    )
    def test_weights_by_name_cost_what_their_bits_allow(self, weights, worst):
        model = network()
        report = quantize_(model, weights)
        assert 0 < distance(model, network()) < worst
        assert [row.name for row in report.rows] == ["0", "3", "5"]
        assert all(0 < row.error < worst for row in report.rows)

    def test_fewer_bits_cost_more(self):
        errors = []
        for bits in range(8, 1, -1):
            model = network()
            quantize_(model, f"int{bits}")
            errors.append(distance(model, network()))
        assert errors == sorted(errors)

    @pytest.mark.parametrize("name", ["qint8", "int8", "INT8"])
    def test_quantos_names_mean_the_same(self, name):
        model, other = network(), network()
        quantize_(model, name)
        quantize_(other, "int8")
        assert torch.equal(model(IMAGES), other(IMAGES))
        assert named_input("qfloat8_e4m3fn") == named_input("torch.float8_e4m3fn") == named_input("e4m3")

    def test_groups_are_as_large_as_the_inputs_allow(self):
        model = network()
        rows = {row.name: row.weight for row in quantize_(model, "int4").rows}
        assert "int4 per_channel" in rows["0"]  # 3 · 3 · 3 inputs
        assert "int4 per_group 128" in rows["3"]
        assert "int4 per_group 64" in rows["5"]

    def test_specs_say_anything_else(self):
        model = network()
        spec = QuantizationSpec(dtype="e2m1", group_size=16, scale_type="e4m3")
        quantize_(model, spec, TOKEN, exclude="0")
        assert model[3].config.weight == spec
        assert model[3].config.input_tensors == TOKEN
        assert distance(model, network()) < 0.05

    def test_activations_alone_leave_weights(self):
        model = network()
        report = quantize_(model, None, TOKEN)
        assert torch.equal(model[3].fake_weight(), network()[3].weight)
        assert {row.bits_per_weight for row in report.rows} == {32.0}
        assert 0 < distance(model, network()) < 1e-3

    def test_excluded_modules_stay_and_are_reported(self):
        model = network()
        report = quantize_(model, "int8", exclude=["5", "re:0"])
        assert (type(model[0]), type(model[3]), type(model[5])) == (nn.Conv2d, FakeQuantLinear, nn.Linear)
        assert report.excluded == ("0", "5")
        assert "5" in str(report)
        assert "excluded" in str(report)

    def test_modules_names_the_ones_to_quantize(self):
        model = network()
        assert [row.name for row in quantize_(model, "int8", modules="[35]", exclude="3").rows] == ["5"]
        assert isinstance(model[0], nn.Conv2d)
        assert not isinstance(model[0], FakeQuant)

    def test_a_module_used_twice_is_exchanged_wherever_it_is(self):
        shared = nn.Linear(16, 16)
        model = nn.ModuleDict({"a": shared, "b": nn.Sequential(shared, nn.ReLU(), shared)})
        assert len(quantize_(model, "int8").rows) == 1
        assert model["a"] is model["b"][0] is model["b"][2]
        freeze(model)
        assert isinstance(model["a"], QuantLinear)
        assert model["a"] is model["b"][0] is model["b"][2]

    def test_the_report_tells_bits_and_errors(self):
        row = quantize_(network(), "int4").rows[1]
        assert (row.name, row.kind) == ("3", "Linear")
        assert row.bits_per_weight == 4 + 32 / 128
        assert f"{row.error:.2e}" in str(quantize_(network(), "int4"))

    def test_language_models_work_and_tied_embeddings_stay(self, random_model):
        model = random_model("qwen3")  # head and embeddings share their weight
        ids = torch.arange(24).view(2, 12)
        with torch.no_grad():
            before = model(input_ids=ids).logits
            embeddings = model.get_input_embeddings().weight.clone()
            report = quantize_(model, "int8", TOKEN)
            after = model(input_ids=ids).logits
            assert 0 < (after - before).square().mean() / before.square().mean() < 0.01
            freeze(model)
            torch.testing.assert_close(model(input_ids=ids).logits, after, rtol=1e-4, atol=1e-4)
        assert "lm_head" in {row.name for row in report.rows}
        assert torch.equal(model.get_input_embeddings().weight, embeddings)

    def test_torchs_encoder_layers_do_not_go_past_the_quantized_linears(self):
        torch.manual_seed(0)
        model = nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 2, 64, batch_first=True), 2).eval()
        x = torch.randn(2, 5, 32)
        reference = copy.deepcopy(model)
        report = quantize_(model, "int2")
        assert distance(model, reference, x) > 1e-3
        assert [row.name.split(".")[-1] for row in report.rows] == ["linear1", "linear2"] * 2
        assert {"layers.0.self_attn", "layers.1.self_attn"} <= set(report.skipped)
        freeze(model)
        assert distance(model, reference, x) > 1e-3

    def test_modules_with_weights_that_are_not_known_are_named(self):
        report = quantize_(nn.Sequential(nn.Embedding(4, 4), nn.ConvTranspose2d(4, 4, 2), nn.Linear(4, 4)), "int8")
        assert list(report.skipped) == ["1"]
        assert "ConvTranspose2d is no linear" in str(report)


class TestCalibrate:
    def test_static_activations_are_found_fixed_and_close(self):
        model = network()
        quantize_(model, "int8", "int8")
        with calibrate(model) as calibration:
            for image in IMAGES:
                model(image.unsqueeze(0))
        assert set(calibration.scales) == {"0.input", "3.input", "5.input"}
        assert calibration.scales["0.input"] == pytest.approx(float(IMAGES.abs().max()) / 127.5)
        assert calibration.missed == ()
        assert 0 < distance(model, network()) < 1e-3
        model(100 * IMAGES)
        assert model[0].input_quantizer.scale.item() == pytest.approx(calibration.scales["0.input"])

    def test_activations_pass_unquantized_until_the_end(self):
        model, weights_only = network(), network()
        quantize_(model, "int8", "int8")
        quantize_(weights_only, "int8")
        with calibrate(model):
            assert torch.equal(model(IMAGES), weights_only(IMAGES))

    def test_momentum_averages_the_ranges(self):
        model = network()
        quantize_(model, None, "int8", modules="0")
        with calibrate(model, momentum=0.5):
            for largest in (1.0, 3.0):
                model(torch.full((1, 3, 8, 8), largest))
        assert model[0].input_quantizer.scale.item() == pytest.approx(2.0 / 127.5)

    def test_it_may_be_done_again_and_after_freezing(self):
        model = finished(activations="int8")
        before = model[3].input_quantizer.scale.clone()
        with calibrate(model):
            model(2 * IMAGES)
        assert model[3].input_quantizer.scale > 1.5 * before

    def test_calling_a_model_that_was_not_calibrated_is_an_error(self):
        model = network()
        quantize_(model, "int8", "int8")
        with pytest.raises(CalibrationError, match="no scale yet"):
            model(IMAGES)

    def test_no_data_is_an_error(self):
        model = network()
        quantize_(model, "int8", "int8")
        with pytest.raises(CalibrationError, match="no data went through"), calibrate(model):
            pass

    def test_nothing_static_is_an_error(self):
        model = network()
        quantize_(model, "int8", TOKEN)
        with pytest.raises(CalibrationError, match="nothing to calibrate"), calibrate(model):
            pass

    def test_constant_zero_is_an_error_that_names_the_module_and_changes_nothing(self):
        model = network()
        quantize_(model, "int8", "int8")
        with pytest.raises(CalibrationError, match=r"0\.input was zero"), calibrate(model):
            model(0 * IMAGES)
        assert model[5].input_quantizer.scale is None

    def test_what_no_data_reached_is_warned_about(self):
        model = network()
        model.append(nn.ModuleDict({"unused": nn.Linear(4, 4)}))
        quantize_(model, "int8", "int8")
        with (
            pytest.warns(UserWarning, match=r"did not reach 1 activations \(6\.unused\.input\)"),
            calibrate(model) as it,
        ):
            model[:6](IMAGES)
        assert it.missed == ("6.unused.input",)
        model[:6](IMAGES)
        with pytest.raises(CalibrationError, match="no scale yet"):
            model[6]["unused"](torch.ones(1, 4))

    def test_an_exception_inside_leaves_everything_as_it_was(self):
        model = network()
        quantize_(model, "int8", "int8")
        model[5].register_forward_pre_hook(lambda *_: {}["no such key"])
        with pytest.raises(KeyError), calibrate(model):
            model(IMAGES)
        assert all(model[index].input_quantizer.observer is None for index in (0, 3, 5))
        assert all(model[index].input_quantizer.scale is None for index in (0, 3, 5))

    @pytest.mark.parametrize("momentum", [-0.1, 1.0])
    def test_momentum_out_of_range_is_an_error(self, momentum):
        with pytest.raises(ConfigError, match="momentum must be"), calibrate(network(), momentum=momentum):
            pass


class TestFreeze:
    @pytest.mark.parametrize("weights", ["int8", "int4", "uint4", "int3", "fp8"])
    @pytest.mark.parametrize("activations", [None, "int8"])
    def test_it_changes_no_output(self, weights, activations):
        model = network()
        quantize_(model, weights, activations)
        if activations:
            with calibrate(model):
                model(IMAGES)
        before = model(IMAGES)
        assert freeze(model) is model
        torch.testing.assert_close(model(IMAGES), before, rtol=1e-4, atol=1e-5)

    def test_linears_are_packed_and_convolutions_hold_their_quantized_weight(self):
        fake = network()
        quantize_(fake, "int4")
        expected = fake[0].fake_weight()
        model = finished()
        assert (type(model[0]), type(model[3]), type(model[5])) == (FakeQuantConv2d, QuantLinear, QuantLinear)
        assert torch.equal(model[0].weight, expected)
        assert model[3].nbytes < 0.16 * network()[3].weight.nbytes

    @pytest.mark.parametrize("activations", [None, "int8"])
    def test_a_saved_state_loads_into_another_model(self, activations, tmp_path):
        model = finished(0, activations=activations)
        torch.save(model.state_dict(), tmp_path / "state.pt")
        state = torch.load(tmp_path / "state.pt", weights_only=True)
        other = network(1)
        quantize_(other, "int4", activations)
        freeze(other)  # not calibrated: the scales come with the state
        other.load_state_dict(state)
        assert torch.equal(other(IMAGES), model(IMAGES))

    def test_a_state_saved_before_freezing_loads_too(self):
        model, other = network(0), network(1)
        for made in (model, other):
            quantize_(made, "int4", "int8")
        with calibrate(model):
            model(IMAGES)
        other.load_state_dict(model.state_dict())
        assert torch.equal(other(IMAGES), model(IMAGES))

    def test_the_original_parameters_stay_as_they_are(self):
        model = network()
        original = {name: (parameter, parameter.detach().clone()) for name, parameter in model.named_parameters()}
        quantize_(model, "int4")
        freeze(model)
        assert all(torch.equal(parameter, before) for parameter, before in original.values())

    def test_activations_alone_keep_their_linears(self):
        model = network()
        quantize_(model, None, TOKEN)
        before = model(IMAGES)
        assert torch.equal(freeze(model)(IMAGES), before)

    def test_there_must_be_something_to_freeze(self):
        with pytest.raises(ConfigError, match="nothing to freeze; call quantize_"):
            freeze(network())


def test_a_function_may_choose_the_modules():
    by_function, by_pattern = network(), network()
    quantize_(by_function, modules=lambda module, name: isinstance(module, nn.Linear))
    linears = [name for name, module in by_pattern.named_modules() if isinstance(module, nn.Linear)]
    quantize_(by_pattern, modules=linears)
    assert [type(module) for module in by_function.modules()] == [type(module) for module in by_pattern.modules()]
    by_class = network()
    quantize_(by_class, torch.int8, modules=nn.Linear, exclude=None)
    assert [type(module) for module in by_class.modules()] == [type(module) for module in by_pattern.modules()]
    with pytest.raises(ConfigError, match="leaves nothing to quantize"):
        quantize_(network(), modules=lambda module, name: False)


class TestBadInput:
    @pytest.mark.parametrize(
        ("arguments", "sentence"),
        [
            ({"weights": None}, "name weights, activations or both"),
            ({"weights": "int9"}, "weights: unknown dtype 'int9'"),
            ({"activations": "int1"}, "activations: unknown dtype 'int1'"),
            ({"exclude": "lm_head"}, "exclude: 'lm_head' matches no linear or convolution"),
            ({"exclude": "*"}, "exclude leaves nothing to quantize"),
            ({"modules": "*.q_proj"}, "modules: '.*q_proj' matches no linear"),
            ({"weights": QuantizationSpec(group_size=48)}, "0: the weight cannot be quantized int4 per_group 48"),
            ({"weights": TOKEN}, "weight: is_dynamic is for activations"),
            ({"activations": QuantizationSpec(group_size=64, observer="minmax")}, "which calibration cannot know"),
            (
                {"activations": QuantizationSpec(group_size=64, observer="minmax", is_dynamic=True)},
                "0: an activation of 3 channels cannot be quantized",
            ),
        ],
    )
    def test_it_is_an_error_and_the_model_is_unchanged(self, arguments, sentence):
        model = network()
        with pytest.raises(ConfigError, match=sentence):
            quantize_(model, **arguments)
        assert [type(module) for module in model] == [type(module) for module in network()]

    def test_a_model_without_linears_or_already_quantized_is_an_error(self):
        model = network()
        quantize_(model)
        for nothing in (model, nn.Sequential(nn.ReLU())):
            with pytest.raises(ConfigError, match="has no linears or convolutions"):
                quantize_(nothing)

    def test_a_bare_linear_is_an_error_that_says_what_to_use(self):
        with pytest.raises(ConfigError, match=r"FakeQuantLinear\.from_module"):
            quantize_(nn.Linear(4, 4))


def test_calibration_that_reaches_everything_warns_of_nothing():
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        finished(activations="int8")


def test_a_weight_that_is_computed_is_refused():
    linear = prune.l1_unstructured(nn.Linear(16, 16), "weight", 0.5)
    with pytest.raises(ConfigError, match="computed"):
        quantize_(nn.Sequential(linear), weights="int4")


def test_hooks_of_a_module_are_those_of_its_counterparts():
    model, plain = (nn.Sequential(nn.Conv2d(2, 3, 1), nn.Flatten(), nn.Linear(12, 4)) for _ in range(2))
    plain.load_state_dict(model.state_dict())
    x = torch.randn(3, 2, 2, 2)
    handles = [model[0].register_forward_hook(lambda _m, _x, y: 2 * y), model[2].register_forward_pre_hook(_halved)]
    for step in (lambda net: quantize_(net, "int8"), freeze):
        step(model)
        step(plain)
        torch.testing.assert_close(model(x), plain(x))
        assert not torch.equal(model[0](x), plain[0](x))
    for handle in handles:
        handle.remove()
    assert torch.equal(model[0](x), plain[0](x))


def _halved(_module, args):
    return (args[0] / 2,)


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_module_that_would_lose_something_is_refused_by_name_and_may_be_excluded():
    def own(module):
        module.forward = lambda x: x

    for change in (own, nn.utils.spectral_norm, lambda module: module.register_buffer("gain", torch.ones(1))):
        model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
        change(model[1])
        with pytest.raises(ConfigError, match=r"1 \(Linear\)"):
            quantize_(model, "int8")
        assert type(model[0]) is nn.Linear
        assert [row.name for row in quantize_(model, "int8", exclude="1").rows] == ["0"]


def test_what_cannot_be_quantized_is_reported_with_its_share():
    model = nn.ModuleDict({"up": nn.ConvTranspose2d(4, 4, 2), "out": nn.Linear(8, 8, bias=False)})
    model.table = nn.Parameter(torch.ones(8, 8))
    skipped = quantize_(model, "int8").skipped
    assert "ConvTranspose2d" in skipped["up"]
    assert "32.7% of the parameters" in skipped["table"]


def test_a_compiled_model_is_quantized_inside():
    model = nn.Sequential(nn.Linear(32, 8))
    compiled, x = torch.compile(model, backend="eager"), torch.randn(2, 32)
    before = compiled(x)
    quantize_(compiled, "int4")
    assert isinstance(model[0], FakeQuantLinear)
    assert torch.equal(compiled(x), model(x))
    assert not torch.equal(compiled(x), before)

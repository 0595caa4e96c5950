"""Specs in the format's words: those of the library's presets, its arithmetic, and refused where it has none."""

from dataclasses import replace

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationConfig, QuantizationScheme
from compressed_tensors.quantization.lifecycle.forward import forward_quantize
from compressed_tensors.quantization.lifecycle.initialize import initialize_module_for_quantization
from compressed_tensors.quantization.quant_config import QuantizationStatus
from compressed_tensors.quantization.quant_scheme import PRESET_SCHEMES
from native_runs import RANGE, SCHEMES, contents_of, dynamic, spec, state

from fewbit.config.spec import QuantizationSpec
from fewbit.errors import CheckpointError, ConfigError
from fewbit.formats.compressed_tensors import check, notes
from fewbit.formats.compressed_tensors.activations import decode_activation, encode_activation
from fewbit.formats.compressed_tensors.config import quantization_config
from fewbit.formats.compressed_tensors.scheme import activation_args, activation_spec, weight_args, weight_spec
from fewbit.nn.activation import ActivationQuantizer
from fewbit.tensor import QuantizedActivation

PRESETS = {
    "W4A16": {"group_size": 128},
    "W8A8": {},
    "W4A8": {"group_size": 128},
    "W4AFP8": {"group_size": 128},
    "FP8": {},
    "FP8_DYNAMIC": {},
    "FP8_BLOCK": {"block_size": (128, 128)},
    "NVFP4": {},
    "NVFP4A16": {},
    "MXFP4": {},
    "MXFP4A16": {},
    "MXFP6A8": {},
    "MXFP8": {},
    "MXFP8A16": {},
}
INERT = ("observer", "observer_kwargs", "zp_dtype")
"""What readers do nothing with: how the peer found scales, and the dtype of zero points that are not there."""


def told(args):
    return {key: value for key, value in args.model_dump().items() if key not in INERT}


@pytest.mark.parametrize("name", PRESETS)
def test_schemes_are_said_as_the_librarys_presets_say_them(name):
    config, preset = SCHEMES[name][1], PRESET_SCHEMES[name]
    weight = replace(config.weight, **PRESETS[name])
    assert told(QuantizationArgs(**weight_args(weight))) == told(preset["weights"])
    assert (config.input_tensors is None) == ("input_activations" not in preset)
    if config.input_tensors is not None:
        size = {"group_size": 128} if name == "FP8_BLOCK" else {}
        inputs = replace(config.input_tensors, **size)
        assert told(QuantizationArgs(**activation_args(inputs))) == told(preset["input_activations"])


@pytest.mark.parametrize("name", SCHEMES)
def test_specs_come_back_from_the_librarys_words_and_from_its_nulls(name):
    config = SCHEMES[name][1]
    for ours, to_args, to_spec in (
        (config.weight, weight_args, weight_spec),
        (config.input_tensors, activation_args, activation_spec),
    ):
        if ours is None:
            continue
        nulls = dict.fromkeys(["actorder", "block_structure", "group_size", "observer", "scale_dtype", "zp_dtype"])
        for args in (to_args(ours), nulls | {"observer_kwargs": {}} | to_args(ours)):
            back = to_spec(args)
            assert to_args(back) == to_args(ours)
            assert (back.format, back.tiling, back.symmetric) == (ours.format, ours.tiling, ours.symmetric)
            assert back.is_dynamic == ours.is_dynamic


ACTIVATIONS = {name: config.input_tensors for name, (_, config) in SCHEMES.items() if config.input_tensors is not None}


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_the_library_quantizes_activations_as_fewbit_does(name):
    how = ACTIVATIONS[name]
    known = state(how, torch.float32)
    x = 1.5 * torch.randn(2, 6, 64, generator=torch.Generator().manual_seed(0))
    x[0, 0, :32] = 0  # and a group of zeros
    ours = ActivationQuantizer(how, known)(x)

    linear = torch.nn.Linear(64, 8, bias=False)
    scheme = QuantizationScheme(targets=["Linear"], input_activations=activation_args(how))
    initialize_module_for_quantization(linear, scheme, force_zero_point=False)
    linear.quantization_status = QuantizationStatus.COMPRESSED
    tensors = {key.rpartition(".")[2]: value for key, value in encode_activation("m.input", known).items()}
    places = {key: value for key, value in linear.named_parameters() if key.startswith("input_")}
    assert {key: (p.shape, p.dtype) for key, p in places.items()} == {
        k: (t.shape, t.dtype) for k, t in tensors.items()
    }
    linear.load_state_dict(tensors, strict=False)
    theirs = forward_quantize(linear, x, "input", scheme.input_activations)
    assert not torch.equal(ours, x)
    if name in ("MXFP8", "MXFP6A8"):  # the library moves FP8's blocks up a binade at 1.75, where FP4's would round up
        moved = (ours - theirs).abs() > 0
        assert moved.float().mean() < 0.2
        assert (ours - theirs).norm() < 0.05 * x.norm()
    else:
        torch.testing.assert_close(theirs, ours, rtol=1e-6, atol=1e-7)

    back = decode_activation(tensors, activation_spec(activation_args(how)), "input")
    assert torch.equal(ActivationQuantizer(back.spec, back)(x), ours)


WEIGHT = {"m.weight": SCHEMES["W8A8"][1].weight}
INT8 = dynamic("int8")
REFUSED_WEIGHTS = {
    "int4 per tensor": (spec("int8", "per_tensor"), "one scale for the whole tensor"),
    "int blocks": (spec("int8", "per_block"), "integers with scales per block"),
    "int e8m0": (spec("int8", "per_group", scale_type="e8m0"), "int8 with e8m0 scales"),
    "microexponent": (spec("int8", "per_group", group_size=2, scale_type="microexponent"), "microexponent scales"),
    "scale dtype": (spec("int4", "per_group", scale_dtype="float32"), "scales in float32"),
    "e5m2": (spec("e5m2", "per_channel"), "e5m2 with float scales"),
    "e3m2": (spec("e3m2", "per_group", scale_type="e8m0"), "e3m2 with e8m0 scales"),
    "fp4 with float scales": (spec("e2m1", "per_group"), r"e2m1 with float scales; scale_type e4m3 \(NVFP4\)"),
    "mx groups": (spec("e2m1", "per_group", group_size=64, scale_type="e8m0"), "use per_group, group_size 32"),
    "nvfp4 groups": (spec("e2m1", "per_group", scale_type="e4m3"), "use per_group, group_size 16"),
    "int4 with e4m3": (spec("int4", "per_group", group_size=16, scale_type="e4m3"), "NVFP4 is dtype fp4"),
    "columns": (spec("int4", "per_channel", ch_axis=1), "ch_axis 1"),
    "groups of rows": (spec("int4", "per_group", ch_axis=0), "ch_axis 0"),
    "mx of rows": (spec("e2m1", "per_group", ch_axis=0, scale_type="e8m0"), "along a row"),
    "cast": (QuantizationSpec(dtype="bfloat16"), "a cast to bfloat16"),
}
REFUSED_INPUTS = {
    "residual": (dynamic("int8", residual=True), "quantized twice"),
    "clip": (dynamic("int8", clip_ratio=0.9), "clip_ratio 0.9"),
    "percentile": (dynamic("int8", observer="percentile"), "observer percentile"),
    "mse": (dynamic("int8", observer="mse"), "observer mse"),
    "pof2": (dynamic("int8", scale_type="pof2"), "pof2 scales"),
    "floor": (dynamic("int8", round_method="floor"), "round_method floor"),
    "exponents": (dynamic("e2m1", "per_group", scale_type="e8m0", exponent_mode="ceil"), "exponent_mode ceil"),
    "e5m2": (dynamic("e5m2"), "e5m2 has no name"),
    "e8m0 int": (dynamic("int8", "per_group", scale_type="e8m0"), "int8 with e8m0 scales"),
    "microexponent": (dynamic("int8", "per_group", group_size=2, scale_type="microexponent"), "microexponent scales"),
    "static channels": (spec("int8", "per_channel", ch_axis=1), "activations with per_channel"),
    "static scale dtype": (spec("int8", "per_tensor", scale_dtype="float32"), "scales in float32"),
    "cast": (QuantizationSpec(dtype="float16"), "cast to float16"),
}
STATIC = spec("e4m3", "per_tensor")
REFUSED_ATTENTION = {
    "dynamic": ({"key": dynamic("e4m3"), "value": dynamic("e4m3")}, "dynamic KV cache"),
    "key alone": ({"key": STATIC}, "no quantized value"),
    "query alone": ({"query": STATIC}, "no quantized key"),
    "unlike": ({"key": STATIC, "value": spec("int8", "per_tensor")}, "'a.value' differs"),
    "groups": ({"key": spec("e2m1", "per_group", scale_type="e8m0"), "value": STATIC}, "per_group e8m0"),
    "probabilities": ({"key": STATIC, "value": STATIC, "probabilities": STATIC}, "'a.probabilities'"),
}


@pytest.mark.parametrize("case", REFUSED_WEIGHTS)
def test_weights_that_the_format_cannot_hold_are_refused_by_name(case):
    how, reason = REFUSED_WEIGHTS[case]
    with pytest.raises(ConfigError, match=rf"compressed-tensors: 'm.weight' has .*{reason}"):
        check(contents_of({"m.weight": how}))


@pytest.mark.parametrize("case", REFUSED_INPUTS)
def test_inputs_that_readers_would_quantize_otherwise_are_refused_by_name(case):
    how, reason = REFUSED_INPUTS[case]
    with pytest.raises(ConfigError, match=rf"compressed-tensors: 'm.weight' has .*{reason}"):
        check(contents_of(WEIGHT, {"m.input": how}))


def test_what_no_recipe_can_say_of_an_input_is_refused_as_well():
    with pytest.raises(ConfigError, match="quantized twice"):
        activation_args(dynamic("int8", first_stage=spec("e4m3", "per_tensor")))


@pytest.mark.parametrize("case", REFUSED_ATTENTION)
def test_attention_that_the_format_cannot_say_is_refused_by_name(case):
    slots, reason = REFUSED_ATTENTION[case]
    with pytest.raises(ConfigError, match=rf"compressed-tensors: .*{reason}"):
        check(contents_of(WEIGHT, {f"a.{slot}": how for slot, how in slots.items()}))


def test_layers_with_unlike_caches_are_refused():
    unlike = {"a.key": STATIC, "a.value": STATIC} | dict.fromkeys(("b.key", "b.value"), spec("int8", "per_tensor"))
    with pytest.raises(ConfigError, match=r"'b\.key' differs"):
        check(contents_of(WEIGHT, unlike))


def test_outputs_and_inputs_of_plain_weights_are_refused():
    with pytest.raises(ConfigError, match=r"'m.output' \(int8\) cannot be exported"):
        check(contents_of(WEIGHT, {"m.output": INT8}))
    with pytest.raises(ConfigError, match="the module's weight is not"):
        check(contents_of(WEIGHT, {"n.input": INT8}))


def test_how_a_static_scale_was_found_is_no_matter():
    for fields in ({"observer": "percentile"}, {"clip_ratio": 0.9}, {"scale_type": "pof2"}, {"observer": "mse"}):
        check(contents_of(WEIGHT, {"m.input": spec("int8", "per_tensor", **fields)}))
        check(contents_of({"m.weight": spec("int4", "per_group", **fields)}))
    check(contents_of({"m.weight": spec("int4", "per_group", first_stage=spec("e4m3", "per_tensor"))}))


def test_weights_alone_are_checked():
    alone = {name: config.weight for name, (_, config) in SCHEMES.items() if config.input_tensors is None}
    check(contents_of({f"{name}.weight": weight for name, weight in alone.items()}))


def test_static_activations_without_a_scale_are_refused():
    with pytest.raises(ConfigError, match="none was calibrated"):
        encode_activation("m.input", QuantizedActivation(STATIC))
    with pytest.raises(CheckpointError, match="input_scale is missing"):
        decode_activation({}, STATIC, "input")


def test_the_config_has_only_the_keys_that_readers_know():
    weights = {f"{name}.weight": config.weight for name, (_, config) in SCHEMES.items()}
    inputs = {f"{name}.input": how for name, how in ACTIVATIONS.items()}
    cache = {"a.key": STATIC, "a.value": STATIC, "a.query": STATIC}
    config = quantization_config(contents_of(weights, inputs | cache, unquantized=["lm_head"]))
    assert config["format"] == "mixed-precision"
    assert config["ignore"] == ["lm_head"]
    known = {"num_bits", "type", "symmetric", "dynamic", "strategy", "group_size", "block_structure", "scale_dtype"}
    for group in config["config_groups"].values():
        assert set(group) <= {"targets", "weights", "input_activations", "format"}
        for args in (group.get("weights"), group.get("input_activations")):
            assert set(args or ()) <= known
    read = QuantizationConfig.model_validate(config)
    assert len(read.config_groups) == len(SCHEMES) - 1 + 1  # powers of two are said as floats; the query is one more
    assert not any("Linear" in scheme.targets for scheme in read.config_groups.values())
    assert read.kv_cache_scheme.strategy == "tensor"


def test_a_cache_alone_makes_a_config():
    config = quantization_config(contents_of({}, {"a.key": STATIC, "a.value": STATIC}, unquantized=["m"]))
    assert (config["format"], config["config_groups"]) == ("dense", {})
    assert QuantizationConfig.model_validate(config).kv_cache_scheme.num_bits == 8


def test_notes_say_what_readers_get_wrong():
    def noted(name, prefix="m", **activations):
        config = SCHEMES[name][1]
        inputs = {} if config.input_tensors is None else {f"{prefix}.input": config.input_tensors}
        return " ".join(notes(contents_of({f"{prefix}.weight": config.weight}, inputs | activations)))

    assert noted("W4A16") == ""
    assert "leaves quantized activations and KV cache out" in noted("W8A8")
    assert "dtype=torch.bfloat16" in noted("NVFP4A16")
    assert "zero points only with dequantize=True" in noted("W3A16_ASYM")
    assert "incorrectly" not in noted("NVFP4A16")
    assert "incorrectly" in noted("NVFP4A16", "mlp.experts.0.up_proj")
    assert "cannot load experts" in noted("FP8_BLOCK", "mlp.experts.0.up_proj")
    assert "several formats" in " ".join(notes(contents_of({"a.weight": WEIGHT["m.weight"], "b.weight": STATIC})))
    int8 = spec("int8", "per_tensor")
    assert "symmetric FP8 only" in noted("W4A16", **{"a.key": int8, "a.value": int8})


def test_made_up_ranges_clip():
    """The comparisons above would prove little if nothing was clipped."""
    x = torch.tensor([[-9.0, 9.0]])
    clipped = ActivationQuantizer(STATIC, state(STATIC, torch.float32))(x)
    assert clipped.abs().max() <= RANGE[1] * 1.01

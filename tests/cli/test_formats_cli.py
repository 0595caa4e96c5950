"""The command line with quantized activations, caches and searches."""

import json

import pytest
import torch
import yaml

import fewbit
from fewbit.config.schemes import KV_CACHES, SCHEMES
from fewbit.config.spec import AttentionConfig
from fewbit.contents import nominal
from fewbit.formats import holding


@pytest.fixture
def quantize(cli, checkpoint, calibration_file, tmp_path):
    """quantize(*options): `fewbit quantize` of a tiny bfloat16 llama into tmp_path/run with little data."""

    def run(*options):
        return cli(
            "quantize", checkpoint("llama", torch.bfloat16), "--output", tmp_path / "run", "--calibration",
            calibration_file, "--num-samples", 8, "--sequence-length", 32, "--device", "cpu", *options,
        )  # fmt: skip

    return run


def assert_one_sentence(result, *words):
    code, _, err = result
    assert code == 2, err
    assert err.startswith("fewbit: "), err
    assert err.count("\n") == 1, err
    for word in words:
        assert word in err


@pytest.mark.parametrize(
    "options",
    [
        ["--scheme", "W8A8_STATIC", "--algorithm", "smoothquant+gptq"],
        ["--scheme", "fp8kvfp8", "--algorithm", "rtn"],
        ["--scheme", "W4A8-g32", "--algorithm", "awq+gptq"],
        ["--scheme", "NVFP4"],
    ],
    ids=" ".join,
)
def test_quantize_export_verify_and_evaluate_agree(cli, quantize, evaluation_file, tmp_path, options):
    run, exported = tmp_path / "run", tmp_path / "run" / "exports" / "compressed-tensors"
    code, out, _ = quantize(*options, "--export", "compressed-tensors")
    assert code == 0
    assert "14 quantized, 1 skipped" in out
    assert cli("verify", run)[1].startswith(f"{exported}: 14 quantized and ")
    text = ["--text", evaluation_file, "--sequence-length", 64, "--max-windows", 2, "--json"]
    ours, theirs = (json.loads(cli("evaluate", target, *text)[1]) for target in (run, exported))
    assert ours == theirs
    report = json.loads((run / "report.json").read_text(encoding="utf-8"))
    assert "+".join(config["name"] for config in report["recipe"]["algo_config"]) in ("gptq", *options)


def test_a_recipe_file_mixes_formats_and_quantizes_the_cache(cli, quantize, evaluation_file, tmp_path):
    recipe = {
        "scheme": "FP8_DYNAMIC",
        "layer_quant_config": {"*.mlp.*": "NVFP4", "*.0.mlp.down_proj": "W8A8"},
        "attention": {
            slot: {"dtype": "fp8_e4m3", "qscheme": "per_tensor", "observer": "minmax"} for slot in ("key", "value")
        },
        "algorithm": ["smoothquant", {"name": "gptq", "damping": 0.02}],
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    assert quantize("--recipe", tmp_path / "recipe.yaml", "--export", "compressed-tensors")[0] == 0
    config = json.loads((tmp_path / "run/exports/compressed-tensors/config.json").read_text(encoding="utf-8"))
    assert config["quantization_config"]["format"] == "mixed-precision"
    assert config["quantization_config"]["kv_cache_scheme"]["num_bits"] == 8
    assert cli("verify", tmp_path / "run")[0] == 0


def test_resume_of_a_run_with_activations_changes_nothing(quantize, files_of, tmp_path):
    options = ["--scheme", "W8A8_STATICKVFP8", "--algorithm", "smoothquant+rtn"]
    assert quantize(*options)[0] == 0
    before = files_of(tmp_path / "run")
    assert quantize(*options, "--resume")[0] == 0
    assert files_of(tmp_path / "run") == before


def test_inspect_shows_what_a_scheme_would_store(cli, checkpoint):
    model = checkpoint("llama", torch.bfloat16)
    for scheme, spec in (("NVFP4", "e2m1"), ("MXFP8", "e4m3"), ("W8A8", "int8")):
        code, out, err = cli("inspect", model, "--scheme", scheme)
        assert (code, err) == (0, "")
        assert f"quantized      14 linears: {spec}" in out
    assert "attention" not in out
    _, out, _ = cli("inspect", model, "--scheme", "W8A8KV8")
    assert "attention      2 modules: key int8 per_token dynamic, value int8 per_token dynamic" in out


def test_schemes_shows_exports_layouts_and_engines(cli):
    _, out, _ = cli("schemes")
    rows = {line.split()[0]: line for line in out.splitlines()[1:] if line.strip()}
    for name, config in SCHEMES.items():
        inputs = config.input_tensors
        assert (inputs.dtype in rows[name]) if inputs else ("–" in rows[name])
        assert_says(rows[name], nominal(config), "fewbit evaluate")
    for name, spec in KV_CACHES.items():
        assert spec.summary in rows[name]
        assert_says(rows[name], nominal(attention=AttentionConfig(key=spec, value=spec)), "QuantizedCache")
    assert sum("compressed-tensors" in row for row in rows.values()) == len(SCHEMES) - 4 + 1


def assert_says(row, contents, otherwise):
    for form in holding(contents):
        assert form.name in row
        assert form.engines(contents) in row
        assert all(layout in row for layout in form.layouts(contents))
    assert holding(contents) or otherwise in row


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            ["--scheme", "W8A8_STATIC", "--algorithm", "rtn", "--calibration", "none"],
            ["static activation scales need"],
        ),
        (["--scheme", "NVFP4", "--algorithm", "rtn", "--calibration", "none"], ["need calibration data"]),
        (["--scheme", "W8A8", "--algorithm", "awq", "--calibration", "none"], ["needs calibration data"]),
        (["--scheme", "W8A8", "--algorithm", "gptq+rtn"], ["only one can find the codes"]),
        (["--scheme", "NVFP4", "--group-size", "32"], ["group_size 32", "leave it out"]),
        (["--scheme", "W4A16KV4-g32"], ["attention key: group_size 32 does not divide", "16 channels"]),
        (["--scheme", "W8A8KV8", "--export", "compressed-tensors"], ["a dynamic KV cache"]),
        (["--scheme", "MX9", "--export", "compressed-tensors"], ["microexponent scales"]),
        (["--scheme", "W4A16KV16"], ["unknown scheme 'W4A16KV16'"]),
        (["--scheme", "FP8_BLOCK"], ["group size 128 does not divide the 64 inputs", "exclude that layer"]),
    ],
    ids=lambda value: " ".join(value[:2]) if isinstance(value, list) else None,
)
def test_bad_input_is_one_sentence_and_nothing_is_written(quantize, tmp_path, options, words):
    assert_one_sentence(quantize(*options), *words)
    assert not (tmp_path / "run").exists()


SPEC = {"dtype": "int8", "observer": "minmax"}
RECIPES = {
    "group without size": ({"weight": {"qscheme": "per_group"}}, None, ["per_group needs group_size"]),
    "axis": ({"weight": {"qscheme": "per_channel", "ch_axis": 2}}, None, ["ch_axis 2 is out of range"]),
    "symmetric unsigned": ({"weight": {"dtype": "uint4", "qscheme": "per_channel"}}, None, ["symmetric"]),
    "static tokens": ({"input_tensors": SPEC | {"qscheme": "per_token"}}, None, ["input_tensors", "per_token"]),
    "dynamic weight": ({"weight": {"qscheme": "per_channel", "is_dynamic": True}}, None, ["weight: is_dynamic"]),
    "dynamic histogram": (
        {"input_tensors": {"qscheme": "per_tensor", "observer": "histogram", "is_dynamic": True}}, None,
        ["observer histogram", "is_dynamic"],
    ),
    "weights' observer": (
        {"input_tensors": {"qscheme": "per_tensor", "observer": "search"}}, None, ["input_tensors: observer search"],
    ),
    "static residual": (
        {"input_tensors": SPEC | {"qscheme": "per_tensor", "residual": True}}, None, ["residual needs is_dynamic"],
    ),
    "cache by block": (
        {"weight": SPEC | {"qscheme": "per_channel"}},
        {"key": SPEC | {"qscheme": "per_block", "block_size": [8, 8], "is_dynamic": True}}, ["attention: qscheme"],
    ),
    "static cache by group": (
        {"weight": SPEC | {"qscheme": "per_channel"}}, {"value": SPEC | {"qscheme": "per_group", "group_size": 8}},
        ["attention value: qscheme per_group"],
    ),
    "empty attention": ({"weight": SPEC | {"qscheme": "per_channel"}}, {}, ["attention: name a spec"]),
    "unknown slot": (
        {"weight": SPEC | {"qscheme": "per_channel"}}, {"keys": SPEC | {"qscheme": "per_tensor"}}, ["no field 'keys'"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", RECIPES)
def test_contradictory_recipes_are_one_sentence_that_names_the_field(quantize, tmp_path, case):
    config, attention, words = RECIPES[case]
    recipe = {"global_quant_config": config} | ({} if attention is None else {"attention": attention})
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    assert_one_sentence(quantize("--recipe", tmp_path / "recipe.yaml"), *words)
    assert not (tmp_path / "run").exists()


def test_evaluate_of_a_run_is_what_the_library_measures(cli, quantize, evaluation_file, checkpoint, tmp_path):
    assert quantize("--scheme", "W8A8KV8", "--algorithm", "rtn")[0] == 0
    reference = checkpoint("llama", torch.bfloat16)
    text = ["--text", evaluation_file, "--sequence-length", 64, "--max-windows", 2, "--against", reference, "--json"]
    found = json.loads(cli("evaluate", tmp_path / "run", *text)[1])
    expected = fewbit.evaluate(tmp_path / "run", evaluation_file, sequence_length=64, max_windows=2, against=reference)
    assert found == expected.to_dict()
    assert 0 < found["kl_mean"] < 0.01

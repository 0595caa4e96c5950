"""Every verb of the command line, on a tiny checkpoint."""

import dataclasses
import importlib.metadata
import inspect
import json
import subprocess
import sys

import pytest
import torch
import yaml
from typer.main import get_command

import fewbit
from fewbit.cli import VERBS, build_app, main
from fewbit.cli.options import options_of
from fewbit.config.run_options import RunOptions
from fewbit.config.schemes import KV_CACHES, SCHEMES
from fewbit.contents import nominal


@pytest.fixture
def small(calibration_file):
    """Options of `fewbit quantize` that make a run of less than a second."""
    return [
        "--scheme", "W4A16", "--group-size", 32, "--algorithm", "rtn", "--calibration", calibration_file,
        "--num-samples", 8, "--sequence-length", 32, "--device", "cpu",
    ]  # fmt: skip


def test_version(cli):
    assert cli("--version") == (0, f"{fewbit.__version__}\n", "")


@pytest.mark.parametrize("verb", VERBS)
def test_help_of_every_verb_says_what_it_does(cli, verb):
    code, out, err = cli(verb.replace("_", "-"), "--help")
    assert (code, err) == (0, "")
    assert f"fewbit {verb.replace('_', '-')}" in out


def test_help_lists_every_verb(cli):
    _, out, _ = cli("--help")
    assert all(verb.replace("_", "-") in out for verb in VERBS)


HELP = """
import sys
import fewbit.cli
sys.argv = ["fewbit", "--help"]
try:
    fewbit.cli.main()
finally:
    print("torch" in sys.modules, "transformers" in sys.modules)
"""


def test_help_does_not_wait_for_torch():
    found = subprocess.run([sys.executable, "-c", HELP], capture_output=True, text=True, check=True, timeout=60)
    assert found.stdout.splitlines()[-1] == "False False"


@pytest.mark.parametrize("verb", ["quantize", "evaluate"])
def test_options_are_the_arguments_of_the_library_and_say_their_defaults(verb):
    ours = {parameter.name: parameter for parameter in get_command(build_app()).commands[verb].params}
    library = inspect.signature(getattr(fewbit, verb)).parameters
    assert set(ours) - set(library) <= {"recipe", "log", "as_json"}  # the command line's own
    assert set(library) - set(ours) <= {"config", "tokenizer", "progress"}  # objects of Python
    for name, parameter in library.items():
        if name in ours and isinstance(parameter.default, str | int) and not isinstance(parameter.default, bool):
            assert ours[name].default is None
            assert f"(default {parameter.default})" in ours[name].help


def test_help_of_an_option_is_the_docstring_of_its_field():
    options = options_of("fewbit.config.run_options", "ComputeOptions", "RunOptions")
    assert list(options) == [field.name for field in dataclasses.fields(RunOptions)]
    assert options["resume"].help == "Continue an interrupted run."


def test_schemes_lists_every_scheme_with_its_bits(cli):
    code, out, _ = cli("schemes")
    assert code == 0
    rows = {line.split()[0]: line.split() for line in out.splitlines()[1:] if line.strip()}
    assert set(SCHEMES) | set(KV_CACHES) <= set(rows)
    for name, config in SCHEMES.items():
        assert f"{nominal(config).bits_per_weight:.3f}" in rows[name]


def test_quantize_writes_a_run_and_prints_a_table_of_it(cli, checkpoint, small, tmp_path):
    code, out, err = cli("quantize", checkpoint("llama"), "--output", tmp_path / "run", *small)
    assert code == 0
    for name in ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"):
        assert name in out
    assert "skipped    lm_head (outside the blocks' groups)" in out
    assert "14 quantized, 1 skipped · 5.000 bits per weight" in out
    assert f"report     {tmp_path / 'run' / 'report.json'}" in out
    assert err.splitlines()[0].startswith("block 1/2 · error ")  # no terminal: plain lines
    assert err.splitlines()[1].startswith("block 2/2 · error ")


def test_quantize_gives_what_the_library_gives(cli, checkpoint, small, finished_run, files_of, tmp_path):
    assert cli("quantize", checkpoint("llama"), "--output", tmp_path / "run", *small)[0] == 0
    assert files_of(tmp_path / "run") == files_of(finished_run("llama"))


def test_a_recipe_file_says_the_same_as_the_flags(cli, checkpoint, finished_run, files_of, calibration_file, tmp_path):
    recipe = {
        "scheme": "W4A16",
        "group_size": 32,
        "algorithm": "rtn",
        "calibration": {"num_samples": 8, "sequence_length": 32},
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    options = ["--recipe", tmp_path / "recipe.yaml", "--calibration", calibration_file, "--device", "cpu"]
    assert cli("quantize", checkpoint("llama"), "--output", tmp_path / "run", *options)[0] == 0
    assert files_of(tmp_path / "run") == files_of(finished_run("llama"))


def test_flags_go_before_the_recipes_fields(cli, checkpoint, calibration_file, tmp_path):
    recipe = {"scheme": "W8A16", "algorithm": {"name": "gptq"}, "calibration": {"num_samples": 8}, "seed": 5}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    options = [
        "--recipe", tmp_path / "recipe.yaml", "--calibration", calibration_file, "--device", "cpu",
        "--scheme", "W3A16", "--group-size", 64, "--algorithm", "rtn", "--sequence-length", 32,
    ]  # fmt: skip
    assert cli("quantize", checkpoint("llama"), "--output", tmp_path / "run", *options)[0] == 0
    resolved = json.loads((tmp_path / "run" / "report.json").read_text())["recipe"]
    assert resolved["global_quant_config"]["weight"]["dtype"] == "int3"
    assert resolved["global_quant_config"]["weight"]["group_size"] == 64
    assert [config["name"] for config in resolved["algo_config"]] == ["rtn"]
    assert resolved["calibration"] == {"num_samples": 8, "sequence_length": 32, "quantized_activations": True}
    assert resolved["seed"] == 5


def test_quantize_exports_on_the_way_and_verify_and_evaluate_read_it(
    cli, checkpoint, small, evaluation_file, tmp_path
):
    run, exported = tmp_path / "run", tmp_path / "run" / "exports" / "compressed-tensors"
    code, out, _ = cli(
        "quantize", checkpoint("qwen3", torch.bfloat16), "--output", run, *small, "--export", "compressed-tensors"
    )
    assert code == 0
    assert f"export     {exported}" in out
    for target in (run, exported):
        code, out, _ = cli("verify", target)
        assert code == 0
        assert f"{exported}: 14 quantized and " in out
    options = ["--text", evaluation_file, "--sequence-length", 64, "--max-windows", 2, "--json"]
    numbers = [json.loads(cli("evaluate", target, *options)[1]) for target in (run, exported)]
    assert numbers[0] == numbers[1]


def test_resume_of_a_finished_run_with_its_export_is_no_error(cli, checkpoint, small, tmp_path):
    command = ["quantize", checkpoint("llama"), "--output", tmp_path / "run", *small, "--export", "compressed-tensors"]
    assert cli(*command)[0] == 0
    code, _, err = cli(*command, "--resume")
    assert code == 0
    assert f"{tmp_path / 'run' / 'exports' / 'compressed-tensors'} is already there" in err


def test_export_writes_where_it_is_told(cli, finished_run, tmp_path):
    out_directory = tmp_path / "some" / "where"
    code, out, _ = cli("export", finished_run("llama"), "--format", "compressed-tensors", "--output", out_directory)
    assert (code, out.strip()) == (0, str(out_directory))
    assert cli("verify", out_directory)[0] == 0


def test_verify_fails_with_a_sentence_when_a_word_was_changed(cli, finished_run, tmp_path):
    from safetensors.torch import load_file, save_file

    cli("export", finished_run("llama"), "--format", "compressed-tensors", "--output", tmp_path / "out")
    file = tmp_path / "out" / "model-00001-of-00003.safetensors"
    tensors = load_file(file)
    tensors["model.layers.0.mlp.up_proj.weight_packed"][5, 2] ^= 1
    save_file(tensors, file, {"format": "pt"})
    code, out, err = cli("verify", tmp_path / "out")
    assert (code, out) == (2, "")
    assert err == "fewbit: model.layers.0.mlp.up_proj packed: 1 of 1024 values differ from the run\n"


def test_evaluate_prints_what_the_library_measures(cli, finished_run, checkpoint, evaluation_file):
    options = [
        "--text",
        evaluation_file,
        "--sequence-length",
        64,
        "--max-windows",
        2,
        "--against",
        checkpoint("llama"),
    ]
    code, out, err = cli("evaluate", finished_run("llama"), *options, "--json")
    expected = fewbit.evaluate(
        finished_run("llama"), evaluation_file, sequence_length=64, max_windows=2, against=checkpoint("llama")
    )
    assert (code, err) == (0, "")
    assert json.loads(out) == expected.to_dict()
    code, out, _ = cli("evaluate", finished_run("llama"), *options)
    assert f"perplexity         {expected.perplexity:.4f}" in out
    assert f"{expected.top1_agreement:.2%}" in out


def test_inspect_shows_architecture_groups_and_what_a_scheme_would_make(cli, checkpoint, finished_run):
    code, out, err = cli("inspect", checkpoint("gemma3_text"), "--scheme", "W4A16", "--group-size", 32)
    assert (code, err) == (0, "")
    assert "architecture   gemma3\n" in out
    assert "blocks         7 in model.layers" in out
    assert "self_attn.q_proj [64 × 64], self_attn.k_proj [32 × 64], self_attn.v_proj [32 × 64]" in out
    assert "mlp.down_proj [64 × 128]" in out
    assert "quantized      49 linears: int4" in out
    assert "skipped        1 linears: outside the blocks' groups" in out


def test_inspect_predicts_the_size_of_the_run(checkpoint, finished_run, family):
    from fewbit.checkpoint.source import read_header
    from fewbit.config.recipe import Config
    from fewbit.runs.inspection import inspect

    predicted = inspect(checkpoint(family), Config.from_dict({"scheme": "W4A16", "group_size": 32})).bytes_quantized
    run = finished_run(family)
    stored = 0
    for file in [*(run / "blocks").iterdir(), run / "outside.safetensors"]:
        for info in read_header(file).values():
            stored += torch.Size(info.shape).numel() * info.dtype.itemsize
    assert predicted == stored


def test_inspect_without_a_scheme_shows_the_model_only(cli, checkpoint):
    code, out, _ = cli("inspect", checkpoint("llama"))
    assert code == 0
    assert "would store" not in out


def test_log_has_a_line_for_every_linear(cli, checkpoint, small, tmp_path):
    import logging

    before = list(logging.getLogger("fewbit").handlers)
    try:
        cli("quantize", checkpoint("llama"), "--output", tmp_path / "run", *small, "--log", tmp_path / "log.txt")
    finally:
        for handler in set(logging.getLogger("fewbit").handlers) - set(before):
            handler.close()
            logging.getLogger("fewbit").removeHandler(handler)
    assert (tmp_path / "log.txt").read_text(encoding="utf-8").count(" loss ") == 14


def test_the_command_runs_as_a_process():
    found = subprocess.run(
        [sys.executable, "-c", "from fewbit.cli import main; main()", "schemes"],
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    assert "W4A16" in found.stdout
    assert found.stderr == ""


def test_the_installed_script_is_that_command():
    (script,) = importlib.metadata.entry_points(group="console_scripts", name="fewbit")
    assert script.load() is main

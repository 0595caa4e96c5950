"""Bad input: one sentence on stderr that says what to do, exit code 2, nothing half-written."""

import fcntl
import json
import os
import resource
import shutil

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from fewbit.config.run_options import parse_size


@pytest.fixture
def quantize(cli, calibration_file, tmp_path):
    """quantize(model, *options): the `fewbit quantize` command with small numbers; later options go before earlier."""

    def run(model, *options):
        return cli(
            "quantize", model, "--output", tmp_path / "run", "--scheme", "W4A16", "--group-size", 32,
            "--algorithm", "rtn", "--calibration", calibration_file, "--num-samples", 8, "--sequence-length", 32,
            "--device", "cpu", *options,
        )  # fmt: skip

    return run


def assert_one_sentence(result, *words):
    code, _, err = result
    assert code == 2, err
    assert err.startswith("fewbit: "), err
    assert err.count("\n") == 1, err
    assert "Traceback" not in err
    for word in words:
        assert word in err


def rewrite(model, **changes):
    tensors = load_file(model / "model.safetensors")
    for name, tensor in changes.items():
        tensors[name] = tensor
    save_file(tensors, model / "model.safetensors", {"format": "pt"})


def truncated(model):
    file = model / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])


def header_cut_off(model):
    file = model / "model.safetensors"
    file.write_bytes(file.read_bytes()[:100])


def empty_file(model):
    (model / "model.safetensors").write_bytes(b"")


def pickle_under_another_name(model):
    torch.save({"weight": torch.zeros(2)}, model / "model.safetensors")


def pickle_only(model):
    (model / "model.safetensors").unlink()
    torch.save({"weight": torch.zeros(2)}, model / "pytorch_model.bin")


def no_weights(model):
    (model / "model.safetensors").unlink()


def not_a_number(model):
    weight = load_file(model / "model.safetensors")["model.layers.1.mlp.up_proj.weight"]
    weight[3, 4] = torch.nan
    rewrite(model, **{"model.layers.1.mlp.up_proj.weight": weight})


def infinity(model):
    weight = load_file(model / "model.safetensors")["model.layers.0.self_attn.q_proj.weight"]
    weight[0, 0] = torch.inf
    rewrite(model, **{"model.layers.0.self_attn.q_proj.weight": weight})


def infinite_embedding(model):
    weight = load_file(model / "model.safetensors")["model.embed_tokens.weight"]
    weight[7, 7] = -torch.inf
    rewrite(model, **{"model.embed_tokens.weight": weight})


def wrong_shape(model):
    rewrite(model, **{"model.layers.1.mlp.down_proj.weight": torch.zeros(64, 96)})


def lost_tensor(model):
    tensors = load_file(model / "model.safetensors")
    del tensors["model.layers.1.mlp.down_proj.weight"]
    save_file(tensors, model / "model.safetensors", {"format": "pt"})


def lost_norm(model):
    tensors = load_file(model / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, model / "model.safetensors", {"format": "pt"})


def lost_head(model):
    tensors = load_file(model / "model.safetensors")  # config.json says that it is not tied to the embeddings
    del tensors["lm_head.weight"]
    save_file(tensors, model / "model.safetensors", {"format": "pt"})


def no_config(model):
    (model / "config.json").unlink()


def damaged_config(model):
    (model / "config.json").write_text('{"model_type": "lla')


def unknown_model_type(model):
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"model_type": "no-such-model"}))


def no_tokenizer(model):
    for file in model.glob("tokenizer*"):
        file.unlink()


def damaged_tokenizer(model):
    (model / "tokenizer.json").write_text("{")


def already_quantized(model):
    """Like DeepSeek's and Qwen's FP8 checkpoints: the weights keep their names, the scales lie beside them."""
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "fp8"}}))
    name = "model.layers.0.mlp.up_proj.weight"
    weight = load_file(model / "model.safetensors")[name]
    rewrite(model, **{name: (weight * 256).to(torch.float8_e4m3fn), f"{name}_scale_inv": torch.full((1, 1), 1 / 256)})


DAMAGES = {
    truncated: ["model.safetensors is truncated or damaged", "download it again"],
    header_cut_off: ["model.safetensors is truncated or damaged", "download it again"],
    empty_file: ["model.safetensors is truncated or damaged", "download it again"],
    pickle_under_another_name: ["model.safetensors is a pickle, not safetensors", "convert it"],
    pickle_only: ["pickled weights (pytorch_model.bin) and no safetensors", "convert them"],
    no_weights: ["holds neither model.safetensors nor model.safetensors.index.json"],
    not_a_number: ["'model.layers.1.mlp.up_proj.weight' holds 1 NaN or infinite values"],
    infinity: ["'model.layers.0.self_attn.q_proj.weight' holds 1 NaN or infinite values"],
    infinite_embedding: ["'model.embed_tokens.weight' holds 1 NaN or infinite values"],
    wrong_shape: ["down_proj.weight", "(64, 96)", "(64, 128)"],
    lost_tensor: ["holds no tensor 'model.layers.1.mlp.down_proj.weight'"],
    lost_norm: ["'model.norm.weight'"],
    lost_head: ["'lm_head.weight'"],
    no_config: ["has no config.json"],
    damaged_config: ["config.json"],
    unknown_model_type: ["config.json", "no-such-model"],
    no_tokenizer: ["needs a tokenizer"],
    damaged_tokenizer: ["tokenizer in", "cannot be read"],
    already_quantized: ["quantized", "fp8"],
}
FOUND_WHILE_WALKING = {not_a_number, infinity, infinite_embedding, wrong_shape}  # only then is the tensor read


@pytest.mark.parametrize("damage", list(DAMAGES), ids=lambda damage: damage.__name__)
def test_a_damaged_model(quantize, llama, tmp_path, damage):
    damage(llama)
    assert_one_sentence_after_progress(quantize(llama), *DAMAGES[damage])
    if damage in FOUND_WHILE_WALKING:
        assert not list(tmp_path.rglob("*.partial"))
        assert not (tmp_path / "run" / "report.json").exists()
    else:
        assert not (tmp_path / "run").exists()


def assert_one_sentence_after_progress(result, *words):
    """Like `assert_one_sentence`, but blocks that were done may have been announced before."""
    code, out, err = result
    *progress, sentence = err.splitlines(keepends=True)
    assert all(line.startswith("block ") for line in progress), err
    assert_one_sentence((code, out, sentence), *words)


def test_a_shard_named_in_the_index_but_absent(quantize, checkpoint, tmp_path):
    model = shutil.copytree(checkpoint("llama", sharded=True), tmp_path / "model")
    shard = sorted(model.glob("model-*.safetensors"))[1]
    shard.unlink()
    assert_one_sentence(quantize(model), f"names the shard {shard.name}, which is missing from {model}")
    assert not (tmp_path / "run").exists()


def test_a_truncated_shard(quantize, checkpoint, tmp_path):
    model = shutil.copytree(checkpoint("llama", sharded=True), tmp_path / "model")
    shard = sorted(model.glob("model-*.safetensors"))[-1]
    shard.write_bytes(shard.read_bytes()[:-1])
    assert_one_sentence(quantize(model), f"{shard.name} is truncated or damaged")
    assert not (tmp_path / "run").exists()


def test_a_damaged_index(quantize, checkpoint, tmp_path):
    model = shutil.copytree(checkpoint("llama", sharded=True), tmp_path / "model")
    (model / "model.safetensors.index.json").write_text("{}")
    assert_one_sentence(quantize(model), "index.json is damaged")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["no/such/directory", "nowhere"])
def test_a_model_that_does_not_exist(quantize, tmp_path, name):
    assert_one_sentence(quantize(tmp_path / name), "does not exist; give a checkpoint's directory or a model id")
    assert not (tmp_path / "run").exists()


def test_a_file_where_a_checkpoint_directory_is_expected(quantize, llama, tmp_path):
    assert_one_sentence(quantize(llama / "model.safetensors"), "is no directory")
    assert not (tmp_path / "run").exists()


OPTIONS = {
    "group size": (["--group-size", 48], ["group size 48 does not divide the 64 inputs of", "--group-size"]),
    "default group size": (["--group-size", 128], ["group size 128 does not divide", "use --group-size 64"]),
    "group size 0": (["--group-size", 0], ["group size must be a positive number, or -1"]),
    "scheme": (["--scheme", "W4A61"], ["unknown scheme 'W4A61'", "did you mean 'W4A16'?"]),
    "algorithm": (["--algorithm", "gtpq"], ["unknown algorithm 'gtpq'", "did you mean 'gptq'?"]),
    "export format": (["--export", "compresed-tensors"], ["unknown export format", "did you mean"]),
    "gptq without data": (["--algorithm", "gptq", "--calibration", "none"], ["gptq needs calibration data"]),
    "missing text": (["--calibration", "no-such-text"], ["no-such-text does not exist"]),
    "too long a sequence": (["--sequence-length", 10**6], ["less than one sequence of 1000000", "--sequence-length"]),
    "no samples": (["--num-samples", 0], ["num_samples"]),
    "sequence of one": (["--sequence-length", 1], ["sequence_length"]),
    "unknown device": (["--device", "gpu"], ["unknown device 'gpu'", "cuda:N"]),
    "device of another kind": (["--device", "meta"], ["device 'meta' is not supported"]),
    "size": (["--activation-memory", "lots"], ["'lots' is no size; write for example 4GiB"]),
    "missing recipe": (["--recipe", "no-such-recipe"], ["recipe no-such-recipe does not exist"]),
}


@pytest.mark.parametrize("case", list(OPTIONS))
def test_bad_options(quantize, checkpoint, tmp_path, case):
    options, words = OPTIONS[case]
    assert_one_sentence(quantize(checkpoint("llama"), *options), *words)
    assert not (tmp_path / "run").exists()


def test_neither_scheme_nor_recipe(cli, checkpoint, tmp_path):
    result = cli("quantize", checkpoint("llama"), "--output", tmp_path / "run")
    assert_one_sentence(result, "--scheme W4A16", "--recipe FILE")
    assert not (tmp_path / "run").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
@pytest.mark.parametrize("device", ["cuda", "cuda:1"])
def test_a_gpu_that_is_absent(quantize, checkpoint, tmp_path, device):
    assert_one_sentence(quantize(checkpoint("llama"), "--device", device), f"{device!r}", "use --device cpu")
    assert not (tmp_path / "run").exists()


RECIPES = {
    "unknown field": ({"shceme": "W4A16"}, ["no field 'shceme'", "did you mean 'scheme'?"]),
    "unknown field of a spec": (
        {"global_quant_config": {"weight": {"dtype": "int4", "groupsize": 32}}},
        ["QuantizationSpec has no field 'groupsize'", "did you mean 'group_size'?"],
    ),
    "unknown field of an algorithm": (
        {"scheme": "W4A16", "algorithm": {"name": "gptq", "dampning": 0.1}},
        ["GPTQConfig has no field 'dampning'", "did you mean 'damping'?"],
    ),
    "unknown field of calibration": (
        {"scheme": "W4A16", "calibration": {"samples": 8}},
        ["CalibrationConfig has no field 'samples'"],
    ),
    "value of the wrong type": ({"scheme": "W4A16", "seed": "zero"}, ["Config.seed", "'zero'"]),
    "pattern in exclude": ({"scheme": "W4A16", "exclude": ["*.k_porj"]}, ["exclude: '*.k_porj' matches no module"]),
    "pattern of a spec": (
        {"scheme": "W4A16", "layer_quant_config": {"*.k_porj": "W8A16"}},
        ["layer_quant_config: '*.k_porj' matches no module"],
    ),
    "damaged expression": (
        {"scheme": "W4A16", "exclude": ["re:(k_proj"]},
        ["pattern 're:(k_proj' is not a regular expression"],
    ),
    "type": (
        {"scheme": "W4A16", "layer_type_quant_config": {"Linaer": "W8A16"}},
        ["no module is of class 'Linaer'", "did you mean 'Linear'?"],
    ),
    "nothing left": ({"scheme": "W4A16", "exclude": ["*"]}, ["quantizes nothing"]),
    "no scheme": ({"seed": 1}, ["needs a scheme"]),
    "exclude is a number": ({"scheme": "W4A16", "exclude": 5}, ["exclude"]),
    "dtype": ({"global_quant_config": {"weight": {"dtype": "int99"}}}, ["unknown dtype 'int99'"]),
    "dtype without codes": (
        {"global_quant_config": {"weight": {"dtype": "int10", "qscheme": "per_channel"}}},
        ["global_quant_config weight: int10 can be rounded to", "codes have 2 to 8 bits"],
    ),
}


@pytest.mark.parametrize("case", list(RECIPES))
def test_bad_recipes(cli, checkpoint, calibration_file, tmp_path, case):
    recipe, words = RECIPES[case]
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    result = cli(
        "quantize", checkpoint("llama"), "--output", tmp_path / "run", "--recipe", tmp_path / "recipe.yaml",
        "--group-size", 32, "--calibration", calibration_file, "--device", "cpu",
    )  # fmt: skip
    assert_one_sentence(result, *words)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("content", [b"scheme: [W4A16", b"just words", b"", b"\xff\xfe\x00"])
def test_a_recipe_that_is_no_table(quantize, checkpoint, tmp_path, content):
    (tmp_path / "recipe.yaml").write_bytes(content)
    assert_one_sentence(quantize(checkpoint("llama"), "--recipe", tmp_path / "recipe.yaml"), "recipe")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", ["is empty"]),
        (b" \n \n", ["is empty"]),
        (b"ba be", ["tokens, less than one sequence of 32"]),
        ("größer ".encode("latin-1") * 100, ["is not UTF-8"]),
        (b"PK\x03\x04" + bytes(range(256)) * 10, ["is not UTF-8"]),
    ],
)
def test_bad_calibration_text(quantize, checkpoint, tmp_path, content, words):
    (tmp_path / "text.txt").write_bytes(content)
    result = quantize(checkpoint("llama"), "--calibration", tmp_path / "text.txt")
    assert_one_sentence(result, "text.txt", *words)
    assert not (tmp_path / "run").exists()


def test_an_output_that_is_a_file(quantize, checkpoint, tmp_path):
    (tmp_path / "run").write_text("thesis")
    assert_one_sentence(quantize(checkpoint("llama")), "run is a file, not a directory")
    assert (tmp_path / "run").read_text() == "thesis"


def test_an_output_that_holds_other_files(quantize, checkpoint, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.txt").write_text("three years of work")
    assert_one_sentence(quantize(checkpoint("llama")), "is not empty and holds no fewbit run")
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["thesis.txt"]


def test_the_models_own_directory_as_output(quantize, llama):
    before = {path.name: path.read_bytes() for path in llama.iterdir()}
    assert_one_sentence(quantize(llama, "--output", llama), "is not empty and holds no fewbit run")
    assert {path.name: path.read_bytes() for path in llama.iterdir()} == before


def test_an_output_in_use_by_another_run(quantize, checkpoint, tmp_path):
    quantize(checkpoint("llama"))
    with (tmp_path / "run" / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # as the other run does
        assert_one_sentence(quantize(checkpoint("llama"), "--resume"), "is in use by another run")


def test_a_run_that_is_there_already(quantize, checkpoint):
    assert quantize(checkpoint("llama"))[0] == 0
    assert_one_sentence(quantize(checkpoint("llama")), "already holds a run; use --resume")


@pytest.mark.parametrize(
    ("options", "field"),
    [
        (["--scheme", "W3A16"], "'global_quant_config'"),
        (["--seed", 7], "'seed': 0 before, 7 now"),
        (["--algorithm", "gptq"], "'algo_config'"),
    ],
)
def test_resume_with_a_changed_recipe(quantize, checkpoint, tmp_path, options, field):
    assert quantize(checkpoint("llama"))[0] == 0
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    result = quantize(checkpoint("llama"), *options, "--resume")
    assert_one_sentence(result, "cannot be resumed", f"recipe field {field}", "use the original settings")
    assert {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()} == before


def test_resume_with_a_damaged_manifest(quantize, checkpoint, tmp_path):
    quantize(checkpoint("llama"))
    (tmp_path / "run" / "fewbit.json").write_text("{")
    assert_one_sentence(quantize(checkpoint("llama"), "--resume"), "fewbit.json is damaged")


@pytest.fixture
def disk():
    """disk(bytes): files cannot grow beyond that, which fails like a full disk; disk(None): they can again."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)  # Python ignores SIGXFSZ, so writing fails with EFBIG

    def limit(size):
        resource.setrlimit(resource.RLIMIT_FSIZE, (before[0] if size is None else size, before[1]))

    yield limit
    limit(None)


@pytest.mark.parametrize(
    ("size", "options"),
    [
        (500, []),  # not even the manifest
        (12_000, []),  # manifest, but no block
        (12_000, ["--activation-memory", "0"]),  # … and no hidden states
        (60_000, []),  # blocks, but no embeddings
    ],
)
def test_a_full_disk_can_be_mended_and_the_run_resumed(
    quantize, checkpoint, finished_run, files_of, tmp_path, disk, size, options
):
    disk(size)
    result = quantize(checkpoint("llama"), *options)
    disk(None)
    assert_one_sentence_after_progress(result, "the disk is full", "free some space", "--resume")
    assert not list(tmp_path.rglob("*.partial"))
    assert not (tmp_path / "run" / "work").exists()
    assert quantize(checkpoint("llama"), *options, "--resume")[0] == 0
    assert files_of(tmp_path / "run") == files_of(finished_run("llama"))


def test_a_disk_that_is_full_while_exporting(cli, finished_run, tmp_path, disk):
    run = finished_run("llama")
    disk(12_000)
    result = cli("export", run, "--format", "compressed-tensors", "--output", tmp_path / "out")
    disk(None)
    assert_one_sentence(result, "the disk is full")
    assert list(tmp_path.iterdir()) == []


def test_an_output_where_nothing_may_be_written(quantize, checkpoint, monkeypatch):
    from pathlib import Path

    make_directory = Path.mkdir

    def refuse(self, *arguments, **options):  # chmod would not stop root
        if self.name == "run":
            raise PermissionError(13, "Permission denied", str(self))
        make_directory(self, *arguments, **options)

    monkeypatch.setattr(Path, "mkdir", refuse)
    assert_one_sentence(quantize(checkpoint("llama")), "run", "Permission denied")


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (["export", "{model}", "--format", "compressed-tensors"], ["is not a fewbit run: it has no fewbit.json"]),
        (["export", "{run}", "--format", "gguf"], ["unknown export format 'gguf'"]),
        (["export", "{absent}", "--format", "compressed-tensors"], ["is not a fewbit run"]),
        (["verify", "{model}"], ["is no fewbit export"]),
        (["verify", "{run}"], ["has no exports yet"]),
        (["verify", "{absent}"], ["absent"]),
        (["evaluate", "{absent}", "--text", "{text}"], ["does not exist"]),
        (["evaluate", "{model}", "--text", "{absent}"], ["does not exist"]),
        (["evaluate", "{model}", "--text", "{text}", "--sequence-length", "1000000"], ["less than one window"]),
        (["evaluate", "{model}", "--text", "{text}", "--sequence-length", "1"], ["at least 2"]),
        (["evaluate", "{model}", "--text", "{text}", "--max-windows", "0"], ["at least 1"]),
        (["evaluate", "{model}", "--text", "{text}", "--against", "{absent}"], ["does not exist"]),
        (["evaluate", "{model}", "--text", "{text}", "--device", "gpu"], ["unknown device"]),
        (["inspect", "{absent}"], ["does not exist"]),
        (["inspect", "{model}", "--scheme", "W5A61"], ["unknown scheme"]),
        (["inspect", "{model}", "--group-size", "32"], ["only together with --scheme"]),
        (["inspect", "{model}", "--scheme", "W4A16", "--group-size", "48"], ["does not divide"]),
    ],
    ids=lambda value: " ".join(value[:2]) if isinstance(value, list) else None,
)
def test_bad_input_of_the_other_verbs(cli, checkpoint, finished_run, evaluation_file, tmp_path, command, words):
    places = {
        "model": checkpoint("llama"),
        "run": finished_run("llama"),
        "text": evaluation_file,
        "absent": tmp_path / "absent",
    }
    assert_one_sentence(cli(*(part.format(**places) for part in command)), *words)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("size", ["9" * 400 + "GiB", "1" * 30, "0", "0.5KB"])
def test_sizes_of_any_magnitude_are_read(size):
    assert parse_size(size) >= 0


@pytest.mark.timeout(60)
def test_a_log_that_is_no_file_is_refused_at_once(quantize, checkpoint, tmp_path):
    os.mkfifo(tmp_path / "log")
    assert_one_sentence(quantize(checkpoint("llama"), "--log", tmp_path / "log"), "is a pipe, not a file")


def test_a_name_of_many_pages_is_cut_off(cli):
    code, _, err = cli("inspect", "x" * 50_000)
    assert code == 2
    assert len(err) < 2100

"""Whole exports hold the run's codes, scales and activations; what was damaged or left out is found and named."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from native_runs import EVERY, SCHEMES, spec
from safetensors.torch import load_file, save_file

import fewbit
from fewbit.checkpoint.journal import Journal
from fewbit.checkpoint.native import NativeCheckpoint, block_file, write_part
from fewbit.errors import CheckpointError, ConfigError, RunError, VerificationError
from fewbit.files import write_json
from fewbit.formats import EXPORTERS, export, verify
from fewbit.formats.compressed_tensors.read import CompressedTensorsSource
from fewbit.formats.verification import ORIGIN, read_origin
from fewbit.tensor import QuantizedActivation

FORMAT = "compressed-tensors"
FP8, INT8 = spec("e4m3", "per_tensor"), spec("int8", "per_tensor")
HEADS = spec("e4m3", "per_channel")
AFFINE = spec("uint8", "per_tensor", symmetric=False)
CACHES = {
    "FP8": {"key": FP8, "value": FP8},
    "INT8": {"key": INT8, "value": INT8},
    "affine": {"key": AFFINE, "value": AFFINE},
    "heads": {"key": HEADS, "value": HEADS},
    "query": {"key": FP8, "value": FP8, "query": FP8},
    "query, heads": {"key": HEADS, "value": HEADS, "query": HEADS},
}
CASES = [(name, torch.bfloat16, None) for name in EVERY] + [("W4A16", torch.float32, cache) for cache in CACHES]
CASES += [("FP8", torch.float32, "query, heads"), ("mixed", torch.float32, "FP8")]


@pytest.fixture(scope="session")
def exported(native):
    """exported(name of EVERY, dtype, name of CACHES): (run, export), the export in its usual place, made once."""

    def make(name, dtype=torch.float32, cache=None):
        run = native(name, dtype, CACHES.get(cache))
        directory = run / "exports" / FORMAT
        return run, directory if directory.exists() else export(run, FORMAT, directory)

    return make


@pytest.fixture
def copied(exported, tmp_path):
    """copied(…as exported): a run with its export, to be damaged."""

    def copy(*arguments):
        run, directory = exported(*arguments)
        shutil.copytree(run, tmp_path / "run")
        return tmp_path / "run", tmp_path / "run" / directory.relative_to(run)

    return copy


@pytest.mark.parametrize(("name", "dtype", "cache"), CASES)
def test_the_library_decodes_every_tensor_to_the_runs(exported, name, dtype, cache):
    run, directory = exported(name, dtype, cache)
    (verification,) = verify(directory)
    native = NativeCheckpoint(run)
    assert verification.quantized == 14
    assert verification.dense == len(native.info()) - 14
    assert verification.activations == len(native.activations())
    assert verification.decoder.startswith("compressed-tensors ")
    assert verify(run) == [verification]
    config = json.loads((directory / "config.json").read_text())["quantization_config"]
    assert config["format"] == ("mixed-precision" if name == "mixed" else SCHEMES[name][0])
    assert config["ignore"] == ["lm_head"]
    assert ("kv_cache_scheme" in config) == (cache is not None)


@pytest.mark.parametrize(("name", "dtype", "cache"), CASES)
def test_reading_the_export_back_gives_the_runs_weights_and_activations(exported, name, dtype, cache):
    run, directory = exported(name, dtype, cache)
    native, source = NativeCheckpoint(run), CompressedTensorsSource(directory)
    assert {name: info.shape for name, info in source.info().items()} == {
        name: info.shape for name, info in native.info().items()
    }
    for weight_name in native.quantized:
        ours, back = native.read_quantized(weight_name), source.read_quantized(weight_name)
        assert (back.spec.format, back.spec.tiling) == (ours.spec.format, ours.spec.tiling)
        assert torch.equal(back.codes, ours.codes)
        assert torch.equal(back.scale.float(), ours.scale.float())
        assert torch.equal(back.dequantize(), ours.dequantize())
    names = list(native.info())
    ours, back = native.read(names), source.read(names)
    assert all(torch.equal(ours[name], back[name]) for name in names)
    expected, found = native.activations(), source.activations()
    assert set(found) == set(expected)
    for name, activation in expected.items():
        spec, back = activation.spec, found[name]
        assert (back.spec.dtype, back.spec.qscheme, back.spec.is_dynamic) == (
            spec.dtype,
            spec.qscheme,
            spec.is_dynamic,
        )
        assert back.spec.tiling == spec.tiling
        assert back.global_scale == activation.global_scale
        for part in ("scale", "zero_point"):
            assert (getattr(back, part) is None) == (getattr(activation, part) is None)
            assert getattr(back, part) is None or torch.equal(getattr(back, part), getattr(activation, part))


def change(directory, name, edit):
    """Edit the tensors of the shard that holds `name`, and the index with them."""
    index = json.loads((directory / "model.safetensors.index.json").read_text())
    file = directory / index["weight_map"][name]
    tensors = load_file(file)
    before, size = set(tensors), sum(tensor.nbytes for tensor in tensors.values())
    edit(tensors)
    index["weight_map"] |= dict.fromkeys(tensors, file.name)
    for lost in before - set(tensors):
        del index["weight_map"][lost]
    index["metadata"]["total_size"] += sum(tensor.nbytes for tensor in tensors.values()) - size
    save_file(tensors, file, {"format": "pt"})
    write_json(directory / "model.safetensors.index.json", index)


def edit_config(directory, edit):
    config = json.loads((directory / "config.json").read_text())
    edit(config["quantization_config"])
    write_json(directory / "config.json", config)


def flip(tensor):
    """The smallest change of one number."""
    flat = tensor.view(torch.uint8).view(-1) if tensor.dtype.itemsize == 1 else tensor.view(-1)
    place = min(3, flat.numel() - 1)
    flat[place] = torch.nextafter(flat[place], torch.tensor(9.0)) if flat.is_floating_point() else flat[place] ^ 1


ATTENTION, DOWN = "model.layers.0.self_attn", "model.layers.1.mlp.down_proj"


@pytest.mark.parametrize(
    ("case", "name"),
    [
        (("W3A16_ASYM",), f"{DOWN}.weight_packed"),
        (("W3A16_ASYM",), f"{ATTENTION}.k_proj.weight_scale"),
        (("W3A16_ASYM",), f"{DOWN}.weight_zero_point"),
        (("W3A16_ASYM",), "model.layers.1.input_layernorm.weight"),
        (("W3A16_ASYM",), "model.embed_tokens.weight"),
        (("W3A16_ASYM",), "lm_head.weight"),
        (("W8A8, affine",), f"{DOWN}.weight"),
        (("W8A8, affine",), f"{DOWN}.weight_zero_point"),
        (("W8A8, affine static",), f"{DOWN}.input_zero_point"),
        (("FP8",), f"{DOWN}.weight"),
        (("FP8",), f"{DOWN}.weight_scale"),
        (("FP8",), f"{DOWN}.input_scale"),
        (("NVFP4",), f"{DOWN}.weight_packed"),
        (("NVFP4",), f"{DOWN}.weight_scale"),
        (("NVFP4",), f"{DOWN}.weight_global_scale"),
        (("NVFP4",), f"{DOWN}.input_global_scale"),
        (("MXFP6",), f"{DOWN}.weight_packed"),
        (("MXFP8",), f"{DOWN}.weight_scale"),
        (("W4A16", torch.float32, "affine"), f"{ATTENTION}.v_zero_point"),
        (("W4A16", torch.float32, "query, heads"), f"{ATTENTION}.k_scale"),
        (("W4A16", torch.float32, "query, heads"), f"{ATTENTION}.q_scale"),
    ],
)
def test_the_smallest_change_a_loss_and_a_surplus_are_found_and_named(copied, case, name):
    _, directory = copied(*case)
    verify(directory)
    change(directory, name, lambda tensors: flip(tensors[name]))
    with pytest.raises(VerificationError, match=name.rpartition(".")[0]):
        verify(directory)
    change(directory, name, lambda tensors: tensors.pop(name))
    with pytest.raises(VerificationError, match=f"'{name}' is missing"):
        verify(directory)


def test_a_tensor_too_many_is_found(copied):
    _, directory = copied("W8A8")
    extra = f"{DOWN}.weight_zero_point"  # of a symmetric weight: vLLM refuses it
    change(directory, f"{DOWN}.weight", lambda tensors: tensors.update({extra: torch.zeros(64, 1, dtype=torch.int8)}))
    with pytest.raises(VerificationError, match=f"'{extra}'"):
        verify(directory)


def test_a_scale_of_another_dtype_is_found(copied):
    _, directory = copied("W3A16_ASYM")
    name = f"{DOWN}.weight_scale"
    change(directory, name, lambda tensors: tensors.update({name: tensors[name].double()}))
    with pytest.raises(VerificationError, match=r"down_proj scale: found torch\.float64"):
        verify(directory)


@pytest.mark.parametrize(
    ("case", "path", "value"),
    [
        (("W3A16_ASYM",), ("weights", "num_bits"), 4),
        (("W3A16_ASYM",), ("weights", "symmetric"), True),
        (("W3A16_ASYM",), ("weights", "group_size"), 16),
        (("W4A8",), ("format",), "int-quantized"),
        (("W4A8",), ("input_activations",), None),
        (("W4A8",), ("input_activations", "num_bits"), 4),
        (("NVFP4",), ("input_activations", "dynamic"), True),
        (("MXFP8",), ("weights", "scale_dtype"), None),
        (("FP8",), ("input_activations", "strategy"), "token"),
        (("FP8",), ("input_activations", "unknown_key"), 1),
        (("FP8",), ("targets",), ["Conv1d"]),
    ],
)
def test_a_config_that_contradicts_the_run_is_found(copied, case, path, value):
    _, directory = copied(*case)

    def edit(config):
        *parents, last = path
        table = config["config_groups"]["group_0"]
        for parent in parents:
            table = table[parent]
        table[last] = value

    edit_config(directory, edit)
    with pytest.raises(VerificationError):
        verify(directory)


@pytest.mark.parametrize(
    ("edit", "reason"),
    [
        (lambda config: config.pop("kv_cache_scheme"), "kv_cache_scheme"),
        (lambda config: config["kv_cache_scheme"].update(num_bits=4), "kv_cache_scheme"),
        (lambda config: config["config_groups"].pop("group_1"), "group_1 is missing"),
        (lambda config: config["ignore"].clear(), r"ignore is \[\], in the run \['lm_head'\]"),
        (lambda config: config["ignore"].append("re:.*down_proj"), "ignore is .*down_proj"),
    ],
)
def test_a_config_that_forgets_something_is_found(copied, edit, reason):
    _, directory = copied("W4A16", torch.float32, "query")
    edit_config(directory, edit)
    with pytest.raises(VerificationError, match=reason):
        verify(directory)


def rewritten(run, edit):
    """The run's first block, changed by `edit(weights, activations)`."""
    native = NativeCheckpoint(run)
    part = native.parts[0]
    weights = {name: part.read_quantized(name) for name in part.quantized}
    activations = part.activations()
    dense = {name: part.read(name) for name in part.dense}
    edit(weights, activations)
    Journal(run).add_block(0, write_part(block_file(run, 0), weights, dense, activations), [])


@pytest.mark.parametrize("what", ["weights", "inputs"])
def test_fused_linears_with_unlike_global_scales_are_refused_and_found(copied, what):
    run, directory = copied("NVFP4")

    def edit(weights, activations):
        table, name = (weights, "k_proj.weight") if what == "weights" else (activations, "k_proj.input")
        found = table[f"{ATTENTION}.{name}"]
        table[f"{ATTENTION}.{name}"] = replace(found, global_scale=2 * found.global_scale)

    rewritten(run, edit)
    with pytest.raises(VerificationError, match=f"_proj'.*so their {what} need the same global scale"):
        verify(directory)
    with pytest.raises(ConfigError, match=f"so their {what} need the same global scale"):
        export(run, FORMAT, directory.parent / "again")
    assert not (directory.parent / "again").exists()


def test_a_layer_without_a_quantized_cache_is_refused(copied):
    run, directory = copied("W4A16", torch.float32, "FP8")
    rewritten(run, lambda _, activations: activations.clear())
    with pytest.raises(ConfigError, match=r"the KV cache of 'model\.layers\.0\.self_attn' is not quantized"):
        export(run, FORMAT, directory.parent / "again")


def test_what_the_format_cannot_hold_leaves_nothing_behind(copied, tmp_path):
    run, _ = copied("W8A8")
    output = QuantizedActivation(SCHEMES["W8A8"][1].input_tensors)
    rewritten(run, lambda _, activations: activations.update({f"{ATTENTION}.q_proj.output": output}))
    with pytest.raises(ConfigError, match=r"q_proj\.output' \(int8\) cannot be exported"):
        export(run, FORMAT, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_export_notes_what_to_know_when_loading_it(exported):
    run, directory = exported("NVFP4")
    assert any("bfloat16" in note for note in read_origin(directory).notes)
    assert EXPORTERS[FORMAT].notes(NativeCheckpoint(run).contents) == list(read_origin(directory).notes)
    assert read_origin(exported("W4A16")[1]).notes == ()


def test_an_export_that_was_moved_is_verified_when_the_run_is_named(copied, tmp_path):
    run, directory = copied("W3A16_ASYM")
    moved = shutil.move(directory, tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match="say where it is with --run"):
        verify(moved)
    assert verify(moved, run)[0].quantized == 14


def test_a_run_is_verified_against_itself_only(exported, tmp_path):
    run, _ = exported("W4A16")
    with pytest.raises(ConfigError, match="is a run itself"):
        verify(run, tmp_path)
    assert verify(run, run)


def test_an_export_moved_together_with_its_run_needs_no_name(copied, tmp_path):
    run, directory = copied("W3A16_ASYM")
    moved = run.rename(tmp_path / "archive")
    assert verify(moved / directory.relative_to(run))[0].quantized == 14


def test_a_run_without_exports_says_how_to_make_one(copied):
    run, directory = copied("W4A16")
    shutil.rmtree(directory)
    with pytest.raises(CheckpointError, match="has no exports yet"):
        verify(run)


def test_an_unknown_format_names_the_known_one(native, tmp_path):
    with pytest.raises(ConfigError, match="did you mean 'compressed-tensors'"):
        export(native("W4A16"), "compresed-tensors", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_unfinished_run_is_refused(copied, tmp_path):
    run, _ = copied("W4A16")
    (run / "blocks" / "00001.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"not finished \(00001.safetensors is missing\).*--resume"):
        export(run, FORMAT, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_existing_directory_is_not_overwritten(native, tmp_path):
    (tmp_path / "thesis.txt").write_text("three years of work")
    with pytest.raises(RunError, match="not empty"):
        export(native("W4A16"), FORMAT, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_an_export_that_fails_leaves_nothing(native, tmp_path, monkeypatch):
    from fewbit.formats.compressed_tensors import write

    def fail(*arguments):
        raise ZeroDivisionError

    monkeypatch.setitem(write.__globals__, "copy_side_files", fail)  # after the shards were written
    with pytest.raises(ZeroDivisionError):
        export(native("W4A16"), FORMAT, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_exports_of_one_run_are_the_same_bytes(exported, tmp_path):
    run, directory = exported("mixed", torch.float32, "FP8")
    again = export(run, FORMAT, tmp_path / "again")
    files = sorted(path.name for path in directory.iterdir())
    assert files == sorted(path.name for path in again.iterdir())
    for name in files:
        if name != ORIGIN:  # says where the run is from there
            assert (again / name).read_bytes() == (directory / name).read_bytes()


def test_what_the_export_cannot_hold_is_said_before_the_work(checkpoint, quick, tmp_path):
    arguments = {key: value for key, value in quick.items() if key not in ("scheme", "group_size")}
    config = {"global_quant_config": {"weight": {"dtype": "int8", "qscheme": "per_tensor"}}}
    with pytest.raises(ConfigError, match="one scale for the whole tensor"):
        fewbit.quantize(checkpoint("llama"), output=tmp_path / "run", config=config, export=[FORMAT], **arguments)
    assert not (tmp_path / "run").exists()


def test_a_run_of_the_pipeline_is_exported_and_verified(checkpoint, quick, tmp_path):
    run = fewbit.quantize(checkpoint("qwen3", torch.bfloat16), output=tmp_path / "run", **quick)  # tied embeddings
    run.export(FORMAT)
    assert run.verify()[0].quantized == 14

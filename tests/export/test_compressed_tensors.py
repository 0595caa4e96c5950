"""The compressed-tensors export holds the run's codes, and other people's software reads them."""

import json
import shutil
from itertools import product

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import fewbit
from fewbit.checkpoint.native import NativeCheckpoint
from fewbit.config.spec import QuantizationSpec
from fewbit.errors import CheckpointError, ConfigError, RunError, VerificationError
from fewbit.export import export, verify
from fewbit.export.compressed_tensors import CompressedTensorsSource, decode, encode
from fewbit.tensor import QuantTensor

FORMAT = "compressed-tensors"
BITS = range(2, 9)
LINEARS = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
           "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]  # fmt: skip


def spec_of(bits, symmetric, group_size):
    return QuantizationSpec(
        dtype=f"int{bits}" if symmetric else f"uint{bits}",
        qscheme="per_channel" if group_size is None else "per_group",
        group_size=group_size,
        symmetric=symmetric,
    )


def random_weight(spec, rows, columns, dtype=torch.float32):
    """Every code of the format appears; some scales are negative."""
    generator = torch.Generator().manual_seed(0)
    low, high = int(spec.format.smallest), int(spec.format.largest)

    def integers(*shape):
        return torch.randint(low, high + 1, shape, generator=generator).to(spec.format.code_dtype)

    groups = columns // (spec.group_size or columns)
    scale = torch.randn(rows, groups, generator=generator).to(dtype)
    return QuantTensor(integers(rows, columns), scale, None if spec.symmetric else integers(rows, groups), spec)


def unpacked(words, bits, length):
    """Numbers of `bits` bits out of the words of one row, with nothing but Python's integers."""
    stream = int.from_bytes(b"".join((word & 0xFFFFFFFF).to_bytes(4, "little") for word in words), "little")
    assert stream >> (length * bits) == 0  # the rest of the last word is empty
    return [(stream >> (position * bits)) & (2**bits - 1) for position in range(length)]


@pytest.mark.parametrize("shape", [(32, 96), (7, 24)])  # 24 codes of 3 bits do not fill whole words; neither do 7 rows
@pytest.mark.parametrize("group_size", [None, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", BITS)
def test_an_independent_unpacker_finds_the_codes(bits, symmetric, group_size, shape):
    weight = random_weight(spec_of(bits, symmetric, group_size), *shape)
    tensors = encode(weight)
    rows, columns = shape
    offset = 2 ** (bits - 1) if symmetric else 0
    words = tensors["weight_packed"].tolist()
    assert [[code - offset for code in unpacked(row, bits, columns)] for row in words] == weight.codes.tolist()
    assert tensors["weight_shape"].tolist() == [rows, columns]
    assert tensors["weight_scale"] is weight.scale or torch.equal(tensors["weight_scale"], weight.scale)
    assert ("weight_zero_point" in tensors) == (not symmetric)
    if not symmetric:
        packed_along_rows = tensors["weight_zero_point"].T.tolist()
        assert [unpacked(column, bits, rows) for column in packed_along_rows] == weight.zero_point.T.tolist()


@pytest.mark.parametrize("group_size", [None, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", BITS)
def test_decode_undoes_encode(bits, symmetric, group_size):
    weight = random_weight(spec_of(bits, symmetric, group_size), 7, 24)
    back = decode(encode(weight), weight.spec)
    assert torch.equal(back.codes, weight.codes)
    assert torch.equal(back.scale, weight.scale)
    assert symmetric or torch.equal(back.zero_point, weight.zero_point)


def mixed_recipe(group_size):
    """Seven linears of two blocks, and as many bits, symmetric in one block and affine in the other."""
    specs = {}
    for (block, symmetric), (linear, bits) in product(((0, True), (1, False)), zip(LINEARS, BITS, strict=True)):
        spec = spec_of(bits, symmetric, group_size)
        specs[f"model.layers.{block}.{linear}"] = {
            "weight": {name: getattr(spec, name) for name in ("dtype", "qscheme", "group_size", "symmetric")}
        }
    return {"scheme": "W4A16", "layer_quant_config": specs}


@pytest.fixture(scope="module")
def exported(tmp_path_factory, checkpoint, quick):
    """exported(name, dtype): (run, export) with exports in their usual place, made once. Copy before changing."""
    recipes = {
        "mixed, group": mixed_recipe(32),
        "mixed, channel": mixed_recipe(None),
        "W4A16": {"scheme": "W4A16", "group_size": 32},
        "W3A16_ASYM": {"scheme": "W3A16_ASYM", "group_size": 32},
        "W8A16, channel": {"scheme": "W8A16", "group_size": -1},
    }
    made = {}

    def make(name, dtype=torch.float32, family="llama"):
        key = (name, dtype, family)
        if key not in made:
            arguments = {key: value for key, value in quick.items() if key not in ("scheme", "group_size")}
            output = tmp_path_factory.mktemp("export") / "run"
            run = fewbit.quantize(checkpoint(family, dtype), output=output, config=recipes[name], **arguments)
            made[key] = run.directory, run.export(FORMAT)
        return made[key]

    return make


EXPORTS = [
    ("mixed, group", torch.float32),
    ("mixed, channel", torch.bfloat16),
    ("W4A16", torch.bfloat16),
    ("W3A16_ASYM", torch.float32),
    ("W8A16, channel", torch.float32),
]


@pytest.mark.parametrize(("name", "dtype"), EXPORTS)
def test_the_compressed_tensors_library_decodes_every_tensor_to_the_runs(exported, name, dtype):
    run, directory = exported(name, dtype)
    (verification,) = verify(directory)
    assert verification.quantized == 14
    assert verification.dense == len(NativeCheckpoint(run).info()) - 14
    assert verification.decoder.startswith("compressed-tensors ")
    assert verify(run) == [verification]


@pytest.mark.parametrize(("name", "dtype"), EXPORTS)
def test_reading_the_export_back_gives_the_same_quant_tensors(exported, name, dtype):
    run, directory = exported(name, dtype)
    native, source = NativeCheckpoint(run), CompressedTensorsSource(directory)
    assert set(source.info()) == set(native.info())
    for weight_name in native.quantized:
        ours, back = native.read_quantized(weight_name), source.read_quantized(weight_name)
        assert (back.spec.bits, back.spec.tiling) == (ours.spec.bits, ours.spec.tiling)
        assert torch.equal(back.unsigned_codes(), ours.unsigned_codes())
        assert torch.equal(back.scale, ours.scale)
        assert torch.equal(back.dequantize(), ours.dequantize())
    names = list(native.info())
    ours, back = native.read(names), source.read(names)
    assert all(torch.equal(ours[name], back[name]) for name in names)


@pytest.mark.parametrize(
    ("name", "dtype", "family", "load_dtype"),
    [
        ("W4A16", torch.bfloat16, "llama", torch.bfloat16),
        ("W4A16", torch.bfloat16, "llama", torch.float32),
        ("W4A16", torch.float32, "qwen3", torch.float32),  # tied embeddings
        ("W3A16_ASYM", torch.float32, "llama", torch.float32),
        ("mixed, group", torch.bfloat16, "llama", torch.bfloat16),
        ("mixed, channel", torch.bfloat16, "llama", torch.float32),
    ],
)
def test_transformers_loads_the_export_and_computes_with_exactly_our_weights(
    exported, dequantized, name, dtype, family, load_dtype
):
    run, directory = exported(name, dtype, family)
    ids = torch.randint(304, (2, 24), generator=torch.Generator().manual_seed(0))
    loaded = AutoModelForCausalLM.from_pretrained(directory, dtype=load_dtype).eval()
    with torch.no_grad():
        found, expected = loaded(input_ids=ids).logits, dequantized(run, load_dtype)(input_ids=ids).logits
    assert found.dtype == load_dtype
    assert torch.equal(found, expected)


def test_a_float32_scale_beside_a_bfloat16_model_is_refused_or_loads_exactly(checkpoint, quick, dequantized, tmp_path):
    weight = {"dtype": "int4", "qscheme": "per_group", "group_size": 32, "scale_dtype": "float32"}
    arguments = {key: value for key, value in quick.items() if key not in ("scheme", "group_size")}
    config = {"global_quant_config": {"weight": weight}}
    run = fewbit.quantize(checkpoint("llama", torch.bfloat16), output=tmp_path / "run", config=config, **arguments)
    try:
        directory = run.export(FORMAT)
    except ConfigError:
        assert not (run.directory / "exports" / FORMAT).exists()
        return
    ids = torch.arange(24).view(1, 24)
    loaded = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16).eval()
    with torch.no_grad():
        expected = dequantized(run.directory, torch.bfloat16)(input_ids=ids).logits
        assert torch.equal(loaded(input_ids=ids).logits, expected)


def test_the_config_has_only_the_keys_that_readers_know(exported):
    _, directory = exported("mixed, group", torch.float32)
    config = json.loads((directory / "config.json").read_text())["quantization_config"]
    assert set(config) == {"quant_method", "format", "quantization_status", "config_groups", "ignore"}
    assert config["ignore"] == ["lm_head"]
    for group in config["config_groups"].values():
        assert set(group["weights"]) <= {"num_bits", "type", "symmetric", "dynamic", "strategy", "group_size"}


@pytest.fixture
def copied(exported, tmp_path):
    """A run with its export, to be damaged: (run, export)."""
    run, directory = exported("W3A16_ASYM", torch.float32)
    copy = shutil.copytree(run, tmp_path / "run")
    return copy, copy / directory.relative_to(run)


def change(directory, name, edit):
    file = directory / json.loads((directory / "model.safetensors.index.json").read_text())["weight_map"][name]
    tensors = load_file(file)
    edit(tensors)
    save_file(tensors, file, {"format": "pt"})


def flip(tensor):
    if tensor.dtype.is_floating_point:
        tensor.view(-1)[3] = torch.nextafter(tensor.view(-1)[3], torch.tensor(9.0))
    else:
        tensor.view(-1)[3] ^= 1


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.1.mlp.down_proj.weight_packed",
        "model.layers.0.self_attn.k_proj.weight_scale",
        "model.layers.0.mlp.up_proj.weight_zero_point",
        "model.layers.1.input_layernorm.weight",
        "model.embed_tokens.weight",
        "lm_head.weight",
    ],
)
def test_the_smallest_change_of_a_tensor_is_found_and_named(copied, name):
    _, directory = copied
    verify(directory)
    change(directory, name, lambda tensors: flip(tensors[name]))
    with pytest.raises(VerificationError, match=name.rpartition(".")[0]):
        verify(directory)


def test_a_scale_of_another_dtype_is_found(copied):
    _, directory = copied
    name = "model.layers.0.mlp.up_proj.weight_scale"
    change(directory, name, lambda tensors: tensors.update({name: tensors[name].double()}))
    with pytest.raises(VerificationError, match=r"up_proj scale: found torch\.float64"):
        verify(directory)


@pytest.mark.parametrize("part", ["weight_packed", "weight_scale", "weight_zero_point", "weight_shape"])
def test_a_lost_part_of_a_weight_is_found(copied, part):
    _, directory = copied
    name = f"model.layers.1.mlp.down_proj.{part}"
    index = json.loads((directory / "model.safetensors.index.json").read_text())
    change(directory, name, lambda tensors: tensors.pop(name))
    del index["weight_map"][name]
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(VerificationError, match=r"model\.layers\.1\.mlp\.down_proj"):
        verify(directory)


@pytest.mark.parametrize("key", ["num_bits", "symmetric", "group_size"])
def test_a_config_that_contradicts_the_tensors_is_found(copied, key):
    _, directory = copied
    config = json.loads((directory / "config.json").read_text())
    weights = config["quantization_config"]["config_groups"]["group_0"]["weights"]
    weights[key] = {"num_bits": 4, "symmetric": True, "group_size": 16}[key]
    (directory / "config.json").write_text(json.dumps(config))
    with pytest.raises(VerificationError):
        verify(directory)


def test_an_export_that_was_moved_is_verified_when_the_run_is_named(copied, tmp_path):
    run, directory = copied
    moved = shutil.move(directory, tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match="say where it is with --run"):
        verify(moved)
    assert verify(moved, run)[0].quantized == 14


def test_an_export_moved_together_with_its_run_needs_no_name(copied, tmp_path):
    run, directory = copied
    moved = run.rename(tmp_path / "archive")
    assert verify(moved / directory.relative_to(run))[0].quantized == 14


def test_a_run_without_exports_says_how_to_make_one(finished_run):
    with pytest.raises(CheckpointError, match="has no exports yet"):
        verify(finished_run("llama"))


def test_one_scale_per_tensor_is_refused_before_anything_is_written(checkpoint, quick, tmp_path):
    arguments = {key: value for key, value in quick.items() if key not in ("scheme", "group_size")}
    config = {"global_quant_config": {"weight": {"dtype": "int8", "qscheme": "per_tensor"}}}
    run = fewbit.quantize(checkpoint("llama"), output=tmp_path / "run", config=config, **arguments)
    with pytest.raises(ConfigError, match="one scale for the whole tensor"):
        run.export(FORMAT)
    assert not (tmp_path / "run" / "exports").exists()


def test_what_the_export_cannot_hold_is_said_before_the_work(checkpoint, quick, tmp_path):
    arguments = {key: value for key, value in quick.items() if key not in ("scheme", "group_size")}
    config = {"global_quant_config": {"weight": {"dtype": "int8", "qscheme": "per_tensor"}}}
    with pytest.raises(ConfigError, match="one scale for the whole tensor"):
        fewbit.quantize(checkpoint("llama"), output=tmp_path / "run", config=config, export=[FORMAT], **arguments)
    assert not (tmp_path / "run").exists()


def test_an_unknown_format_names_the_known_one(finished_run, tmp_path):
    with pytest.raises(ConfigError, match="did you mean 'compressed-tensors'"):
        export(finished_run("llama"), "compresed-tensors", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_unfinished_run_is_refused(finished_run, tmp_path):
    run = shutil.copytree(finished_run("llama"), tmp_path / "run")
    (run / "blocks" / "00001.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"not finished \(00001.safetensors is missing\).*--resume"):
        export(run, FORMAT, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_existing_directory_is_not_overwritten(finished_run, tmp_path):
    (tmp_path / "thesis.txt").write_text("three years of work")
    with pytest.raises(RunError, match="not empty"):
        export(finished_run("llama"), FORMAT, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_an_export_that_fails_leaves_nothing(finished_run, tmp_path, monkeypatch):
    from fewbit.export import compressed_tensors

    def fail(*arguments):
        raise ZeroDivisionError

    monkeypatch.setattr(compressed_tensors, "copy_side_files", fail)  # after the shards were written
    with pytest.raises(ZeroDivisionError):
        export(finished_run("llama"), FORMAT, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_exports_of_one_run_are_the_same_bytes(exported, tmp_path):
    run, directory = exported("W4A16", torch.bfloat16)
    again = export(run, FORMAT, tmp_path / "again")
    files = sorted(path.name for path in directory.iterdir())
    assert files == sorted(path.name for path in again.iterdir())
    for name in files:
        if name != "fewbit-export.json":  # says where the run is from there
            assert (again / name).read_bytes() == (directory / name).read_bytes()

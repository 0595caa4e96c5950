import json
import os
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from fewbit.checkpoint.source import INDEX_FILE, SINGLE_FILE, ModuleSource, SafetensorsSource, TensorInfo
from fewbit.errors import CheckpointError

MAPS = Path("/proc/self/maps")
FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


def example_tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "a.weight": torch.randn(4, 6, generator=generator).bfloat16(),
        "a.bias": torch.randn(4, generator=generator),
        "b.weight": torch.randn(3, 5, generator=generator).half(),
        "b.positions": torch.arange(7),
    }


def write_single(directory, tensors=None):
    save_file(tensors or example_tensors(), directory / SINGLE_FILE)
    return directory


def write_sharded(directory, tensors=None, weight_map=None):
    tensors = tensors or example_tensors()
    shards = {name: FIRST if name.startswith("a") else SECOND for name in tensors}
    for shard in (FIRST, SECOND):
        save_file({name: tensors[name] for name in tensors if shards[name] == shard}, directory / shard)
    write_index(directory, weight_map or shards)
    return directory


def write_index(directory, weight_map):
    (directory / INDEX_FILE).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


class Model(nn.Module):
    def __init__(self, tensors: dict[str, torch.Tensor]) -> None:
        super().__init__()
        for prefix in ("a", "b"):
            self.add_module(prefix, nn.Module())
        for name, tensor in tensors.items():
            prefix, member = name.split(".")
            self.get_submodule(prefix).register_buffer(member, tensor)


def single(directory, tensors):
    return SafetensorsSource(write_single(directory, tensors))


def sharded(directory, tensors):
    return SafetensorsSource(write_sharded(directory, tensors))


def in_memory(directory, tensors):
    return ModuleSource(Model(tensors))


@pytest.mark.parametrize("make", [single, sharded, in_memory])
class TestEverySource:
    def test_info_tells_shapes_and_dtypes(self, make, tmp_path):
        tensors = example_tensors()
        expected = {name: TensorInfo(tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}
        assert make(tmp_path, tensors).info() == expected

    def test_read_gives_the_tensors_asked_for_in_their_dtype(self, make, tmp_path):
        tensors = example_tensors()
        read = make(tmp_path, tensors).read(["b.weight", "a.weight", "b.positions"])
        assert set(read) == {"b.weight", "a.weight", "b.positions"}
        for name, tensor in read.items():
            assert tensor.dtype == tensors[name].dtype
            assert torch.equal(tensor, tensors[name])

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
    def test_read_converts_to_the_dtype_asked_for(self, make, dtype, tmp_path):
        tensors = example_tensors()
        read = make(tmp_path, tensors).read(["a.weight", "b.weight"], dtype)
        for name, tensor in read.items():
            assert tensor.dtype == dtype
            assert torch.equal(tensor, tensors[name].to(dtype))

    @pytest.mark.parametrize("dtype", [None, torch.float32])
    def test_read_gives_fresh_memory_even_where_nothing_is_converted(self, make, dtype, tmp_path):
        tensors = example_tensors()
        source = make(tmp_path, tensors)
        source.read(["a.bias"], dtype)["a.bias"].zero_()
        assert torch.equal(source.read(["a.bias"])["a.bias"], example_tensors()["a.bias"])

    def test_reading_nothing_is_allowed(self, make, tmp_path):
        assert make(tmp_path, example_tensors()).read([]) == {}

    def test_a_missing_tensor_is_named(self, make, tmp_path):
        with pytest.raises(CheckpointError, match=r"no tensor 'c\.weight'"):
            make(tmp_path, example_tensors()).read(["a.weight", "c.weight"])

    @pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
    @pytest.mark.parametrize("name", ["a.weight", "a.bias", "b.weight"])
    def test_a_tensor_that_is_not_finite_is_named_when_it_is_read(self, make, name, value, tmp_path):
        tensors = example_tensors()
        tensors[name].view(-1)[-1] = value
        source = make(tmp_path, tensors)
        with pytest.raises(CheckpointError, match=f"tensor '{name}' holds 1 NaN or infinite"):
            source.read(list(tensors))
        others = [other for other in tensors if other != name]
        assert set(source.read(others)) == set(others)

    def test_equal_weights_have_equal_fingerprints(self, make, tmp_path):
        one, other = tmp_path / "one", tmp_path / "other"
        one.mkdir()
        other.mkdir()
        assert make(one, example_tensors()).fingerprint() == make(other, example_tensors()).fingerprint()

    @pytest.mark.parametrize("name", example_tensors())
    def test_the_fingerprint_changes_with_any_tensor(self, make, name, tmp_path):
        tensors = example_tensors()
        before = make(tmp_path, tensors).fingerprint()
        tensors[name].view(-1)[1] += 1
        assert make(tmp_path, tensors).fingerprint() != before

    def test_the_fingerprint_changes_with_names_and_shapes(self, make, tmp_path):
        tensors = example_tensors()
        before = make(tmp_path, tensors).fingerprint()
        renamed = {"b.other" if name == "b.weight" else name: tensor for name, tensor in tensors.items()}
        reshaped = tensors | {"b.weight": tensors["b.weight"].reshape(5, 3)}
        fingerprints = {before, make(tmp_path, renamed).fingerprint(), make(tmp_path, reshaped).fingerprint()}
        assert len(fingerprints) == 3


class TestDamagedCheckpoints:
    def refuses(self, directory, message):
        with pytest.raises(CheckpointError, match=message) as caught:
            SafetensorsSource(directory)
        assert "\n" not in str(caught.value)

    def test_no_directory(self, tmp_path):
        self.refuses(tmp_path / "absent", "absent is no directory")

    def test_a_file_where_a_directory_is_expected(self, tmp_path):
        write_single(tmp_path)
        self.refuses(tmp_path / SINGLE_FILE, "is no directory")

    def test_an_empty_directory(self, tmp_path):
        self.refuses(tmp_path, f"neither {SINGLE_FILE} nor {INDEX_FILE}")

    @pytest.mark.parametrize("missing", [FIRST, SECOND])
    def test_a_shard_that_the_index_names_is_missing(self, missing, tmp_path):
        write_sharded(tmp_path)
        (tmp_path / missing).unlink()
        self.refuses(tmp_path, f"names the shard {missing}, which is missing")

    @pytest.mark.parametrize("kept", [0, 4, 20, -1])
    @pytest.mark.parametrize("write", [write_single, write_sharded])
    def test_a_truncated_file_is_named_before_anything_is_read(self, write, kept, tmp_path):
        write(tmp_path)
        file = tmp_path / (SINGLE_FILE if write is write_single else SECOND)
        file.write_bytes(file.read_bytes()[:kept])
        self.refuses(tmp_path, f"{file.name} is truncated or damaged")

    def test_a_tensor_that_its_shard_lacks_is_named(self, tmp_path):
        tensors = example_tensors()
        weight_map = {name: FIRST if name.startswith("a") else SECOND for name in tensors} | {"c.weight": SECOND}
        write_sharded(tmp_path, tensors, weight_map)
        self.refuses(tmp_path, f"names 'c.weight' in {SECOND}, which does not hold it")

    @pytest.mark.parametrize(
        "name", ["../elsewhere/x.safetensors", "a/../../elsewhere/x.safetensors", "", "\0", "x" * 300]
    )
    def test_a_name_that_leads_out_of_the_directory_is_refused(self, name, tmp_path):
        directory, elsewhere = tmp_path / "model", tmp_path / "elsewhere"
        for made in (directory, elsewhere, directory / "a"):
            made.mkdir()
        save_file(example_tensors(), elsewhere / "x.safetensors")
        for escaping in (name, str(elsewhere / "x.safetensors")):
            write_index(directory, dict.fromkeys(example_tensors(), escaping))
            self.refuses(directory, "which is not in|is no file name")

    def test_a_folder_that_is_a_link_out_of_the_directory_is_refused(self, tmp_path):
        directory, elsewhere = tmp_path / "model", tmp_path / "elsewhere"
        directory.mkdir()
        elsewhere.mkdir()
        save_file(example_tensors(), elsewhere / "x.safetensors")
        (directory / "shards").symlink_to(elsewhere)
        write_index(directory, dict.fromkeys(example_tensors(), "shards/x.safetensors"))
        self.refuses(directory, "shards/x.safetensors, which is not in")

    def test_a_pipe_in_place_of_the_weights_is_not_waited_for(self, tmp_path):
        os.mkfifo(tmp_path / SINGLE_FILE)
        self.refuses(tmp_path, f"neither {SINGLE_FILE} nor {INDEX_FILE}")

    def test_a_variant_alone_is_named(self, tmp_path):
        save_file(example_tensors(), tmp_path / "model.fp16.safetensors")
        self.refuses(tmp_path, rf"holds model\.fp16\.safetensors, but neither.*rename it to {SINGLE_FILE}")

    @pytest.mark.parametrize(
        "text",
        [
            "",
            '{"weight_map": {"a.weight": ',
            "[]",
            "null",
            "{}",
            '{"weight_map": null}',
            '{"weight_map": 3}',
            '{"weight_map": ["a.weight"]}',
            '{"weight_map": {"a.weight": 1}}',
        ],
    )
    def test_a_damaged_index_is_named(self, text, tmp_path):
        write_sharded(tmp_path)
        (tmp_path / INDEX_FILE).write_text(text)
        self.refuses(tmp_path, f"{INDEX_FILE} is damaged")

    @pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
    def test_a_torch_pickle_under_the_name_of_safetensors_is_called_a_pickle(self, zipped, tmp_path):
        torch.save(example_tensors(), tmp_path / SINGLE_FILE, _use_new_zipfile_serialization=zipped)
        self.refuses(tmp_path, f"{SINGLE_FILE} is a pickle, not safetensors")

    def test_a_plain_pickle_under_the_name_of_a_shard_is_called_a_pickle_and_not_executed(self, tmp_path):
        write_sharded(tmp_path)
        (tmp_path / SECOND).write_bytes(pickle.dumps(_Trap(tmp_path / "sprung")))
        self.refuses(tmp_path, f"{SECOND} is a pickle, not safetensors")
        assert not (tmp_path / "sprung").exists()

    @pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.pth", "weights.pkl"])
    def test_only_pickles_is_said_and_the_way_out_named(self, name, tmp_path):
        torch.save(example_tensors(), tmp_path / name)
        self.refuses(tmp_path, rf"pickled weights \({name}\) and no safetensors.*save_pretrained")


class _Trap:
    """Unpickling it creates a file."""

    def __init__(self, file) -> None:
        self.file = file

    def __reduce__(self):
        return (open, (str(self.file), "w"))


@pytest.mark.skipif(not MAPS.exists(), reason="the list of mapped files is Linux's")
@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float32])
def test_nothing_that_was_read_keeps_the_file_mapped(dtype, tmp_path):
    read = SafetensorsSource(write_single(tmp_path)).read(["a.weight", "a.bias"], dtype)
    assert str(tmp_path / SINGLE_FILE) not in MAPS.read_text()
    assert set(read) == {"a.weight", "a.bias"}


def test_tensors_of_files_that_the_index_does_not_name_are_left_out(tmp_path):
    write_sharded(tmp_path)
    save_file({"old": torch.ones(1)}, tmp_path / "model-00003-of-00003.safetensors")
    assert set(SafetensorsSource(tmp_path).info()) == set(example_tensors())


class TestWhichFiles:
    """As transformers reads a directory; tests/models/test_blockwise.py compares with transformers itself."""

    def test_a_single_file_comes_before_an_index(self, tmp_path):
        write_sharded(tmp_path, {name: tensor + 1 for name, tensor in example_tensors().items()})
        write_single(tmp_path)
        source = SafetensorsSource(tmp_path)
        assert torch.equal(source.read(["a.weight"])["a.weight"], example_tensors()["a.weight"])
        assert source.files == {tmp_path / SINGLE_FILE}

    def test_every_tensor_of_a_shard_counts_also_where_the_index_is_partial_or_wrong(self, tmp_path):
        write_sharded(tmp_path)
        write_index(tmp_path, {"a.weight": SECOND, "b.weight": FIRST})
        source = SafetensorsSource(tmp_path)
        assert set(source.info()) == set(example_tensors())
        assert torch.equal(source.read(["a.weight"])["a.weight"], example_tensors()["a.weight"])

    def test_of_a_tensor_in_two_shards_the_last_counts(self, tmp_path):
        save_file({"x": torch.zeros(2)}, tmp_path / "b.safetensors")
        save_file({"x": torch.ones(2), "y": torch.ones(1)}, tmp_path / "a.safetensors")
        write_index(tmp_path, {"x": "a.safetensors", "y": "b.safetensors"})
        assert SafetensorsSource(tmp_path).read(["x"])["x"].tolist() == [0, 0]

    def test_shards_in_folders_are_found(self, tmp_path):
        (tmp_path / "shards").mkdir()
        save_file(example_tensors(), tmp_path / "shards/x.safetensors")
        write_index(tmp_path, dict.fromkeys(example_tensors(), "shards/x.safetensors"))
        assert set(SafetensorsSource(tmp_path).info()) == set(example_tensors())

    def test_files_may_be_links_as_in_the_cache_of_the_hub(self, tmp_path):
        directory, blobs = tmp_path / "snapshots/1", tmp_path / "blobs"
        directory.mkdir(parents=True)
        blobs.mkdir()
        save_file(example_tensors(), blobs / "a1")
        (directory / FIRST).symlink_to("../../blobs/a1")
        write_index(directory, dict.fromkeys(example_tensors(), FIRST))
        assert set(SafetensorsSource(directory).info()) == set(example_tensors())

    def test_config_json_may_name_the_file(self, tmp_path):
        write_single(tmp_path, {"old": torch.zeros(1)})
        save_file(example_tensors(), tmp_path / "other.safetensors")
        (tmp_path / "config.json").write_text('{"transformers_weights": "other.safetensors"}')
        assert set(SafetensorsSource(tmp_path).info()) == set(example_tensors())


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e8m0fnu])
def test_nan_is_found_in_tensors_of_eight_bits(dtype, tmp_path):
    fine = torch.ones(3, 5).to(dtype)
    broken = fine.clone()
    broken.view(torch.uint8)[1, 2] = 0xFF if dtype != torch.float8_e4m3fn else 0x7F
    source = SafetensorsSource(write_single(tmp_path, {"fine": fine, "broken": broken}))
    assert torch.equal(source.read(["fine"])["fine"].float(), torch.ones(3, 5))
    with pytest.raises(CheckpointError, match="'broken' holds 1 NaN"):
        source.read(["broken"])


def test_integer_tensors_are_not_searched_for_nan(tmp_path):
    tensors = {"mask": torch.tensor([True]), "ids": torch.tensor([3], dtype=torch.int32), "none": torch.empty(0, 4)}
    read = SafetensorsSource(write_single(tmp_path, tensors)).read(tensors)
    assert {name: tensor.tolist() for name, tensor in read.items()} == {"mask": [True], "ids": [3], "none": []}


def test_a_module_is_never_changed_by_reading_it():
    linear = nn.Linear(3, 2)
    before = linear.weight.detach().clone()
    read = ModuleSource(linear).read(["weight"])["weight"]
    assert not read.requires_grad
    read.zero_()
    assert torch.equal(linear.weight, before)
    assert linear.weight.requires_grad

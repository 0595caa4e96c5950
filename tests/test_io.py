"""load gives back what dump wrote, and no file runs code unless the user says so."""

import pickle
from pathlib import Path

import pytest
import torch

from fewbit import io
from fewbit.errors import CheckpointError, ConfigError, RunError

PLAIN = {"numbers": [1, 2.5, None, True], "nested": {"text": "grün"}}


def tensors():
    torch.manual_seed(0)
    whole = torch.randn(4, 6)
    return {"whole": whole, "view": whole[1:3], "strided": whole.T, "half": whole.half(), "codes": torch.arange(5)}


class Trap:
    """An object whose unpickling leaves a trace."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


class Plain:
    """Neither a tensor nor plain data."""


@pytest.mark.parametrize("suffix", [".json", ".pt", ".pth", ".bin"])
def test_plain_data_come_back(tmp_path, suffix):
    io.dump(PLAIN, tmp_path / f"x{suffix}")
    assert io.load(tmp_path / f"x{suffix}") == PLAIN


@pytest.mark.parametrize("suffix", [".safetensors", ".pt", ".pth", ".bin"])
def test_tensors_come_back_even_if_they_share_memory(tmp_path, suffix):
    io.dump(tensors(), str(tmp_path / f"x{suffix}"))
    found = io.load(str(tmp_path / f"x{suffix}"))
    assert set(found) == set(tensors())
    for name, tensor in tensors().items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)


def test_nested_tensors_come_back_from_pt(tmp_path):
    steps = {"steps": [(torch.ones(2), torch.zeros(1)), torch.arange(3)]}
    io.dump(steps, tmp_path / "x.pt")
    found = io.load(tmp_path / "x.pt")["steps"]
    assert torch.equal(found[0][0], steps["steps"][0][0])
    assert torch.equal(found[1], steps["steps"][1])


@pytest.mark.parametrize("suffix", [".pkl", ".pickle"])
def test_pickles_need_an_opt_in_to_write_and_to_read(tmp_path, suffix):
    path = tmp_path / f"x{suffix}"
    with pytest.raises(ConfigError, match="allow_pickle=True"):
        io.dump(PLAIN, path)
    assert not path.exists()
    io.dump(PLAIN, path, allow_pickle=True)
    with pytest.raises(CheckpointError, match="allow_pickle=True"):
        io.load(path)
    assert io.load(path, allow_pickle=True) == PLAIN


@pytest.mark.parametrize("suffix", [".pkl", ".pt", ".bin"])
def test_reading_without_the_opt_in_runs_no_code(tmp_path, suffix):
    path, trace = tmp_path / f"x{suffix}", tmp_path / "trace"
    if suffix == ".pkl":
        path.write_bytes(pickle.dumps(Trap(trace)))
    else:
        torch.save({"weights": torch.ones(2), "trap": Trap(trace)}, path)
    with pytest.raises(CheckpointError, match="can run code"):
        io.load(path)
    assert not trace.exists()
    io.load(path, allow_pickle=True)  # the trap is a real one
    assert trace.exists()


def test_a_torch_file_that_could_not_be_read_back_safely_is_not_written(tmp_path):
    with pytest.raises(ConfigError, match=r"Plain is neither a tensor nor plain data.*allow_pickle"):
        io.dump({"x": Plain()}, tmp_path / "x.pt")
    assert list(tmp_path.iterdir()) == []
    io.dump({"x": Plain()}, tmp_path / "x.pt", allow_pickle=True)
    assert isinstance(io.load(tmp_path / "x.pt", allow_pickle=True)["x"], Plain)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("x.json", b"{"),
        ("x.safetensors", b"\x08\x00"),
        ("x.pt", b"a torch file is another thing"),
        ("x.pt", b"no torch file"),
        ("x.bin", b""),
        ("y.json", b"\xff"),
    ],
)
def test_a_damaged_file_is_named(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"{name}.* is damaged"):
        io.load(tmp_path / name)


def test_a_torch_file_that_was_cut_off_is_named(tmp_path):
    io.dump(tensors(), tmp_path / "x.pt")
    whole = (tmp_path / "x.pt").read_bytes()
    (tmp_path / "x.pt").write_bytes(whole[:-300])
    with pytest.raises(CheckpointError, match=r"x\.pt is damaged"):
        io.load(tmp_path / "x.pt")


@pytest.mark.parametrize("suffix", io.SUFFIXES)
def test_a_missing_file_is_named(tmp_path, suffix):
    with pytest.raises(CheckpointError, match="does not exist"):
        io.load(tmp_path / f"missing{suffix}")


@pytest.mark.parametrize("name", ["x.npz", "x", "x.json.gz"])
def test_unknown_suffixes_name_the_known_ones(tmp_path, name):
    (tmp_path / name).write_bytes(b"")
    for action in (lambda path: io.load(path), lambda path: io.dump(PLAIN, path)):
        with pytest.raises(ConfigError, match=r"\.safetensors, \.json, \.pt"):
            action(tmp_path / name)


@pytest.mark.parametrize(
    ("name", "wrong"), [("x.json", {"x": torch.ones(1)}), ("x.safetensors", [1]), ("x.safetensors", {"x": 1})]
)
def test_what_a_format_cannot_hold_leaves_the_old_file(tmp_path, name, wrong):
    good = PLAIN if name == "x.json" else {"x": torch.ones(1)}
    io.dump(good, tmp_path / name)
    before = (tmp_path / name).read_bytes()
    with pytest.raises(ConfigError, match=r"\.pt"):
        io.dump(wrong, tmp_path / name)
    assert (tmp_path / name).read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_a_place_that_does_not_exist_is_named(tmp_path):
    with pytest.raises(RunError, match="cannot be written: No such file"):
        io.dump(PLAIN, tmp_path / "nowhere" / "x.json")

import errno
import json
import os
import shutil
import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from fewbit import safetensors_file
from fewbit.errors import CheckpointError, RunError
from fewbit.files import replacing, replacing_directory, write_json
from fewbit.safetensors_file import write_safetensors

DISK_FULL = [
    pytest.param(OSError(errno.ENOSPC, "No space left on device"), id="no-space"),
    pytest.param(OSError(errno.EDQUOT, "Disk quota exceeded"), id="quota"),
    pytest.param(SafetensorError("I/O error: No space left on device (os error 28)"), id="safetensors"),
]


def listing(directory) -> set[str]:
    return {str(path.relative_to(directory)) for path in directory.rglob("*")}


def raising(error):
    def fail(*args, **kwargs):
        raise error

    return fail


class TestReplacing:
    def test_the_file_takes_its_place_when_the_body_succeeds(self, tmp_path):
        file = tmp_path / "data.json"
        file.write_text("old")
        with replacing(file) as beside:
            beside.write_text("new")
            assert file.read_text() == "old"
        assert file.read_text() == "new"
        assert listing(tmp_path) == {"data.json"}

    @pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
    def test_an_exception_keeps_the_old_file_and_leaves_nothing_behind(self, error, tmp_path):
        file = tmp_path / "data.json"
        file.write_text("old")
        with pytest.raises(error), replacing(file) as beside:  # noqa: PT012
            beside.write_text("half of the n")
            raise error
        assert file.read_text() == "old"
        assert listing(tmp_path) == {"data.json"}

    def test_an_exception_where_there_was_no_file_leaves_none(self, tmp_path):
        with pytest.raises(ValueError, match="stop"), replacing(tmp_path / "data.json") as beside:  # noqa: PT012
            beside.write_text("half")
            raise ValueError("stop")
        assert listing(tmp_path) == set()

    def test_the_permissions_are_those_of_the_users_new_files(self, tmp_path):
        before = os.umask(0o027)
        try:
            write_json(tmp_path / "data.json", 1)
            write_safetensors(tmp_path / "x.safetensors", {"x": torch.ones(1)}, {})
        finally:
            os.umask(before)
        assert {stat.S_IMODE(file.stat().st_mode) for file in tmp_path.iterdir()} == {0o640}

    def test_what_the_user_has_beside_is_left_alone(self, tmp_path):
        (tmp_path / "data.json.partial").write_text("mine")
        with replacing(tmp_path / "data.json") as beside:
            beside.write_text("new")
        assert (tmp_path / "data.json.partial").read_text() == "mine"

    def test_a_link_is_replaced_and_what_it_points_to_is_left_alone(self, tmp_path):
        (tmp_path / "precious").write_text("mine")
        (tmp_path / "data.json").symlink_to(tmp_path / "precious")
        write_json(tmp_path / "data.json", 1)
        assert (tmp_path / "precious").read_text() == "mine"
        assert (tmp_path / "data.json").read_text() == "1\n"

    @pytest.mark.parametrize("error", DISK_FULL)
    def test_a_full_disk_is_a_sentence_that_names_the_file(self, error, tmp_path):
        file = tmp_path / "data.json"
        file.write_text("old")
        with pytest.raises(RunError, match=r"disk is full.*data\.json.*--resume") as caught, replacing(file) as beside:  # noqa: PT012
            beside.write_text("ha")
            raise error
        assert "\n" not in str(caught.value)
        assert file.read_text() == "old"
        assert listing(tmp_path) == {"data.json"}

    def test_a_disk_that_fills_up_only_when_flushed_keeps_the_old_file(self, tmp_path, monkeypatch):
        file = tmp_path / "data.json"
        file.write_text("old")
        monkeypatch.setattr(os, "fsync", raising(OSError(errno.ENOSPC, "No space left on device")))
        with pytest.raises(RunError, match="disk is full"), replacing(file) as beside:
            beside.write_text("new")
        assert file.read_text() == "old"
        assert listing(tmp_path) == {"data.json"}

    def test_what_the_system_says_is_a_sentence_that_names_the_file(self, tmp_path):
        with pytest.raises(RunError, match=r"data\.json cannot be written: Permission denied"):  # noqa: SIM117
            with replacing(tmp_path / "data.json"):
                raise PermissionError(errno.EACCES, "Permission denied")
        with pytest.raises(RunError, match=r"absent/data\.json cannot be written: No such file"):  # noqa: SIM117
            with replacing(tmp_path / "absent" / "data.json"):
                pytest.fail("the body ran")

    def test_other_sentences_stay_what_they_are(self, tmp_path):
        with pytest.raises(CheckpointError, match=r"os error 28\)"), replacing(tmp_path / "data.json"):
            raise CheckpointError("already a sentence (os error 28)")


class TestReplacingDirectory:
    def test_all_files_appear_at_once(self, tmp_path):
        target = tmp_path / "exports" / "run"
        with replacing_directory(target) as beside:
            (beside / "a").write_text("1")
            (beside / "sub").mkdir()
            (beside / "sub" / "b").write_text("2")
            assert not any(target.iterdir())
        assert listing(tmp_path / "exports") == {"run", "run/a", "run/sub", "run/sub/b"}

    @pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
    @pytest.mark.parametrize("existed", [True, False])
    def test_an_exception_leaves_everything_as_it_was(self, error, existed, tmp_path):
        target = tmp_path / "run"
        if existed:
            target.mkdir()
        with pytest.raises(error), replacing_directory(target) as beside:  # noqa: PT012
            (beside / "a").write_text("1")
            raise error
        assert listing(tmp_path) == ({"run"} if existed else set())

    def test_an_empty_target_is_filled(self, tmp_path):
        target = tmp_path / "run"
        target.mkdir()
        with replacing_directory(target) as beside:
            (beside / "a").write_text("1")
        assert listing(tmp_path) == {"run", "run/a"}

    def test_a_target_with_files_is_refused_before_the_body_runs(self, tmp_path):
        target = tmp_path / "run"
        target.mkdir()
        (target / "precious").write_text("mine")
        with pytest.raises(RunError, match="run exists and is not empty"), replacing_directory(target):
            pytest.fail("the body ran")
        assert listing(tmp_path) == {"run", "run/precious"}

    def test_a_target_that_is_a_file_is_refused(self, tmp_path):
        target = tmp_path / "run"
        target.write_text("mine")
        with pytest.raises(RunError, match="run"), replacing_directory(target):
            pytest.fail("the body ran")
        assert target.read_text() == "mine"

    def test_of_two_writers_the_second_is_refused(self, tmp_path):
        target = tmp_path / "run"
        with replacing_directory(target) as beside:
            (beside / "a").write_text("1")
            with pytest.raises(RunError, match="run is being written by another process"), replacing_directory(target):
                pytest.fail("the body ran")
        assert listing(tmp_path) == {"run", "run/a"}

    def test_writers_at_the_same_time_leave_one_whole_directory(self, tmp_path):
        """Whoever is refused is told so, and whoever is not has written everything."""

        def write(number):
            try:
                with replacing_directory(tmp_path / "run") as beside:
                    for name in "abc":
                        (beside / name).write_text(str(number))
            except RunError:
                return None
            return number

        with ThreadPoolExecutor(8) as pool:
            for _ in range(20):
                done = [number for number in pool.map(write, range(8)) if number is not None]
                assert len(done) == 1
                assert {(tmp_path / "run" / name).read_text() for name in "abc"} == {str(done[0])}
                assert listing(tmp_path) == {"run", "run/a", "run/b", "run/c"}
                shutil.rmtree(tmp_path / "run")

    def test_what_the_user_has_beside_is_left_alone(self, tmp_path):
        (tmp_path / "run.partial").mkdir()
        (tmp_path / "run.partial" / "precious").write_text("mine")
        with replacing_directory(tmp_path / "run") as beside:
            (beside / "a").write_text("1")
        assert (tmp_path / "run.partial" / "precious").read_text() == "mine"

    @pytest.mark.parametrize("there", [True, False], ids=["to-a-directory", "dangling"])
    def test_a_link_is_followed_to_the_directory_that_is_filled(self, there, tmp_path):
        place = tmp_path / "elsewhere" / "place"
        if there:
            place.mkdir(parents=True)
        (tmp_path / "link").symlink_to(place)
        with replacing_directory(tmp_path / "link") as beside:
            (beside / "a").write_text("1")
        assert (tmp_path / "link").is_symlink()
        assert listing(place) == {"a"}

    def test_links_in_a_circle_are_refused(self, tmp_path):
        (tmp_path / "one").symlink_to(tmp_path / "two")
        (tmp_path / "two").symlink_to(tmp_path / "one")
        with pytest.raises(RunError, match="one cannot be used"), replacing_directory(tmp_path / "one"):
            pytest.fail("the body ran")

    def test_a_directory_that_is_there_stays_the_one_it_is(self, tmp_path, monkeypatch):
        """It may be a mount point, or have permissions that the user gave it."""
        target = tmp_path / "run"
        target.mkdir(mode=0o750)
        before = target.stat()
        order, rename = [], Path.rename
        monkeypatch.setattr(Path, "rename", lambda path, to: (order.append(path.name), rename(path, to)))
        with replacing_directory(target, last="a") as beside:
            for name in "abc":
                (beside / name).write_text("1")
        assert (target.stat().st_ino, target.stat().st_mode) == (before.st_ino, before.st_mode)
        assert order[-1] == "a"  # its presence says that all are there
        assert listing(tmp_path) == {"run", "run/a", "run/b", "run/c"}

    @pytest.mark.parametrize("error", DISK_FULL)
    def test_a_full_disk_is_a_sentence_and_leaves_nothing(self, error, tmp_path, monkeypatch):
        target = tmp_path / "run"
        monkeypatch.setattr(safetensors_file, "write_tensors", raising(error))
        with pytest.raises(RunError, match=r"disk is full.*b\.safetensors"), replacing_directory(target) as beside:  # noqa: PT012
            write_json(beside / "a.json", {})
            write_safetensors(beside / "b.safetensors", {"x": torch.ones(1)}, {})
        assert listing(tmp_path) == set()


class TestWriters:
    def test_json_reads_back(self, tmp_path):
        data = {"ä": [1, 2.5, None], "b": {"c": "→"}}
        write_json(tmp_path / "data.json", data)
        assert json.loads((tmp_path / "data.json").read_text(encoding="utf-8")) == data

    def test_names_that_are_no_text_read_back(self, tmp_path):
        """File names may hold bytes that are no UTF-8."""
        write_json(tmp_path / "data.json", os.fsdecode(b"na\xffme"))
        assert os.fsencode(json.loads((tmp_path / "data.json").read_text())) == b"na\xffme"

    def test_json_that_cannot_be_written_keeps_the_old_file(self, tmp_path):
        write_json(tmp_path / "data.json", [1])
        with pytest.raises(TypeError):
            write_json(tmp_path / "data.json", [object()])
        assert json.loads((tmp_path / "data.json").read_text()) == [1]
        assert listing(tmp_path) == {"data.json"}

    def test_tensors_read_back_contiguous_or_not(self, tmp_path):
        x = torch.arange(12.0).reshape(3, 4)
        write_safetensors(tmp_path / "x.safetensors", {"x": x, "xt": x.T}, {})
        stored = load_file(tmp_path / "x.safetensors")
        assert torch.equal(stored["x"], x)
        assert torch.equal(stored["xt"], x.T)

    @pytest.mark.parametrize("keys", [1, 2, 5])
    def test_same_tensors_and_metadata_are_the_same_bytes(self, keys, tmp_path):
        tensors = {"b": torch.ones(3), "a": torch.zeros(2, 2, dtype=torch.bfloat16), "c": torch.arange(5)}
        metadata = {f"key{i}": "value" for i in range(keys)}
        written = set()
        for _ in range(16):  # safetensors keeps metadata in a hash map whose order differs from write to write
            write_safetensors(tmp_path / "x.safetensors", tensors, metadata)
            written.add((tmp_path / "x.safetensors").read_bytes())
        assert len(written) == 1

    @pytest.mark.parametrize("error", DISK_FULL)
    def test_a_full_disk_keeps_the_old_tensors(self, error, tmp_path, monkeypatch):
        file = tmp_path / "x.safetensors"
        write_safetensors(file, {"x": torch.ones(1)}, {})
        monkeypatch.setattr(safetensors_file, "write_tensors", raising(error))
        with pytest.raises(RunError, match=r"disk is full.*x\.safetensors"):
            write_safetensors(file, {"x": torch.zeros(1)}, {})
        monkeypatch.undo()
        assert load_file(file)["x"].item() == 1
        assert listing(tmp_path) == {"x.safetensors"}

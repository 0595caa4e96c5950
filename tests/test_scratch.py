"""What a killed process leaves behind goes; what lives, what is the user's and what links point to stays."""

import multiprocessing
import os
import signal
from pathlib import Path

import pytest

from fewbit.errors import RunError
from fewbit.scratch import Scratch, is_scratch, lock_file, scratch_file, sweep


def use_and_die(parent: Path) -> None:
    scratch = Scratch(parent, "work")
    (scratch.path / "states").write_text("much")
    with scratch_file(parent / "block") as beside:
        beside.write_text("half")
        os.kill(os.getpid(), signal.SIGKILL)


@pytest.fixture
def left_behind(tmp_path):
    process = multiprocessing.get_context("forkserver").Process(target=use_and_die, args=(tmp_path,))
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    assert sorted(is_scratch(path.name) for path in tmp_path.iterdir()) == [True, True]
    return tmp_path


def test_scratch_of_a_killed_process_is_removed(left_behind):
    sweep(left_behind)
    assert not list(left_behind.iterdir())


def test_whoever_needs_scratch_removes_what_is_left_of_the_same(left_behind):
    with Scratch(left_behind, "work") as own:
        names = [path.name for path in left_behind.iterdir()]
        assert own.name in names
        assert sum(name.startswith(".work.") for name in names) == 1


def test_scratch_that_is_in_use_stays(tmp_path):
    with Scratch(tmp_path, "work") as one, Scratch(tmp_path, "work") as other, scratch_file(tmp_path / "x") as file:
        sweep(tmp_path)
        assert one != other
        assert one.is_dir()
        assert other.is_dir()
        assert file.is_file()
    assert not list(tmp_path.iterdir())


def test_scratch_that_is_swept_away_before_it_is_opened_is_made_again(tmp_path, monkeypatch):
    opened, swept = os.open, []

    def sweeping_first(path, *flags):
        if not swept:
            os.rmdir(path)
            swept.append(path)
        return opened(path, *flags)

    monkeypatch.setattr(os, "open", sweeping_first)
    with Scratch(tmp_path, "work") as own:
        assert own.is_dir()
        assert own not in swept


def test_a_link_named_like_scratch_is_not_followed(tmp_path):
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "thesis").write_text("three years of work")
    (tmp_path / "parent").mkdir()
    (tmp_path / "parent" / ".work.fewbit-0123456789abcdef.partial").symlink_to(precious)
    sweep(tmp_path / "parent")
    assert (precious / "thesis").read_text() == "three years of work"


@pytest.mark.parametrize("name", ["work.partial", ".work.partial", "work", ".work.fewbit-0123.partial"])
def test_other_names_are_the_users(name, tmp_path):
    (tmp_path / name).mkdir()
    sweep(tmp_path)
    assert (tmp_path / name).is_dir()


def test_a_forked_child_takes_nothing_away(tmp_path):
    scratch = Scratch(tmp_path, "work")
    if (child := os.fork()) == 0:
        scratch.close()
        os._exit(0)
    os.waitpid(child, 0)
    assert scratch.path.is_dir()
    scratch.close()
    assert not scratch.path.exists()


def test_names_of_any_length_have_scratch(tmp_path):
    with scratch_file(tmp_path / ("ä" * 127)) as beside:
        assert beside.exists()


def test_a_lock_is_not_taken_through_a_link(tmp_path):
    (tmp_path / "precious").write_text("mine")
    (tmp_path / ".lock").symlink_to(tmp_path / "precious")
    with pytest.raises(RunError, match=r"\.lock is a link"):
        lock_file(tmp_path / ".lock", "busy")
    assert (tmp_path / "precious").read_text() == "mine"


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir])
def test_a_lock_is_a_file(make, tmp_path):
    make(tmp_path / ".lock")
    with pytest.raises(RunError, match=r"\.lock is no file"):
        lock_file(tmp_path / ".lock", "busy")

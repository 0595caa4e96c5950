"""A run that is continued keeps the exports that are complete and its own, and says what else is in their place."""

import shutil

import pytest

import fewbit
from fewbit.checkpoint.journal import Journal
from fewbit.errors import RunError
from fewbit.formats import exporter
from fewbit.formats.verification import ORIGIN
from fewbit.runs.progress import ProgressView
from fewbit.runs.quantize import export_missing

FORMAT = "compressed-tensors"


@pytest.fixture
def again(finished_run, checkpoint, quick, tmp_path):
    """again(): the finished run continued, with an export."""
    shutil.copytree(finished_run("llama"), tmp_path / "run")

    def resume(export=(FORMAT,)):
        return fewbit.quantize(checkpoint("llama"), output=tmp_path / "run", resume=True, export=export, **quick)

    return resume


def place(run):
    return run / "exports" / FORMAT


def test_an_export_that_is_complete_stays(again, tmp_path):
    run = again()
    before = {path.name: path.stat().st_mtime_ns for path in place(run.directory).iterdir()}
    again()
    assert {path.name: path.stat().st_mtime_ns for path in place(run.directory).iterdir()} == before
    assert run.verify()


@pytest.mark.parametrize(("empty", "export"), [(True, [FORMAT]), (False, FORMAT)])
def test_one_that_is_not_there_is_made(again, empty, export, tmp_path):
    if empty:
        place(tmp_path / "run").mkdir(parents=True)
    assert again(export).verify()


@pytest.mark.parametrize("lost", [ORIGIN, "config.json", "model-00002-of-00003.safetensors", "tokenizer.json"])
def test_half_an_export_is_not_taken_for_done(again, lost, monkeypatch):
    run = again()
    (place(run.directory) / lost).unlink()
    monkeypatch.setattr("fewbit.runs.quantize.open_model", lambda model: pytest.fail("the work began"))
    with pytest.raises(RunError, match="is no complete export of this run; move it away or remove it"):
        again()


def test_an_export_of_what_the_run_was_before_is_named(again):
    run = again()
    block = Journal(run.directory).blocks()[0]
    Journal(run.directory).add_block(0, "0" * 64 + ":1", block.linears)
    with pytest.raises(RunError, match="was made from what the run was before"):
        export_missing(run.directory, [exporter(FORMAT)], ProgressView())


def test_two_exports_at_once_are_one_whole_export_and_one_sentence(finished_run, tmp_path):
    from concurrent.futures import ThreadPoolExecutor

    run = fewbit.Run(finished_run("llama"))

    def export(_):
        try:
            return run.export(FORMAT, tmp_path / "export")
        except RunError as error:
            return error

    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(export, range(4)))
    assert sum(isinstance(answer, RunError) for answer in answers) == 3
    from fewbit.formats import verify

    assert verify(tmp_path / "export", run.directory)
    assert [path.name for path in tmp_path.iterdir()] == ["export"]

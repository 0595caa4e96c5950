"""A run that was killed at any moment is resumed to the same bytes; a resume that would mix two runs is refused."""

import json
import multiprocessing
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch

import fewbit
from fewbit.checkpoint.journal import Journal
from fewbit.checkpoint.native import FORMAT_VERSION, read_manifest, write_manifest
from fewbit.config.recipe import Config
from fewbit.errors import CheckpointError, RunError
from fewbit.runs.run_directory import Identity, RunDirectory

# --- what runs in the process that kills itself ---------------------------------------------------------------------


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def kill_before_sync(number):
    """Every file, rename and journal line is followed by an fsync: dying before the n-th leaves what came before."""
    count, sync = 0, os.fsync

    def counting(handle):
        nonlocal count
        count += 1
        if count == number:
            die()
        sync(handle)

    os.fsync = counting


def kill_in_journal_line(number):
    from fewbit.runs import run_directory

    record, count = run_directory.RunDirectory.record, 0

    def dying(self, block, linears, digest):
        nonlocal count
        count += 1
        record(self, block, linears, digest)
        if count == number:
            journal = self.path / run_directory.JOURNAL
            whole = journal.read_text().rstrip("\n")
            journal.write_text(whole[: len(whole) - len(whole.splitlines()[-1]) // 2])
            die()

    run_directory.RunDirectory.record = dying


def kill_in_block_file(number):
    from fewbit import safetensors_file

    write, count = safetensors_file.write_tensors, 0

    def dying(path, tensors, metadata):
        nonlocal count
        count += 1
        digest = write(path, tensors, metadata)
        if count == number:
            os.truncate(path, Path(path).stat().st_size // 2)
            die()
        return digest

    safetensors_file.write_tensors = dying


def kill_at_stage(number):
    from fewbit.engine.stages import Stage

    finish, count = Stage.finish, 0

    def dying(self):
        nonlocal count
        count += 1
        if count == number:
            die()
        finish(self)

    Stage.finish = dying


def run_and_die(killer, number, model, output, arguments):
    killer(number)
    fewbit.quantize(model, output=output, **arguments)


# --------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def processes():
    """Processes forked from one that has fewbit imported and nothing else done."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["fewbit.api", "pytest"])
    return context


@pytest.fixture
def killed(processes, checkpoint, quick, tmp_path):
    """killed(killer, number, …): the directory of a run that died there."""

    def run(killer, number, **arguments):
        output = tmp_path / "run"
        process = processes.Process(
            target=run_and_die, args=(killer, number, checkpoint("llama"), output, quick | arguments)
        )
        process.start()
        process.join(120)
        assert process.exitcode == -signal.SIGKILL, "the run ended before it was killed"
        return output

    return run


def assert_same_run(run, other, files_of):
    assert files_of(run) == files_of(other)
    names = [sorted(str(path.relative_to(d)) for path in d.rglob("*") if path.name != ".lock") for d in (run, other)]
    assert names[0] == names[1]
    for name in ("config.json", "fewbit.json", "tokenizer.json"):
        assert (run / name).read_bytes() == (other / name).read_bytes()
    rows = [json.loads((d / "report.json").read_text())["linears"] for d in (run, other)]
    for row in rows[0] + rows[1]:
        row.pop("seconds", None)
    assert rows[0] == rows[1]


@pytest.mark.parametrize(
    ("killer", "number"),
    [
        (kill_before_sync, 1),  # the manifest lies beside its place
        (kill_before_sync, 2),  # … is in place
        (kill_at_stage, 2),  # in the middle of the first block
        (kill_in_block_file, 1),
        (kill_before_sync, 3),  # the first block lies beside its place
        (kill_before_sync, 4),  # … is in place, but not in the journal
        (kill_in_journal_line, 1),
        (kill_before_sync, 5),  # … is in the journal
        (kill_at_stage, 6),  # in the middle of the second block
        (kill_in_block_file, 2),
        (kill_before_sync, 7),
        (kill_in_journal_line, 2),
        (kill_before_sync, 8),  # all blocks are done
        (kill_in_block_file, 3),  # in outside.safetensors
        (kill_before_sync, 10),
        (kill_before_sync, 12),  # among configuration and tokenizer
    ],
    ids=lambda value: str(getattr(value, "__name__", value)),
)
def test_a_killed_run_is_resumed_to_the_same_bytes(killed, finished_run, checkpoint, quick, files_of, killer, number):
    output = killed(killer, number)
    assert not (output / "report.json").exists()
    fewbit.quantize(checkpoint("llama"), output=output, resume=True, **quick)
    assert_same_run(output, finished_run("llama"), files_of)


@pytest.mark.parametrize(
    "arguments",
    [
        {"algorithm": "gptq"},
        {"activation_memory": 0},
        {"calibration": "none"},
        {"algorithm": "awq+gptq"},
        {"algorithm": "awq+rtn", "config": {"algorithm": {"name": "awq", "alpha": 0.5, "duo_scale": False}}},
        {"algorithm": "smoothquant+gptq", "scheme": "W8A8", "group_size": None},
        {"scheme": "W8A8_STATIC", "group_size": None},
        {"scheme": "NVFP4", "group_size": None},
        {"scheme": "W4A16KVFP8"},
        {"algorithm": {"name": "gptq", "drift": 0.5}, "scheme": "W4A8"},
    ],
    ids=str,
)
def test_a_killed_run_is_resumed_to_the_same_bytes_with(killed, finished_run, checkpoint, quick, files_of, arguments):
    output = killed(kill_at_stage, 6, **arguments)
    fewbit.quantize(checkpoint("llama"), output=output, resume=True, **quick | arguments)
    same = {name: value for name, value in arguments.items() if name != "activation_memory"}
    assert_same_run(output, finished_run("llama", **same), files_of)


def test_a_run_killed_twice_is_resumed_to_the_same_bytes(killed, finished_run, checkpoint, quick, files_of):
    killed(kill_in_journal_line, 1)
    output = killed(kill_in_journal_line, 1, resume=True)
    fewbit.quantize(checkpoint("llama"), output=output, resume=True, **quick)
    assert_same_run(output, finished_run("llama"), files_of)


def test_finished_blocks_are_not_quantized_again(killed, checkpoint, quick):
    output = killed(kill_at_stage, 6)
    before = (output / "blocks" / "00000.safetensors").stat()
    fewbit.quantize(checkpoint("llama"), output=output, resume=True, **quick)
    after = (output / "blocks" / "00000.safetensors").stat()
    assert (before.st_ino, before.st_mtime_ns) == (after.st_ino, after.st_mtime_ns)


def test_resuming_what_was_never_started_starts_it(finished_run, checkpoint, quick, files_of, tmp_path):
    run = fewbit.quantize(checkpoint("llama"), output=tmp_path / "run", resume=True, **quick)
    assert_same_run(run.directory, finished_run("llama"), files_of)


def test_resuming_a_finished_run_changes_nothing(finished_run, checkpoint, quick, files_of, tmp_path):
    output = shutil.copytree(finished_run("llama"), tmp_path / "run")
    fewbit.quantize(checkpoint("llama"), output=output, resume=True, **quick)
    assert_same_run(output, finished_run("llama"), files_of)


@pytest.fixture
def copied(finished_run, tmp_path):
    """A copy of a finished run, to be damaged."""
    return shutil.copytree(finished_run("llama"), tmp_path / "run")


def flip(file, position):
    data = bytearray(file.read_bytes())
    data[position] ^= 1
    file.write_bytes(data)


def change_a_code(run):
    flip(run / "blocks" / "00001.safetensors", -100)


def cut_a_block_off(run):
    file = run / "blocks" / "00000.safetensors"
    file.write_bytes(file.read_bytes()[:-1])


def remove_a_block(run):
    (run / "blocks" / "00000.safetensors").unlink()


def exchange_blocks(run):
    one, other = (run / "blocks" / f"0000{number}.safetensors" for number in range(2))
    one.rename(run / "third")
    other.rename(one)
    (run / "third").rename(other)


def change_the_head(run):
    flip(run / "outside.safetensors", -1)


def change_the_configuration(run):
    config = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.1}))


def remove_the_tokenizer(run):
    (run / "tokenizer.json").unlink()


def change_the_journal(run):
    lines = [json.loads(line) for line in (run / "journal.jsonl").read_text().splitlines() if line]
    lines[0]["linears"][0]["loss"] = 0.0
    (run / "journal.jsonl").write_text("\n".join(map(json.dumps, lines)))


def spoil_the_journal(run):
    nonsense = ["[]", "1", "null", '"text"', '{"block": 0}', '{"block": "0", "linears": 1}', "{" * 100_000, "\ud800"]
    with (run / "journal.jsonl").open("ab") as file:
        file.write("\n".join(nonsense).encode("utf-8", "surrogatepass") + b"\xff\n\0")


DAMAGE = [
    change_a_code,
    cut_a_block_off,
    remove_a_block,
    exchange_blocks,
    change_the_head,
    change_the_configuration,
    remove_the_tokenizer,
    change_the_journal,
    spoil_the_journal,
]


CHANGED = {
    change_a_code: ["blocks/00001.safetensors"],
    cut_a_block_off: ["blocks/00000.safetensors"],
    exchange_blocks: ["blocks/00000.safetensors", "blocks/00001.safetensors"],
    change_the_head: ["outside.safetensors"],
    change_the_configuration: ["config.json"],
}
"""What is there but is not what the run wrote, and in which files."""


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_resume_makes_anew_what_is_damaged(damage, copied, finished_run, checkpoint, quick, files_of):
    damage(copied)
    (copied / "report.json").unlink()  # the run was interrupted
    fewbit.quantize(checkpoint("llama"), output=copied, resume=True, **quick)
    assert_same_run(copied, finished_run("llama"), files_of)


@pytest.mark.parametrize("damage", [damage for damage in DAMAGE if damage not in CHANGED])
def test_what_a_complete_run_lost_is_made_anew(damage, copied, finished_run, checkpoint, quick, files_of):
    damage(copied)
    fewbit.quantize(checkpoint("llama"), output=copied, resume=True, **quick)
    assert_same_run(copied, finished_run("llama"), files_of)


@pytest.mark.parametrize(("damage", "files"), CHANGED.items())
def test_what_was_changed_in_a_complete_run_is_named_and_kept(
    damage, files, copied, finished_run, checkpoint, quick, files_of
):
    damage(copied)
    before = files_of(copied)
    with pytest.raises(RunError, match=f"{files[0]} is not what the run wrote.*remove it"):
        fewbit.quantize(checkpoint("llama"), output=copied, resume=True, **quick)
    assert files_of(copied) == before
    for name in files:  # as the sentence says
        (copied / name).unlink()
    fewbit.quantize(checkpoint("llama"), output=copied, resume=True, **quick)
    assert_same_run(copied, finished_run("llama"), files_of)


@pytest.mark.parametrize("damage", DAMAGE[:-1])
def test_what_is_damaged_is_not_exported(damage, copied):
    damage(copied)
    with pytest.raises(CheckpointError) as caught:
        fewbit.Run(copied).export("compressed-tensors")
    assert "--resume" in str(caught.value)


@pytest.mark.parametrize("damage", DAMAGE[:5])
def test_what_is_damaged_is_not_evaluated(damage, copied):
    damage(copied)
    with pytest.raises(CheckpointError):
        fewbit.evaluate(copied, torch.randint(5, 300, (1, 16)))


def test_a_block_that_is_made_anew_is_named(copied, checkpoint, quick, capsys):
    change_a_code(copied)
    (copied / "report.json").unlink()
    fewbit.quantize(checkpoint("llama"), output=copied, resume=True, **quick | {"progress": True})
    assert "00001.safetensors is damaged (it is not what the run wrote) and was made again" in capsys.readouterr().err
    warnings = json.loads((copied / "report.json").read_text())["warnings"]
    assert any("00001.safetensors is damaged" in warning for warning in warnings)


def test_blocks_after_one_that_came_out_otherwise_are_made_anew(copied, checkpoint, quick, capsys):
    """They were calibrated on what it gave then."""
    part = copied / "blocks" / "00000.safetensors"
    part.unlink()
    journal = Journal(copied)
    journal.add_block(0, "0" * 64 + ":1", journal.blocks()[0].linears)
    fewbit.quantize(checkpoint("llama"), output=copied, resume=True, **quick | {"progress": True})
    said = capsys.readouterr().err
    assert "block 0 came out otherwise than before" in said
    assert "kept from before" not in said


@pytest.mark.parametrize("field", ["num_blocks", "contents"])
def test_a_manifest_that_says_otherwise_than_the_model_is_refused(field, refused, checkpoint, tmp_path):
    manifest = read_manifest(tmp_path / "run")
    other = 1 if field == "num_blocks" else manifest["contents"] | {"linears": {}}
    write_manifest(tmp_path / "run", manifest | {field: other})
    sentence = refused(checkpoint("llama"))
    assert "cannot be resumed" in sentence
    assert ("1 blocks before, 2 now" if field == "num_blocks" else "other linears") in sentence


@pytest.mark.parametrize("written", ["", "[]", "{" * 100_000, f'{{"format_version": {FORMAT_VERSION}}}', "\0"])
def test_a_damaged_manifest_is_refused(written, refused, checkpoint, tmp_path):
    (tmp_path / "run" / "fewbit.json").write_text(written)
    assert "fewbit.json is damaged" in refused(checkpoint("llama"))


def contents(directory):
    return {str(path): path.read_bytes() for path in directory.rglob("*") if path.is_file() and path.name != ".lock"}


@pytest.fixture
def refused(finished_run, quick, tmp_path):
    """refused(model, **changes): the sentence with which a resume is refused; nothing may have changed."""
    output = shutil.copytree(finished_run("llama"), tmp_path / "run")

    def attempt(model, **changes):
        before = contents(output)
        with pytest.raises(RunError) as caught:
            fewbit.quantize(model, output=output, **{"resume": True} | quick | changes)
        assert contents(output) == before
        return str(caught.value)

    return attempt


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"scheme": "W3A16"}, ["recipe field 'global_quant_config'"]),
        ({"group_size": 64}, ["recipe field 'global_quant_config'"]),
        ({"algorithm": "gptq"}, ["recipe field 'algo_config'"]),
        ({"seed": 1}, ["recipe field 'seed': 0 before, 1 now"]),
        ({"num_samples": 4}, ["recipe field 'calibration'", "other calibration data"]),
        ({"calibration": ["ba be bi bo bu " * 200]}, ["other calibration data"]),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_resume_with_other_settings_is_refused_by_name(refused, checkpoint, changes, named):
    sentence = refused(checkpoint("llama"), **changes)
    assert "cannot be resumed" in sentence
    assert "use the original settings or a new directory" in sentence
    for words in named:
        assert words in sentence
    assert "another model" not in sentence


@pytest.mark.parametrize("other", [("llama", 1), ("mistral", 0)])
def test_a_resume_with_another_model_is_refused(refused, checkpoint, other):
    family, seed = other
    sentence = refused(checkpoint(family, seed=seed))
    assert "another model" in sentence
    assert "recipe field" not in sentence


def test_a_resume_by_another_version_is_refused(refused, checkpoint, monkeypatch):
    monkeypatch.setattr("fewbit.runs.quantize.__version__", "99.0")
    assert f"fewbit {fewbit.__version__} before, 99.0 now" in refused(checkpoint("llama"))


def test_a_resume_with_other_libraries_is_refused(refused, checkpoint, monkeypatch):
    """Another version may round otherwise, and the same recipe would no longer give the same bytes."""
    monkeypatch.setattr("fewbit.runs.quantize.transformers.__version__", "6.0")
    assert "transformers " in refused(checkpoint("llama"))
    assert "before, 6.0 now" in refused(checkpoint("llama"))


def test_an_existing_run_is_refused_without_resume(refused, checkpoint):
    assert "already holds a run; use --resume" in refused(checkpoint("llama"), resume=False)


def test_a_directory_with_other_files_is_refused_and_left_alone(checkpoint, quick, tmp_path):
    (tmp_path / "thesis.txt").write_text("three years of work")
    for resume in (False, True):
        with pytest.raises(RunError, match="is not empty and holds no fewbit run"):
            fewbit.quantize(checkpoint("llama"), output=tmp_path, resume=resume, **quick)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


IDENTITY = Identity(
    recipe=Config.from_dict({"scheme": "W4A16"}).to_dict(),
    model="m",
    calibration="c",
    version="v",
    libraries={},
    num_blocks=2,
    contents={},
)


def test_a_directory_in_use_is_refused_while_the_other_run_lives(finished_run, refused, checkpoint, quick, tmp_path):
    manifest = json.loads((tmp_path / "run" / "fewbit.json").read_text())
    holder = RunDirectory(tmp_path / "run")
    holder.open(
        Identity(
            manifest["recipe"],
            manifest["model"],
            manifest["calibration"],
            manifest["version"],
            manifest["libraries"],
            manifest["num_blocks"],
            manifest["contents"],
        ),
        resume=True,
    )
    assert "in use by another run" in refused(checkpoint("llama"))
    holder.close()
    fewbit.quantize(checkpoint("llama"), output=tmp_path / "run", resume=True, **quick)


def test_the_second_of_two_new_runs_is_refused(tmp_path):
    with_lock = RunDirectory(tmp_path / "run")
    with_lock.open(IDENTITY, resume=False)
    second = RunDirectory(tmp_path / "run")
    with pytest.raises(RunError, match="in use by another run"):
        second.open(IDENTITY, resume=True)
    second.close()
    assert (tmp_path / "run" / "fewbit.json").exists()
    with_lock.close()


def hold_forever(directory, ready):
    held = RunDirectory(directory)
    held.open(IDENTITY, resume=False)
    ready.set()
    signal.pause()


def test_a_directory_is_free_again_when_its_run_was_killed(processes, tmp_path):
    ready = processes.Event()
    process = processes.Process(target=hold_forever, args=(tmp_path / "run", ready))
    process.start()
    assert ready.wait(60)
    directory = RunDirectory(tmp_path / "run")
    with pytest.raises(RunError, match="in use by another run"):
        directory.open(IDENTITY, resume=True)
    process.kill()
    process.join(60)
    directory.open(IDENTITY, resume=True)
    directory.close()

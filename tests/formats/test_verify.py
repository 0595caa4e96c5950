"""verify proves an export whole: what was changed, lost or added is one sentence that names it, whatever it is."""

import json
import os
import random
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_compressed_tensors import FORMAT

from fewbit.errors import CheckpointError, FewbitError, VerificationError
from fewbit.files import write_json
from fewbit.formats import export, verify
from fewbit.formats.beside import difference
from fewbit.formats.verification import ORIGIN, compare


@pytest.fixture(scope="module")
def original(native, checkpoint, tmp_path_factory):
    """A run with all kinds of files beside its weights, exported."""
    directory = tmp_path_factory.mktemp("verified") / "run"
    shutil.copytree(native("W3A16_ASYM", torch.bfloat16), directory, ignore=shutil.ignore_patterns("exports"))
    (directory / "generation_config.json").write_text('{"eos_token_id": [0, 7], "temperature": 0.7}')
    (directory / "chat_template.jinja").write_text("{{ messages }}")
    export(directory, FORMAT, directory / "exports" / FORMAT)
    return directory


@pytest.fixture
def exported(original, tmp_path):
    """An export of one's own, to be damaged; its run is beside it."""
    shutil.copytree(original, tmp_path / "run")
    return tmp_path / "run" / "exports" / FORMAT


def refused(directory, match):
    with pytest.raises(FewbitError, match=match) as found:
        verify(directory)
    assert "\n" not in str(found.value)


FIELDS = [
    ("config.json", "rms_norm_eps", 0.1),
    ("config.json", "vocab_size", 305),
    ("config.json", "hidden_size", 64.0),
    ("config.json", "tie_word_embeddings", True),
    ("config.json", "rope_parameters", None),
    ("config.json", "architectures", []),
    ("config.json", "new_field", 1),
    ("config.json", "transformers_weights", "other.safetensors"),
    ("generation_config.json", "eos_token_id", [0]),
    ("tokenizer_config.json", "model_max_length", 1),
    ("tokenizer.json", "model", {}),
    ("model.safetensors.index.json", "metadata", {"total_size": 1}),
]


@pytest.mark.parametrize(("file", "field", "value"), FIELDS)
def test_a_field_that_was_changed_added_or_lost_is_named(exported, file, field, value):
    before = json.loads((exported / file).read_text())
    write_json(exported / file, before | {field: value})
    refused(exported, rf"{file}.*{field}")
    if field in before:
        write_json(exported / file, {key: value for key, value in before.items() if key != field})
        refused(exported, rf"{file}.*{field} is missing")
    write_json(exported / file, dict(reversed(before.items())))  # another order, the same values
    verify(exported)


def everything(directory):
    return sorted(path.relative_to(directory).as_posix() for path in directory.rglob("*") if path.is_file())


def test_every_file_that_is_lost_emptied_cut_or_something_else_is_named(exported):
    for name in everything(exported):
        file, kept = exported / name, (exported / name).read_bytes()

        def put(make, file=file, name=name, kept=kept):
            file.unlink()
            make()
            refused(exported, name.replace(".", r"\."))
            if file.is_dir() and not file.is_symlink():
                file.rmdir()
            file.unlink(missing_ok=True)
            file.write_bytes(kept)

        put(lambda: None)
        put(lambda file=file: file.write_bytes(b""))
        put(lambda file=file, kept=kept: file.write_bytes(kept[: len(kept) // 2]))
        put(lambda file=file: os.mkfifo(file))
        put(lambda file=file: file.mkdir())
        put(lambda file=file: file.symlink_to(file))
        put(lambda file=file: file.symlink_to("/dev/zero"))
    verify(exported)


JSON = (b"[]", b"null", b"7", b'"text"', b"{}", b"{", b"\xff", b"[" * 5000, b'{"a": 1' + b"0" * 5000 + b"}")


@pytest.mark.parametrize("content", JSON, ids=range(len(JSON)))
def test_json_of_another_type_is_a_sentence(exported, content):
    for name in everything(exported):
        if name.endswith(".json"):
            kept = (exported / name).read_bytes()
            (exported / name).write_bytes(content)
            refused(exported, name.replace(".", r"\."))
            (exported / name).write_bytes(kept)


def test_shards_in_each_others_place_are_found(exported):
    shards = sorted(exported.glob("*.safetensors"))
    shards[0].rename(exported / "x")
    shards[1].rename(shards[0])
    (exported / "x").rename(shards[1])
    refused(exported, "index")


@pytest.mark.parametrize(
    "name",
    ["model.safetensors", "model-00009-of-00009.safetensors", "pytorch_model.bin", "adapter_config.json", "sub/x.json",
     "modeling_llama.py", "tokenizer.model", "consolidated.00.pth", "special_tokens_map.json.bak"],
)  # fmt: skip
def test_a_file_that_the_export_did_not_write_is_found(exported, name):
    (exported / name).parent.mkdir(exist_ok=True)
    shutil.copy(next(exported.glob("*.safetensors")), exported / name)
    refused(exported, rf"{name}, which the export did not write")


def test_what_people_put_beside_a_model_does_no_harm(exported):
    for name in ("README.md", "LICENSE", ".gitattributes", "figure.png", ".cache/x.json"):
        (exported / name).parent.mkdir(exist_ok=True)
        (exported / name).write_text("text")
    verify(exported)


def test_a_tensor_in_two_shards_and_metadata_that_transformers_refuses_are_found(exported):
    first, second = sorted(exported.glob("*.safetensors"))[:2]
    name, tensors = "model.norm.weight", load_file(first)
    save_file(tensors | {name: torch.ones(64, dtype=torch.bfloat16)}, first, {"format": "pt"})
    refused(exported, name)
    save_file(tensors, first, {"format": "tf"})
    refused(exported, r"metadata are \{'format': 'tf'\}")
    assert second.exists()


def test_a_zero_that_changed_its_sign_is_found(exported):
    shard = sorted(exported.glob("*.safetensors"))[0]
    tensors = load_file(shard)
    name = "model.layers.0.input_layernorm.weight"
    run = exported.parent.parent
    zero = torch.zeros(3)
    compare("x", zero, zero.clone())
    with pytest.raises(VerificationError, match="1 of 3 values differ"):
        compare("x", torch.tensor([0.0, -0.0, 0.0]), zero)
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float8_e4m3fn):
        with pytest.raises(VerificationError, match="1 of 1 values differ"):
            compare("x", torch.tensor(-0.0).to(dtype), torch.tensor(0.0).to(dtype))
    assert run.exists()
    assert name in tensors


def test_notes_and_digests_cannot_be_changed_unseen(exported):
    noted = json.loads((exported / ORIGIN).read_text())
    for change in ({"notes": ["all is well"]}, {"notes": None}, {"files": {}}, {"format": "gguf"}, {"digest": ""}):
        write_json(exported / ORIGIN, noted | change)
        refused(exported, "export the run again")


def test_an_export_that_lost_its_origin_is_not_passed_over(exported):
    (exported / ORIGIN).unlink()
    refused(exported.parent.parent, rf"{FORMAT} is no fewbit export")


def test_what_changed_in_the_run_is_found_too(exported):
    run = exported.parent.parent
    (run / "chat_template.jinja").write_text("{{ other }}")
    refused(exported, r"chat_template\.jinja differs from the run's")
    (run / "chat_template.jinja").unlink()
    refused(exported, r"chat_template\.jinja comes from no file of the run")


def test_files_that_were_added_to_the_run_later_do_not_matter(exported):
    (exported.parent.parent / "evaluation.json").write_text("{}")
    verify(exported)


def test_differences_tell_types_and_signs_apart():
    assert difference({"a": [1, {"b": 2}]}, {"a": [1, {"b": 2}]}) is None
    for found, expected in ((1, 1.0), (1, True), (0.0, -0.0), ([1], [1, 1]), ({}, []), (None, 0), ("1", 1)):
        assert difference({"a": {"b": found}}, {"a": {"b": expected}}).startswith("a.b is ")


@pytest.mark.parametrize("seed", range(2))
def test_a_byte_that_changed_anywhere_is_found_or_is_no_value(exported, seed):
    """Of files at random; what is accepted must still hold the same values."""
    chooser = random.Random(seed)
    for _ in range(25):
        file = exported / chooser.choice(everything(exported))
        kept = file.read_bytes()
        data = bytearray(kept)
        place = chooser.randrange(min(len(data), 2000) if chooser.random() < 0.5 else len(data))
        data[place] ^= 1 << chooser.randrange(8)
        file.write_bytes(data)
        try:
            verify(exported)
        except FewbitError as error:
            assert "\n" not in str(error)  # noqa: PT017
        else:
            assert same(file, kept), f"{file.name}: byte {place} of {len(kept)}"
        file.write_bytes(kept)


def same(file: Path, kept: bytes) -> bool:
    """Whether a file still says the same: JSON, or the header and data of safetensors."""
    if file.suffix == ".json":
        return json.loads(file.read_bytes()) == json.loads(kept)
    if file.suffix != ".safetensors":
        return file.read_bytes() == kept
    length = int.from_bytes(kept[:8], "little")
    found = file.read_bytes()
    return found[8 + length :] == kept[8 + length :] and json.loads(found[8 : 8 + length]) == json.loads(
        kept[8 : 8 + length]
    )


@pytest.mark.parametrize("place", ["exports/engine/small", "exports/a/b/c", "exports"])
def test_exports_are_found_however_deep_in_a_run(native, tmp_path, place):
    run = tmp_path / "run"
    shutil.copytree(native("W4A16"), run, ignore=shutil.ignore_patterns("exports"))
    export(run, FORMAT, run / place)
    (run / "exports" / "README.md").write_text("What these are.")
    (run / "exports" / ".hidden").mkdir()
    assert [found.directory for found in verify(run)] == [run / place]
    (run / place / ORIGIN).unlink()
    with pytest.raises(CheckpointError, match="is no fewbit export"):
        verify(run)

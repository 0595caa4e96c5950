import json
import os

import pytest
import torch
from transformers import AutoConfig, GenerationConfig, LlamaConfig, LlamaForCausalLM

from fewbit.checkpoint.native import MANIFEST, OUTSIDE
from fewbit.checkpoint.side_files import RESERVED, copy_side_files, in_words, is_weight, saved_side_files
from fewbit.errors import CheckpointError

SIDE = (
    "tokenizer.json", "vocab.txt", "spiece.model", "o200k.tiktoken", "merges.txt", "README.md", "LICENSE",
    "additional_chat_templates/tool_use.jinja", "modeling_own.py", "preprocessor_config.json", "1_Pooling/config.json",
)  # fmt: skip
WEIGHTS = (
    "pytorch_model.bin", "model.fp16.safetensors", "pytorch_model.bin.index.json", "consolidated.00.pth",
    "model.Q4_0.GGUF", "tf_model.h5", "flax_model.msgpack", "training_args.bin",
)  # fmt: skip


def put(directory, name, text="x"):
    path = directory / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


@pytest.fixture
def source(tmp_path):
    directory = tmp_path / "source"
    put(directory, "config.json", '{"model_type":  "llama"}')
    return directory


@pytest.fixture
def target(tmp_path):
    (tmp_path / "target").mkdir()
    return tmp_path / "target"


def listing(directory):
    return {str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file()}


class TestCopy:
    def test_everything_that_is_no_weight_comes_along_and_the_rest_is_named(self, source, target):
        for name in (*SIDE, *WEIGHTS):
            put(source, name, name)
        left = copy_side_files(source, target)
        assert listing(target) == {"config.json", *SIDE}
        assert all((target / name).read_text() == name for name in SIDE)
        assert {entry.split(" (")[0] for entry in left} == set(WEIGHTS)
        assert (target / "config.json").read_text() == '{"model_type":  "llama"}'  # to the byte

    def test_the_weights_that_are_rewritten_are_not_left_behind(self, source, target):
        mine = {put(source, "model-1.safetensors"), put(source, "shards/model-2.safetensors")}
        put(source, "shards/notes.txt")
        assert copy_side_files(source, target, weights=mine) == []
        assert listing(target) == {"config.json", "shards/notes.txt"}

    def test_folders_with_other_weights_and_other_runs_stay_behind(self, source, target):
        put(source, "checkpoint-500/model.safetensors")
        put(source, "checkpoint-500/trainer_state.json")
        put(source, "old-run/fewbit.json")
        left = copy_side_files(source, target)
        assert listing(target) == {"config.json"}
        assert left == ["checkpoint-500/ (other weights)", "old-run/ (a run or an export)"]

    def test_a_target_inside_the_source_is_not_copied_into_itself(self, source):
        inside = source / "quantized"
        inside.mkdir()
        put(source, "vocab.txt")
        assert copy_side_files(source, inside) == []
        assert listing(inside) == {"config.json", "vocab.txt"}

    def test_what_fewbit_writes_is_not_taken_from_a_model_nor_from_a_run(self, source, target):
        put(source, "report.json")
        assert copy_side_files(source, target) == ["report.json (a run has one of that name)"]
        for name in RESERVED - {"blocks", "exports", "work"}:
            put(source, name)
        for name in ("blocks/0.safetensors", "exports/a/config.json", "work/x"):
            put(source, name)
        assert copy_side_files(source, target) == []
        assert listing(target) == {"config.json"}
        assert {MANIFEST, OUTSIDE} <= RESERVED

    def test_links_are_followed_inside_the_directory_and_the_hubs_cache_only(self, tmp_path, target):
        directory, blob, secret = tmp_path / "snapshots/1", tmp_path / "blobs/a1", put(tmp_path, "secret")
        put(directory, "config.json", "{}")
        put(blob.parent, blob.name, "of the hub")
        for name, aim in (("tokenizer.json", blob), ("same.txt", directory / "config.json"), ("out.txt", secret),
                          ("nothing.txt", tmp_path / "absent"), ("folder", tmp_path)):  # fmt: skip
            (directory / name).symlink_to(aim)
        os.mkfifo(directory / "pipe.txt")
        left = copy_side_files(directory, target)
        assert listing(target) == {"config.json", "tokenizer.json", "same.txt"}
        assert (target / "tokenizer.json").read_text() == "of the hub"
        assert {entry.split(" (")[0] for entry in left} == {"out.txt", "nothing.txt", "folder/", "pipe.txt"}

    def test_fields_of_the_configuration_change_on_the_way(self, source, target):
        put(source, "config.json", '{"a": 1, "b": 2, "transformers_weights": "x.safetensors"}')
        copy_side_files(source, target, {"b": 3})
        assert json.loads((target / "config.json").read_text()) == {"a": 1, "b": 3}

    def test_a_reference_to_code_goes_where_the_code_is_not(self, source, target):
        put(source, "there.py")
        code = {"AutoConfig": "there.Config", "AutoModel": "gone.Model", "AutoTokenizer": ["hub/other--tok.A", None]}
        put(source, "config.json", json.dumps({"auto_map": code}))
        put(source, "tokenizer_config.json", json.dumps({"auto_map": {"AutoTokenizer": ["gone.A", None]}, "x": 1}))
        left = copy_side_files(source, target)
        kept = json.loads((target / "config.json").read_text())["auto_map"]
        assert kept == {name: value for name, value in code.items() if name != "AutoModel"}
        assert json.loads((target / "tokenizer_config.json").read_text()) == {"x": 1}
        assert left == [
            f"auto_map of {name} (the code is not there)" for name in ("config.json", "tokenizer_config.json")
        ]

    def test_a_name_that_is_no_unicode_is_copied_and_can_be_printed(self, source, target):
        for name in (b"a\xff.txt", b"b\xff.bin"):
            (source / os.fsdecode(name)).write_text("x")
        (left,) = copy_side_files(source, target)
        assert (target / os.fsdecode(b"a\xff.txt")).exists()
        left.encode()

    def test_many_names_make_a_short_sentence(self, source, target):
        for number in range(40):
            put(source, f"{number:02d}.bin")
        (sentence,) = in_words(copy_side_files(source, target))
        assert sentence.startswith("left behind: 00.bin (weights), ")
        assert sentence.endswith("and 32 more")
        assert in_words([]) == []

    def test_the_tokenizers_own_models_are_no_weights(self):
        assert not any(is_weight(name) for name in (*SIDE, "tokenizer.model", "tekken.json", "chat_template.jinja"))


@pytest.fixture
def model():
    made = LlamaForCausalLM(
        LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    )
    return made.to(torch.bfloat16)


def saved(model, target, tokenizer=None):
    with saved_side_files(model, model.config, tokenizer) as (directory, notes):
        copy_side_files(directory, target)
    return notes


class TestSaved:
    def test_it_is_what_save_pretrained_writes(self, model, target, tmp_path):
        model.generation_config.eos_token_id = [2, 7]
        before = model.config.to_dict()
        assert saved(model, target) == []
        assert model.config.to_dict() == before
        model.save_pretrained(tmp_path / "theirs")
        for name in ("config.json", "generation_config.json"):
            assert json.loads((target / name).read_text()) == json.loads((tmp_path / "theirs" / name).read_text())
        assert AutoConfig.from_pretrained(target).dtype == torch.bfloat16

    def test_a_tokenizer_is_saved_with_it(self, model, target, tokenizer):
        saved(model, target, tokenizer)
        assert {"tokenizer.json", "tokenizer_config.json"} <= listing(target)

    @pytest.mark.parametrize(
        ("settings", "kept", "said"),
        [
            (
                {"temperature": 0.6, "top_p": 0.9},
                {"temperature": 0.6, "top_p": 0.9, "do_sample": True},
                "do_sample is on",
            ),
            ({"top_k": 3, "early_stopping": True}, {"top_k": 3, "do_sample": True}, "early_stopping cannot be saved"),
            ({"num_return_sequences": 3, "eos_token_id": 5}, {"num_return_sequences": 3, "do_sample": True}, "on"),
            ({"streamer": "x", "eos_token_id": 5}, {"eos_token_id": 5}, "streamer cannot be saved"),
        ],
    )
    def test_generation_settings_that_cannot_be_saved_are_mended_and_said(self, settings, kept, said, model, target):
        for name, value in settings.items():
            setattr(model.generation_config, name, value)
        notes = saved(model, target)
        assert said in " ".join(notes)
        written = json.loads((target / "generation_config.json").read_text())
        assert {name: written.get(name) for name in kept} == kept
        GenerationConfig.from_pretrained(target).validate(strict=True)
        assert not model.generation_config.do_sample  # the user's own is as it was

    def test_generation_settings_in_the_configuration_move(self, model, target):
        model.config.num_beams = 4
        assert "num_beams of the configuration" in " ".join(saved(model, target))
        assert "num_beams" not in json.loads((target / "config.json").read_text())
        assert json.loads((target / "generation_config.json").read_text())["num_beams"] == 4

    def test_what_cannot_be_saved_is_said(self, model, target):
        class Tokenizer:
            def save_pretrained(self, directory):
                raise KeyError("merges")

        with pytest.raises(CheckpointError, match=r"tokenizer cannot be saved.*merges"):
            saved(model, target, Tokenizer())

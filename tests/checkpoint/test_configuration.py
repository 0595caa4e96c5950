import json
import os
import time

import pytest
from transformers import LlamaConfig

from fewbit.checkpoint.configuration import (
    LARGEST_CONFIG,
    load_config,
    quantization_of,
    read_config,
)
from fewbit.errors import ArchitectureError, CheckpointError, FewbitError

TINY = {
    "model_type": "llama", "vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2,
}  # fmt: skip


def write(directory, described):
    text = described if isinstance(described, str | bytes) else json.dumps(described)
    (directory / "config.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    return directory


def sentence(caught) -> str:
    text = str(caught.value)
    assert "\n" not in text
    assert "config.json" in text
    return text


def test_a_configuration_that_transformers_saved_is_read(tmp_path):
    LlamaConfig(**TINY).save_pretrained(tmp_path)
    assert load_config(tmp_path, 21).hidden_size == 32
    assert read_config(tmp_path)["model_type"] == "llama"


@pytest.mark.parametrize(
    "text",
    ["", "{", "[1]", "null", '"x"', "3", "[" * 100_000, '{"a": ' * 50_000, b"\xff\xfe{", f'{{"a": {"9" * 5000}}}'],
    ids=["empty", "cut", "list", "null", "string", "number", "brackets", "braces", "bytes", "digits"],
)  # fmt: skip
def test_what_is_no_json_object_is_named_as_damaged(text, tmp_path):
    with pytest.raises(CheckpointError, match="damaged") as caught:
        load_config(write(tmp_path, text))
    sentence(caught)


def test_no_config_is_named(tmp_path):
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        load_config(tmp_path)


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir, lambda path: os.symlink("nowhere", path)])
def test_what_is_no_regular_file_is_not_waited_for(make, tmp_path):
    make(tmp_path / "config.json")
    started = time.perf_counter()
    with pytest.raises(CheckpointError) as caught:
        load_config(tmp_path)
    sentence(caught)
    assert time.perf_counter() - started < 5


def test_a_file_without_end_is_not_read(tmp_path):
    with (tmp_path / "config.json").open("wb") as file:
        file.truncate(LARGEST_CONFIG + 1)
    with pytest.raises(CheckpointError, match=f"larger than {LARGEST_CONFIG // 2**20} MiB"):
        read_config(tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        {"num_hidden_layers": 10**6}, {"num_hidden_layers": 10**30}, {"num_hidden_layers": -1},
        {"num_hidden_layers": "2"}, {"num_hidden_layers": 2.0}, {"num_hidden_layers": True}, {"hidden_size": 0},
        {"hidden_size": 10**12}, {"vocab_size": "many"}, {"num_attention_heads": 10**7}, {"num_experts": 10**6},
        {"num_labels": 10**9}, {"text_config": {"num_hidden_layers": 10**7}}, {"num_decoder_layers": 10**5},
    ],
    ids=str,
)  # fmt: skip
def test_sizes_that_no_model_has_are_refused_by_name_at_once(change, tmp_path):
    started = time.perf_counter()
    with pytest.raises(CheckpointError) as caught:
        load_config(write(tmp_path, TINY | change), 21)
    key, value = next(iter(change.items()))
    assert (next(iter(value)) if isinstance(value, dict) else key) in sentence(caught)
    assert time.perf_counter() - started < 5


@pytest.mark.parametrize("key", [*TINY, "auto_map", "dtype", "rope_parameters", "layer_types", "tie_word_embeddings"])
@pytest.mark.parametrize("value", [[], {}, "x", -3, 1e300, [[]], {"a": 1}, True])
def test_fields_of_another_type_are_a_sentence_or_no_matter(key, value, tmp_path):
    said = ""
    try:
        load_config(write(tmp_path, TINY | {key: value}), 21)
    except FewbitError as error:
        said = str(error)
    assert "\n" not in said
    assert len(said) < 1000


def test_code_of_a_checkpoint_is_not_run_and_nothing_asks(tmp_path, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked on standard input"))
    (tmp_path / "own.py").write_text("raise SystemExit('ran')\n")
    code = {"auto_map": {"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.OwnModel"}}
    with pytest.raises(ArchitectureError, match=r"auto_map.*trust_remote_code=True.*give the loaded model"):
        load_config(write(tmp_path, TINY | code | {"model_type": "own"}))
    assert type(load_config(write(tmp_path, TINY | code))) is LlamaConfig


def test_a_quantization_config_that_is_none_is_damage(tmp_path):
    assert quantization_of({}, tmp_path) is None
    assert quantization_of({"quantization_config": {"quant_method": "awq"}}, tmp_path) == {"quant_method": "awq"}
    with pytest.raises(CheckpointError, match="quantization_config is no object"):
        quantization_of({"quantization_config": "awq"}, tmp_path)

"""What a model can be fed: its tokens, and the positions it has learned or was trained with."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import fewbit
from fewbit.errors import CalibrationError
from fewbit.models.limits import Positions, positions

SMALL = {"vocab_size": 99, "hidden_size": 32, "num_attention_heads": 2, "num_hidden_layers": 1}
GPT2 = {"vocab_size": 99, "n_embd": 32, "n_head": 2, "n_layer": 1, "n_positions": 64}
GPTJ = GPT2 | {"rotary_dim": 8}
OPT = SMALL | {"max_position_embeddings": 64, "word_embed_proj_dim": 32, "ffn_dim": 32}
ROTARY = SMALL | {"max_position_embeddings": 64, "intermediate_size": 32}


def model(kind, **fields):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **fields)).eval()


def rope(**fields):
    return {"rope_parameters": {"rope_theta": 1e4, **fields}}


KNOWN = [
    ("opt", OPT, 64, True),
    ("gpt2", GPT2, 64, True),
    ("gptj", GPTJ, 64, True),
    ("gpt_bigcode", GPT2, 64, True),
    ("llama", ROTARY, 64, False),
    ("gpt_neox", ROTARY, 64, False),
    ("llama", ROTARY | rope(rope_type="linear", factor=4.0), 256, False),
    ("llama", ROTARY | rope(rope_type="dynamic", factor=2.0), 128, False),
    ("llama", ROTARY | rope(rope_type="yarn", factor=4.0, original_max_position_embeddings=64), 256, False),
    ("llama", ROTARY | rope(rope_type="yarn", factor=2.0, original_max_position_embeddings=32), 64, False),
]


@pytest.mark.parametrize(("kind", "fields", "limit", "hard"), KNOWN)
def test_positions_are_those_of_the_tables_or_of_the_config(kind, fields, limit, hard):
    made = model(kind, **fields)
    assert positions(made, made.base_model_prefix) == Positions(limit, hard)
    if hard:  # and it is so: as many work, one more does not
        with torch.no_grad():
            made(torch.zeros(1, limit, dtype=torch.int64))
            with pytest.raises((IndexError, RuntimeError)):
                made(torch.zeros(1, limit + 1, dtype=torch.int64))


def test_a_model_with_alibi_has_no_limit():
    assert positions(model("bloom", vocab_size=99, hidden_size=32, n_head=2, n_layer=1), "transformer") is None


def test_positions_of_pictures_are_no_positions_of_text():
    made = model("llama", **ROTARY)
    made.vision_tower = torch.nn.ModuleDict({"position_embedding": torch.nn.Embedding(9, 4)})
    assert positions(made, "model") == Positions(64, hard=False)


def ids(length, batch=1):
    return torch.randint(0, 99, (batch, length), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def quantized(tmp_path):
    def run(made, data, **options):
        wanted = {
            "scheme": "W8A16",
            "group_size": 32,
            "algorithm": "rtn",
            "output": tmp_path / "run",
            "progress": False,
        }
        return fewbit.quantize(made, calibration=data, **wanted | options)

    return run


def test_more_than_the_learned_positions_is_refused_before_the_work(quantized, tmp_path):
    made = model("opt", **OPT)
    for call in (lambda: fewbit.evaluate(made, ids(65)), lambda: quantized(made, ids(65))):
        with pytest.raises(CalibrationError, match="65 tokens do not fit the 64 positions"):
            call()
    assert list(tmp_path.iterdir()) == []
    assert fewbit.evaluate(made, ids(64)).tokens == 63


def test_more_than_rotary_positions_were_trained_is_a_warning(quantized, caplog):
    made = model("llama", **ROTARY)
    words = "65 tokens are longer than the 64 positions"
    found = fewbit.evaluate(made, ids(65), against=made)
    assert len(found.warnings) == 1
    assert words in found.warnings[0]
    assert words in found.to_dict()["warnings"][0]
    assert words in caplog.text
    assert any(words in warning for warning in quantized(made, ids(65)).report["warnings"])
    assert fewbit.evaluate(made, ids(64)).warnings == ()


@pytest.mark.parametrize("wrong", [99, -100])
def test_tokens_that_the_model_does_not_have_are_refused_before_anything_is_written(quantized, tmp_path, wrong):
    made, data = model("llama", **ROTARY), ids(8, batch=2)
    data[1, 3] = wrong
    for call in (lambda: fewbit.evaluate(made, data), lambda: quantized(made, [data[:1], data])):
        with pytest.raises(CalibrationError, match=f"{wrong}.*the model has the tokens 0 to 98"):
            call()
    assert list(tmp_path.iterdir()) == []

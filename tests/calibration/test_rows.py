"""Rows to texts: `text` first, `messages` through the chat template, the number of a row that is neither."""

import contextlib
import copy
import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fewbit.calibration.rows import texts_of
from fewbit.calibration.tokens import calibration_set
from fewbit.errors import CalibrationError, FewbitError

TEMPLATE = "{{ bos_token }}{% for m in messages %}[{{ m.role }}] {{ m.content }}{% endfor %}"
CHAT = [{"role": "user", "content": "ba be"}, {"role": "assistant", "content": "bi"}]


@pytest.fixture(scope="module")
def chatty(tokenizer):
    made = copy.deepcopy(tokenizer)
    made.add_special_tokens({"bos_token": "<s>"})
    made.chat_template = TEMPLATE
    return made


def test_texts_and_conversations_in_their_order(chatty):
    rows = ["a", {"text": "b", "messages": CHAT}, {"messages": CHAT}, CHAT, {"text": None, "messages": CHAT}]
    rendered = "[user] ba be[assistant] bi"  # the windows themselves begin with what begins a text
    assert texts_of(rows, "rows", chatty) == ["a", "b", rendered, rendered, rendered]


def test_rows_that_hold_nothing_are_passed_over(chatty):
    assert texts_of([{"text": ""}, {"text": " \n"}, {"messages": []}, "", {"text": "a"}], "rows", chatty) == ["a"]


def test_messages_of_a_csv_are_json(chatty):
    assert texts_of([{"messages": json.dumps(CHAT)}], "rows", chatty) == ["[user] ba be[assistant] bi"]


BAD = {
    "null": ({"text": None}, "'text' is null"),
    "no messages": ({"messages": None}, "'messages' is null"),
    "number": ({"text": 5}, "is a number"),
    "list": ({"text": ["a"]}, "is a list"),
    "other columns": ({"conversations": [], "id": 3}, r"its columns: 'conversations', 'id'"),
    "prompt": ({"prompt": "a", "chosen": "b"}, r"'prompt', 'chosen'"),
    "one message": ({"role": "user", "content": "a"}, r"'role', 'content'"),
    "nothing": ({}, "its columns: none"),
    "a truth value": (True, "is a truth value"),
    "messages of texts": ({"messages": ["a"]}, "no list of messages"),
    "messages as a text": ({"messages": "a"}, "no JSON"),
    "half a character": ({"text": "a\ud800"}, r"U\+D800"),
    "half a character in a chat": ({"messages": [{"role": "user", "content": "\udfff"}]}, r"U\+DFFF"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_row_that_is_no_text_is_named_by_its_number(chatty, name):
    row, words = BAD[name]
    with pytest.raises(CalibrationError, match=words) as caught:
        texts_of([{"text": "a"}, row], "rows.jsonl", chatty)
    assert "row 2 of rows.jsonl" in str(caught.value)


def test_messages_need_a_chat_template_that_takes_them(tokenizer, chatty):
    with pytest.raises(CalibrationError, match="no chat template"):
        texts_of([{"messages": CHAT}], "rows", tokenizer)
    strict = copy.deepcopy(chatty)
    strict.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(CalibrationError, match=r"row 1 of rows: roles must alternate"):
        texts_of([{"messages": CHAT}], "rows", strict)


@settings(max_examples=150, deadline=None)
@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.just("\ud800"),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(st.sampled_from(["text", "messages", "role", "content", "input_ids", "x"]), inner)
        ),
        max_leaves=10,
    )
)
def test_whatever_a_row_is_there_are_sequences_or_a_sentence(chatty, row):
    with contextlib.suppress(FewbitError):  # nothing else
        assert calibration_set([row], chatty, 2, 4, seed=0).tokens > 0


# --- through calibration ------------------------------------------------------------------------------------------


def test_rows_are_packed_like_their_texts(text, tokenizer):
    sentences = text.split(". ")[:50]
    plain = calibration_set(sentences, tokenizer, 4, 16, seed=0)
    rows = calibration_set([{"text": sentence} for sentence in sentences], tokenizer, 4, 16, seed=0)
    assert rows.fingerprint() == plain.fingerprint()


def test_a_file_of_rows_is_calibrated_on_like_its_texts(text, tokenizer, tmp_path):
    sentences = text.split(". ")[:50]
    (tmp_path / "t.jsonl").write_text("\n".join(json.dumps({"text": sentence, "id": 1}) for sentence in sentences))
    rows = calibration_set(tmp_path / "t.jsonl", tokenizer, 4, 16, seed=0)
    assert rows.fingerprint() == calibration_set(sentences, tokenizer, 4, 16, seed=0).fingerprint()
    assert rows.source == "t.jsonl"


def test_rows_of_ids_are_batches_as_a_tokenized_dataset_has_them(tmp_path):
    rows = [{"input_ids": [1, 2, 3], "attention_mask": [1, 1, 1], "labels": [1, 2, 3], "text": "a"}] * 2
    (tmp_path / "ids.jsonl").write_text("\n".join(map(json.dumps, rows)))
    for data in (rows, tmp_path / "ids.jsonl", np.array([[1, 2, 3]] * 2), [np.array([1, 2, 3])] * 2):
        made = calibration_set(data, None, 8, 3, seed=0)
        assert torch.cat([batch["input_ids"] for batch in made.batches]).tolist() == [[1, 2, 3]] * 2


def test_texts_and_ids_are_not_mixed(tokenizer):
    with pytest.raises(CalibrationError, match="row 2 of given rows holds text and the first row does not"):
        calibration_set([{"input_ids": [1, 2]}, {"text": "a"}], tokenizer, 8, 3, seed=0)


@pytest.mark.parametrize("ids", [[10**30], [1.5, 2.5], [True, False], ["a"], [[1], [2, 3]], "abc"])
def test_ids_that_are_none_are_refused(ids):
    with pytest.raises(CalibrationError):
        calibration_set([{"input_ids": ids}], None, 8, 3, seed=0)


def test_a_tokenizer_is_loaded_only_for_text(tokenizer):
    def broken():
        raise CalibrationError("broken")

    assert calibration_set([[1, 2, 3]], None, 1, 3, 0, broken).sequences == 1
    assert calibration_set(["ba be bi " * 9], None, 1, 3, 0, lambda: tokenizer).sequences == 1
    with pytest.raises(CalibrationError, match="broken"):
        calibration_set(["ba"], None, 1, 3, 0, broken)


@pytest.mark.parametrize("wrong", ["gpt2", 5, object()])
def test_what_is_no_tokenizer_is_refused(wrong):
    with pytest.raises(CalibrationError, match="must be one of transformers'"):
        calibration_set(["ba"], wrong, 1, 3, 0)


def test_a_tokenizer_that_fails_says_so_in_a_sentence(tokenizer):
    class Damaged:
        eos_token_id = bos_token_id = None

        def __call__(self, *arguments, **options):
            raise KeyError("unk")

    with pytest.raises(CalibrationError, match=r"cannot encode the text \(texts\): KeyError"):
        calibration_set(["ba"], Damaged(), 1, 3, 0)

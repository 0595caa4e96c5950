"""From text or token ids to calibration batches."""

import copy

import pytest
import torch
from tokenizers.processors import TemplateProcessing

from fewbit.calibration.tokens import (
    begin_with,
    beginning,
    calibration_set,
    choose_windows,
    padding_mask,
    tokenize,
)
from fewbit.errors import CalibrationError

LENGTH = 16


@pytest.fixture(scope="module")
def short_texts(text):
    """Texts far shorter than a sequence."""
    return [sentence + "." for sentence in text.split(". ")[:60]]


def ids_of(data):
    return torch.cat([batch["input_ids"].flatten() for batch in data.batches])


def test_short_texts_are_packed_into_full_sequences(short_texts, tokenizer):
    assert max(len(tokenizer(text).input_ids) for text in short_texts) < 128
    data = calibration_set(short_texts, tokenizer, num_samples=4, sequence_length=128, seed=0)
    assert [batch["input_ids"].shape[1] for batch in data.batches] == [128] * len(data.batches)
    assert data.sequences == 4
    assert data.tokens == 4 * 128
    assert all(padding_mask(batch) is None for batch in data.batches)


@pytest.mark.parametrize("rest", [0, 1, 2, 57])
def test_no_token_is_dropped_when_text_is_scarce(short_texts, tokenizer, rest):
    stream = tokenize(short_texts, tokenizer)
    length = next(n for n in range(max(60, rest + 1), stream.numel()) if stream.numel() % n == rest)
    data = calibration_set(short_texts, tokenizer, num_samples=10_000, sequence_length=length, seed=0)
    assert torch.equal(ids_of(data), stream)
    assert data.tokens == stream.numel()
    assert data.requested == 10_000


def test_texts_are_separated_by_the_end_of_text_token(tokenizer):
    stream = tokenize(["one two", "three"], tokenizer).tolist()
    separator = stream.index(tokenizer.eos_token_id)
    assert tokenizer.decode(stream[:separator]) == "one two"
    assert tokenizer.decode(stream[separator + 1 :]) == "three"
    assert stream.count(tokenizer.eos_token_id) == 1


def test_a_tokenizer_without_end_of_text_joins_the_texts(short_texts, tokenizer):
    stream = tokenize(short_texts, tokenizer)
    without = copy.deepcopy(tokenizer)
    without.eos_token = None
    assert torch.equal(tokenize(short_texts, without), stream[stream != tokenizer.eos_token_id])


def test_windows_are_disjoint_pieces_of_the_stream_in_its_order():
    stream = torch.arange(1000)
    windows = choose_windows(stream, 7, LENGTH, seed=3)
    assert windows.shape == (7, LENGTH)
    starts = windows[:, 0]
    assert torch.equal(starts, starts.sort().values)
    assert bool((starts % LENGTH == 0).all())
    assert torch.equal(windows, starts[:, None] + torch.arange(LENGTH))
    assert windows.unique().numel() == windows.numel()


def test_the_seed_determines_the_choice():
    stream = torch.arange(5000)
    first, again = (choose_windows(stream, 8, LENGTH, seed=1) for _ in range(2))
    assert torch.equal(first, again)
    assert not torch.equal(first, choose_windows(stream, 8, LENGTH, seed=2))


def test_the_choice_does_not_touch_the_global_generator():
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    choose_windows(torch.arange(5000), 8, LENGTH, seed=1)
    assert torch.equal(torch.rand(1), expected)


def test_batches_keep_every_chosen_sequence(text, tokenizer):
    stream = tokenize([text], tokenizer)
    data = calibration_set([text], tokenizer, num_samples=100, sequence_length=LENGTH, seed=0)
    chosen = choose_windows(stream, 100, LENGTH, seed=0)
    assert torch.equal(ids_of(data).view(-1, LENGTH), chosen)
    assert data.sequences == 100


def test_the_shipped_text_is_the_default(tokenizer):
    data = calibration_set(None, tokenizer, num_samples=2, sequence_length=64, seed=0)
    assert data.sequences == 2
    assert "WikiText-2" in data.source


def test_a_text_file_gives_the_same_as_its_text(calibration_file, tokenizer):
    from_file = calibration_set(calibration_file, tokenizer, 4, LENGTH, seed=0)
    from_name = calibration_set(str(calibration_file), tokenizer, 4, LENGTH, seed=0)
    from_text = calibration_set([calibration_file.read_text(encoding="utf-8")], tokenizer, 4, LENGTH, seed=0)
    assert from_file.fingerprint() == from_name.fingerprint() == from_text.fingerprint()
    assert from_file.source == "calibration.txt"


def test_text_of_exactly_one_sequence_is_enough(tokenizer):
    words = "ba " * 50
    count = tokenize([words], tokenizer).numel()
    assert calibration_set([words], tokenizer, 4, count, seed=0).sequences == 1


@pytest.mark.parametrize("texts", [["too short"], []])
def test_text_shorter_than_a_sequence_is_refused_with_both_numbers(texts, tokenizer):
    count = tokenize(texts, tokenizer).numel()
    with pytest.raises(CalibrationError, match=rf"has {count} tokens, less than one sequence of 512"):
        calibration_set(texts, tokenizer, 4, 512, seed=0)


@pytest.mark.parametrize("content", ["", " \n\t\n"])
def test_an_empty_file_is_refused_by_name(content, tokenizer, tmp_path):
    file = tmp_path / "nothing.txt"
    file.write_text(content)
    with pytest.raises(CalibrationError, match=r"nothing\.txt is empty"):
        calibration_set(file, tokenizer, 4, LENGTH, seed=0)


def test_a_missing_file_is_refused_by_name(tokenizer, tmp_path):
    with pytest.raises(CalibrationError, match=r"absent\.txt does not exist"):
        calibration_set(tmp_path / "absent.txt", tokenizer, 4, LENGTH, seed=0)


def test_a_directory_is_no_text(tokenizer, tmp_path):
    with pytest.raises(CalibrationError, match="is a directory, not a regular file; give a file"):
        calibration_set(tmp_path, tokenizer, 4, LENGTH, seed=0)


def test_text_that_is_not_utf8_is_refused(tokenizer, tmp_path):
    file = tmp_path / "latin1.txt"
    file.write_bytes("überall größer ".encode("latin-1") * 100)
    with pytest.raises(CalibrationError, match=r"latin1\.txt is not UTF-8"):
        calibration_set(file, tokenizer, 4, LENGTH, seed=0)


def test_text_without_a_tokenizer_is_refused():
    with pytest.raises(CalibrationError, match="needs a tokenizer"):
        calibration_set(["some text"], None, 4, LENGTH, seed=0)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_token_ids_are_taken_as_they_are_without_a_tokenizer(dtype):
    ids = torch.arange(300, dtype=dtype).view(10, 30)
    data = calibration_set(ids, None, num_samples=2, sequence_length=5, seed=0)
    assert torch.equal(ids_of(data), ids.flatten().long())
    assert {batch["input_ids"].dtype for batch in data.batches} == {torch.int64}
    assert (data.sequences, data.tokens, data.requested) == (10, 300, 10)


@pytest.mark.parametrize("ids", [torch.arange(5), torch.zeros(2, 3), torch.zeros(0, 8, dtype=torch.int64)])
def test_token_ids_of_another_form_are_refused(ids):
    with pytest.raises(CalibrationError, match=r"integers \[sequences, tokens\]"):
        calibration_set(ids, None, 2, 5, seed=0)


def masked_batches():
    mask = torch.ones(2, 6, dtype=torch.int64)
    mask[1, :4] = 0
    return [
        {"input_ids": torch.arange(12).view(2, 6), "attention_mask": mask},
        {"input_ids": torch.arange(5).view(1, 5)},
    ]


def test_batches_with_masks_count_only_what_is_no_padding():
    data = calibration_set(masked_batches(), None, 1, 1, seed=0)
    assert data.sequences == 3
    assert data.tokens == 6 + 2 + 5
    assert padding_mask(data.batches[0]).dtype == torch.bool
    assert padding_mask(data.batches[1]) is None


def test_the_fingerprint_is_that_of_the_content():
    assert (
        calibration_set(masked_batches(), None, 1, 1, 0).fingerprint()
        == calibration_set(masked_batches(), None, 9, 9, 9).fingerprint()
    )


@pytest.mark.parametrize(
    "change",
    [
        lambda batches: batches[1]["input_ids"].add_(1),
        lambda batches: batches[0]["attention_mask"].fill_(1),
        lambda batches: batches[0].pop("attention_mask"),
        lambda batches: batches.reverse(),
        lambda batches: batches[0].update({name: ids.view(3, 4) for name, ids in batches[0].items()}),
    ],
    ids=["a token", "the mask", "no mask", "the order", "the shape"],
)
def test_the_fingerprint_changes_with(change):
    before = calibration_set(masked_batches(), None, 1, 1, 0).fingerprint()
    changed = masked_batches()
    change(changed)
    assert calibration_set(changed, None, 1, 1, 0).fingerprint() != before


def test_another_seed_changes_the_fingerprint(text, tokenizer):
    first, other = (calibration_set([text], tokenizer, 4, LENGTH, seed) for seed in (0, 1))
    assert first.fingerprint() != other.fingerprint()


# --- families that begin every text with a token of its own ---------------------------------------------------------


@pytest.fixture(scope="module")
def beginner(tokenizer):
    """A tokenizer that puts <s> before a text, as those of Gemma and Llama 3 do."""
    made = copy.deepcopy(tokenizer)
    made.add_special_tokens({"bos_token": "<s>"})
    special = [("<s>", made.convert_tokens_to_ids("<s>"))]
    made.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=special)
    return made


def test_a_tokenizer_that_begins_texts_itself_says_so(tokenizer, beginner):
    assert beginning(tokenizer).tolist() == []
    assert beginning(beginner).tolist() == [beginner.bos_token_id]
    unused = copy.deepcopy(tokenizer)
    unused.add_special_tokens({"bos_token": "<s>"})  # it has one, and puts it nowhere
    assert beginning(unused).tolist() == []


def test_the_stream_itself_holds_no_beginnings(short_texts, tokenizer, beginner):
    assert torch.equal(tokenize(short_texts, beginner), tokenize(short_texts, tokenizer))


def test_every_sequence_begins_as_texts_do_and_has_the_length_that_was_asked_for(text, beginner):
    data = calibration_set([text], beginner, num_samples=20, sequence_length=LENGTH, seed=0)
    rows = ids_of(data).view(-1, LENGTH)
    assert rows.shape == (20, LENGTH)
    assert set(rows[:, 0].tolist()) == {beginner.bos_token_id}
    assert torch.equal(rows[:, 1:], choose_windows(tokenize([text], beginner), 20, LENGTH - 1, seed=0))
    assert beginner.bos_token_id not in rows[:, 1:]


@pytest.mark.parametrize("length", [50, 61, 128])
def test_what_is_left_of_a_scarce_text_begins_so_too(short_texts, beginner, length):
    stream = tokenize(short_texts, beginner)
    data = calibration_set(short_texts, beginner, num_samples=10_000, sequence_length=length, seed=0)
    assert all(bool((batch["input_ids"][:, 0] == beginner.bos_token_id).all()) for batch in data.batches)
    assert torch.equal(torch.cat([batch["input_ids"][:, 1:].flatten() for batch in data.batches]), stream)


def test_a_text_that_fills_a_sequence_with_its_beginning_is_enough(beginner):
    count = tokenize(["ba " * 50], beginner).numel()
    assert calibration_set(["ba " * 50], beginner, 4, count + 1, seed=0).sequences == 1
    with pytest.raises(CalibrationError, match="less than one sequence"):
        calibration_set(["ba " * 50], beginner, 4, count + 2, seed=0)


def test_token_ids_are_not_begun_for_the_user(beginner):
    ids = torch.arange(60).view(2, 30)
    assert torch.equal(ids_of(calibration_set(ids, beginner, 2, 30, seed=0)), ids.flatten())


def test_nothing_before_windows_leaves_them():
    windows = torch.arange(6).view(2, 3)
    assert begin_with(torch.tensor([], dtype=torch.int64), windows) is windows
    assert begin_with(torch.tensor([9, 8]), windows).tolist() == [[9, 8, 0, 1, 2], [9, 8, 3, 4, 5]]


def test_masks_that_leave_everything_out_are_refused():
    ids = torch.ones(2, LENGTH, dtype=torch.int64)
    empty = {"input_ids": ids, "attention_mask": torch.zeros_like(ids)}
    with pytest.raises(CalibrationError, match="leave every token out"):
        calibration_set([empty, empty], None, num_samples=1, sequence_length=LENGTH, seed=0)
    assert calibration_set([empty, {"input_ids": ids}], None, num_samples=1, sequence_length=LENGTH, seed=0)


@pytest.mark.parametrize(
    "items",
    [
        [torch.arange(24).view(2, 12), torch.arange(12).view(1, 12)],
        [list(range(12)), list(range(12, 24)), torch.arange(12)],
        ({"input_ids": list(row)} for row in (range(12), range(12, 24), range(12))),
        [(torch.arange(24).view(2, 12), "label"), [torch.arange(12).view(1, 12)]],
    ],
    ids=["tensors", "lists", "generator of tables", "tuples"],
)
def test_ids_as_dataloaders_give_them_are_ids(items):
    made = calibration_set(items, None, 8, 12, 0)
    rows = torch.cat([batch["input_ids"] for batch in made.batches])
    assert torch.equal(rows, torch.arange(24).view(2, 12)[[0, 1, 0]])
    assert made.source == "batches"


def test_one_table_is_one_batch():
    made = calibration_set({"input_ids": torch.ones(2, 4, dtype=torch.int64)}, None, 8, 4, 0)
    assert made.sequences == 2


@pytest.mark.parametrize(
    "items", [[5, 6, 7], ["a text", torch.ones(1, 4, dtype=torch.int64)], [[[1, 2], [3]]], [None]]
)
def test_what_is_neither_text_nor_ids_is_refused(items):
    with pytest.raises(CalibrationError, match="batch"):
        calibration_set(items, None, 8, 4, 0)

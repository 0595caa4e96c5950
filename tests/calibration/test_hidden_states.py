"""Hidden states between blocks: the same values wherever they are kept, and no more memory than allowed."""

import pytest
import torch

from fewbit.calibration.hidden_states import HiddenStates, check_finite
from fewbit.errors import CalibrationError

SHAPES = [(2, 8, 16), (1, 5, 16), (3, 8, 16), (2, 8, 16)]
BYTES = [4 * 2 * 8 * 16, 4 * 5 * 16, 4 * 3 * 8 * 16, 4 * 2 * 8 * 16]


def tensors(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for shape in SHAPES]


def filled(budget, directory, seed=0):
    states = HiddenStates(budget, directory)
    for index, tensor in enumerate(tensors(seed)):
        states.put(index, tensor)
    return states


def on_disk(directory):
    return sum(file.stat().st_size for file in directory.iterdir()) if directory.exists() else 0


@pytest.mark.parametrize("budget", [0, 1, BYTES[0], BYTES[0] + BYTES[1], sum(BYTES) - 1, sum(BYTES), 10**9])
def test_the_budget_is_respected_and_the_rest_is_on_disk(tmp_path, budget):
    states = filled(budget, tmp_path / "work")
    assert states.bytes_in_memory <= budget
    assert states.bytes_in_memory + on_disk(tmp_path / "work") == sum(BYTES)
    assert len(states) == len(SHAPES)


def test_a_batch_that_no_longer_fits_does_not_keep_a_smaller_one_out(tmp_path):
    filled(BYTES[0] + BYTES[1] + BYTES[3], tmp_path / "work")
    assert on_disk(tmp_path / "work") == BYTES[2]


@pytest.mark.parametrize("budget", [0, BYTES[0], sum(BYTES)])
def test_values_are_the_same_in_memory_and_on_disk(tmp_path, budget):
    states = filled(budget, tmp_path / "work")
    for index, tensor in enumerate(tensors()):
        assert torch.equal(states.get(index), tensor)


@pytest.mark.parametrize("budget", [0, BYTES[0], sum(BYTES)])
def test_a_batch_is_replaced_where_it_is(tmp_path, budget):
    states = filled(budget, tmp_path / "work")
    before = states.bytes_in_memory, on_disk(tmp_path / "work")
    for index, tensor in enumerate(tensors(seed=1)):
        states.put(index, tensor)
    assert (states.bytes_in_memory, on_disk(tmp_path / "work")) == before
    for index, tensor in enumerate(tensors(seed=1)):
        assert torch.equal(states.get(index), tensor)


@pytest.mark.parametrize("budget", [0, 10**9])
def test_any_dtype_and_layout_is_kept_as_contiguous_float32(tmp_path, budget):
    states = HiddenStates(budget, tmp_path / "work")
    given = tensors()[0].to(torch.bfloat16).transpose(0, 1)
    states.put(0, given)
    assert torch.equal(states.get(0), given.float())
    assert states.get(0).is_contiguous()


@pytest.mark.parametrize("budget", [0, BYTES[0], sum(BYTES)])
def test_close_forgets_everything_and_removes_the_files(tmp_path, budget):
    states = filled(budget, tmp_path / "work")
    states.close()
    assert len(states) == 0
    assert not (tmp_path / "work").exists()
    assert tmp_path.exists()


def test_no_directory_is_made_while_memory_suffices(tmp_path):
    filled(sum(BYTES), tmp_path / "work")
    assert not (tmp_path / "work").exists()


def test_files_left_by_a_run_that_died_are_overwritten(tmp_path):
    filled(0, tmp_path / "work", seed=7)  # never closed
    states = filled(0, tmp_path / "work")
    for index, tensor in enumerate(tensors()):
        assert torch.equal(states.get(index), tensor)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_states_that_are_no_numbers_are_an_error_that_names_the_sequence_and_the_token(value):
    hidden = torch.zeros(2, 5, 4)
    check_finite(hidden, "it", 7)
    hidden[1, 3, 2] = value
    with pytest.raises(CalibrationError, match=r"it gives NaN or infinity \(first for token 3 of sequence 8\)"):
        check_finite(hidden, "it", 7)
    padding = torch.ones(2, 5, dtype=torch.bool)
    padding[1, 3] = False
    check_finite(hidden, "it", 7, padding)  # nobody reads what comes out of padding


def test_what_was_put_may_change_afterwards(tmp_path):
    states, hidden = HiddenStates(10**6, tmp_path), torch.ones(1, 2, 3)
    states.put(0, hidden)
    hidden.zero_()
    assert states.get(0).sum() == 6

"""Hidden states and what blocks are called with: the same values wherever they are kept, within one budget."""

import pytest
import torch
from safetensors.torch import load_file

import fewbit
from fewbit.calibration.hidden_states import HiddenStates, RecordedCalls, check_finite
from fewbit.errors import CalibrationError
from fewbit.models.blockwise import BlockwiseModel

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


def calls_of(seed):
    """Three blocks that share one mask and a tuple, as models give them."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(1, 1, 9, 9, generator=generator) > 0.5
    rotary = (torch.randn(1, 9, 4, generator=generator), torch.randn(1, 9, 4, generator=generator))
    return [{"attention_mask": mask, "position_embeddings": rotary, "use_cache": False, "nothing": None}] * 3


SIZE = 81 + 2 * 4 * 36


def calls_on_disk(directory):
    return sum(tensor.nbytes for file in directory.glob("*") for tensor in load_file(file).values())


@pytest.mark.parametrize("budget", [0, SIZE, 2 * SIZE, 10**6])
def test_calls_are_the_same_in_memory_and_calls_on_disk(tmp_path, budget):
    states = HiddenStates(budget, tmp_path / "states")
    recorded = RecordedCalls(states, tmp_path / "calls")
    for seed in range(3):
        recorded.append(calls_of(seed), padded=True)
    assert states.bytes_in_memory <= budget
    assert states.bytes_in_memory + calls_on_disk(tmp_path / "calls") == 3 * SIZE
    for seed in range(3):
        for block, expected in enumerate(calls_of(seed)):
            found = recorded.get(seed, block)
            assert torch.equal(found["attention_mask"], expected["attention_mask"])
            assert all(map(torch.equal, found["position_embeddings"], expected["position_embeddings"]))
            assert (found["use_cache"], found["nothing"]) == (False, None)


def test_what_batches_share_is_counted_once_and_stays_in_memory(tmp_path):
    states, shared = HiddenStates(SIZE, tmp_path / "states"), calls_of(0)
    recorded = RecordedCalls(states, tmp_path / "calls")
    for _ in range(5):
        recorded.append(shared, padded=False)
    assert (states.bytes_in_memory, calls_on_disk(tmp_path / "calls")) == (SIZE, 0)
    tight = RecordedCalls(HiddenStates(0, tmp_path), tmp_path / "calls")
    tight.append(shared, padded=False)
    assert tight.get(0, 0) is shared[0]


def padded(rows=6, length=24):
    ids = torch.randint(1, 300, (rows, length), generator=torch.Generator().manual_seed(0))
    batches = []
    for row in range(rows):
        mask = torch.ones(1, length, dtype=torch.int64)
        mask[0, : 2 * row] = 0
        batches.append({"input_ids": ids[row : row + 1], "attention_mask": mask})
    return batches


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_masks_on_disk_give_the_same_bytes(checkpoint, quick, files_of, tmp_path, family):
    arguments = quick | {"calibration": padded(), "algorithm": "gptq"}
    runs = [
        fewbit.quantize(checkpoint(family), output=tmp_path / str(memory), activation_memory=memory, **arguments)
        for memory in (0, "4GiB")
    ]
    assert [run.report["run"]["forward"] for run in runs] == ["replay", "staged"]
    assert files_of(runs[0].directory) == files_of(runs[1].directory)


def test_masks_of_padded_batches_decide_whether_forwards_can_wait(checkpoint, quick, tmp_path):
    ids = torch.randint(1, 300, (1, 200), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, 0] = 0
    plain, masked = [{"input_ids": ids}] * 4, [{"input_ids": ids, "attention_mask": mask}] * 4
    forwards = []
    for name, data in (("plain", plain), ("masked", masked)):
        memory = 4 * 200 * 4 * (3 * 64 + 128) + 4 * 200 * 200 - 1  # one byte less than with the masks
        run = fewbit.quantize(
            checkpoint("llama"), output=tmp_path / name, activation_memory=memory, **quick | {"calibration": data}
        )
        forwards.append(run.report["run"]["forward"])
    assert forwards == ["staged", "replay"]


def test_a_mask_that_leaves_nothing_out_is_shared(random_model):
    model, ids = BlockwiseModel.from_module(random_model("llama")), torch.ones(2, 8, dtype=torch.int64)
    whole, other = torch.ones_like(ids), torch.ones_like(ids)
    other[0, 0] = 0
    batches = [{"input_ids": ids, "attention_mask": mask} for mask in (whole, whole.clone(), other, other.clone())]
    calls = [inputs.calls for inputs in model.enter(batches)]
    assert calls[0] is calls[1]
    assert len({id(each) for each in calls}) == 3

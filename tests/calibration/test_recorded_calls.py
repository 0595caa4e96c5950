"""What blocks are called with: the same values wherever they are kept, and within the budget of the hidden states."""

import pytest
import torch
from safetensors.torch import load_file

import fewbit
from fewbit.calibration.hidden_states import HiddenStates, RecordedCalls
from fewbit.models.blockwise import BlockwiseModel


def calls_of(seed):
    """Three blocks that share one mask and a tuple, as models give them."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(1, 1, 9, 9, generator=generator) > 0.5
    rotary = (torch.randn(1, 9, 4, generator=generator), torch.randn(1, 9, 4, generator=generator))
    return [{"attention_mask": mask, "position_embeddings": rotary, "use_cache": False, "nothing": None}] * 3


SIZE = 81 + 2 * 4 * 36


def on_disk(directory):
    return sum(tensor.nbytes for file in directory.glob("*") for tensor in load_file(file).values())


@pytest.mark.parametrize("budget", [0, SIZE, 2 * SIZE, 10**6])
def test_calls_are_the_same_in_memory_and_on_disk(tmp_path, budget):
    states = HiddenStates(budget, tmp_path / "states")
    recorded = RecordedCalls(states, tmp_path / "calls")
    for seed in range(3):
        recorded.append(calls_of(seed), padded=True)
    assert states.bytes_in_memory <= budget
    assert states.bytes_in_memory + on_disk(tmp_path / "calls") == 3 * SIZE
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
    assert (states.bytes_in_memory, on_disk(tmp_path / "calls")) == (SIZE, 0)
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

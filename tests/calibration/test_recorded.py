"""Prefill and decode steps, joined, are what the whole sequence would have been; the choice depends on the seed."""

import os
import pickle

import pytest
import torch
from torch.utils.data import DataLoader
from transformers import ViTConfig, ViTModel

from fewbit.calibration.recorded import (
    DefaultDataset,
    build_calib_dataset_inputs,
    read_recording,
    write_recording,
)
from fewbit.calibration.recorder import DataRecorder
from fewbit.errors import CalibrationError, CheckpointError, ConfigError

BATCH, PROMPT, NEW = 2, 9, 5
TOKENS = PROMPT + NEW - 1
CHANNELS, HEAD = 64, 16


@pytest.fixture(scope="module")
def model(random_model):
    return random_model("llama")


def prompt(tokens=PROMPT, batch=BATCH, seed=0):
    return torch.randint(1, 300, (batch, tokens), generator=torch.Generator().manual_seed(seed))


def generate(model, ids, new=NEW, **options):
    return model.generate(ids, max_new_tokens=new, do_sample=False, eos_token_id=None, **options)


def recorded(model, *runs):
    with DataRecorder(model) as recorder, torch.no_grad():
        for run in runs:
            run()
    return recorder


def sequence(seed, tokens=4, steps=1):
    """A recording without positions."""
    torch.manual_seed(seed)
    inputs = [torch.randn(1, tokens, 8)] + [torch.randn(1, 1, 8) for _ in range(steps - 1)]
    return {"model_input": inputs}


def test_generated_tokens_are_joined_to_their_prompt(model):
    recorder = recorded(model, lambda: generate(model, prompt()))
    (item,) = build_calib_dataset_inputs([recorder.recorded])
    assert item["input_tensor"].shape == (BATCH, TOKENS, CHANNELS)
    assert item["kwargs"]["position_ids"].shape == (BATCH, TOKENS)
    assert [part.shape for part in item["kwargs"]["position_embeddings"]] == [(BATCH, TOKENS, HEAD)] * 2
    assert item["input_ids"].shape == (BATCH, TOKENS)
    assert set(item["kwargs"]) == {"position_ids", "position_embeddings"}


def test_joined_steps_are_what_one_forward_of_the_whole_sequence_gives(model):
    produced = generate(model, prompt())[:, :-1]
    by_steps = recorded(model, lambda: generate(model, prompt()))
    at_once = recorded(model, lambda: model(produced))
    (item,), (whole,) = (build_calib_dataset_inputs([r.recorded]) for r in (by_steps, at_once))
    assert torch.equal(item["input_ids"], produced)
    assert torch.equal(item["input_tensor"], whole["input_tensor"])
    assert torch.equal(
        item["kwargs"]["position_ids"], whole["kwargs"]["position_ids"]
    )  # one row, for each of the batch
    for part, expected in zip(*(x["kwargs"]["position_embeddings"] for x in (item, whole)), strict=True):
        assert torch.equal(part, expected)


def test_a_vision_transformer_has_inputs_without_arguments():
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, image_size=12, patch_size=4
    )
    vit = ViTModel(config).eval()
    recorder = recorded(vit, lambda: vit(torch.randn(3, 3, 12, 12)), lambda: vit(torch.randn(1, 3, 12, 12)))
    items = build_calib_dataset_inputs([recorder.recorded])
    assert [item["input_tensor"].shape for item in items] == [(3, 10, 32), (1, 10, 32)]
    assert all(item["kwargs"] == {} for item in items)


def test_several_sequences_in_one_recording_are_told_apart(model):
    recorder = recorded(
        model,
        lambda: generate(model, prompt()),
        lambda: generate(model, prompt(1, seed=1), new=3),  # a prompt of one token is no decode step
        lambda: model(prompt(7)),
        lambda: model(prompt(7)),
        lambda: generate(model, prompt(5, batch=1)),
    )
    items = build_calib_dataset_inputs([recorder.recorded])
    assert [tuple(item["input_ids"].shape) for item in items] == [(2, TOKENS), (2, 3), (2, 7), (2, 7), (1, 9)]
    assert torch.equal(items[1]["input_ids"][:, :1], prompt(1, seed=1))


def test_without_positions_a_single_token_continues_the_sequence():
    both = {"model_input": sequence(0, 4, 3)["model_input"] + sequence(1, 2, 2)["model_input"]}
    items = build_calib_dataset_inputs([both])
    assert [item["input_tensor"].shape[1] for item in items] == [6, 3]
    assert torch.equal(items[1]["input_tensor"], torch.cat(both["model_input"][3:], 1))


def test_inputs_without_a_token_axis_stand_alone():
    items = build_calib_dataset_inputs([{"model_input": [torch.randn(3, 8), torch.randn(1, 8)]}])
    assert [tuple(item["input_tensor"].shape) for item in items] == [(3, 8), (1, 8)]


def test_padding_is_handed_on(model):
    ids, mask = prompt(), torch.ones(BATCH, PROMPT, dtype=torch.int64)
    mask[0, :4] = 0
    recorder = recorded(
        model, lambda: generate(model, ids, attention_mask=mask), lambda: model(ids, attention_mask=mask)
    )
    generated, evaluated = build_calib_dataset_inputs([recorder.recorded])
    expected = torch.cat([mask, torch.ones(BATCH, NEW - 1, dtype=torch.int64)], 1).bool()
    assert torch.equal(generated["kwargs"]["attention_mask"], expected)
    assert torch.equal(evaluated["kwargs"]["attention_mask"], mask.bool())


def test_directory_files_and_memory_give_the_same(model, tmp_path):
    recordings = []
    with DataRecorder(model) as recorder:
        for seed in range(3):
            generate(model, prompt(seed=seed))
            recorder.save_inputs(tmp_path)
            recordings.append({key: list(steps) for key, steps in recorder.recorded.items()})
            recorder.clear_inputs()
    (tmp_path / "notes.txt").write_text("no recording")
    files = sorted(tmp_path.glob("*.safetensors"))
    ways = [build_calib_dataset_inputs(source) for source in (tmp_path, [str(file) for file in files], recordings)]
    assert [len(items) for items in ways] == [3, 3, 3]
    for same in zip(*ways, strict=True):
        assert torch.equal(same[0]["input_tensor"], same[1]["input_tensor"])
        assert torch.equal(same[0]["input_tensor"], same[2]["input_tensor"])
    assert len(build_calib_dataset_inputs(files[0])) == 1


def test_the_choice_depends_on_the_seed_only(tmp_path):
    for number in range(12):
        write_recording(sequence(number), tmp_path / f"{number:02d}.safetensors")
    everything = build_calib_dataset_inputs(tmp_path)

    def chosen(count, seed):
        items = build_calib_dataset_inputs(tmp_path, count, seed)
        found = [
            next(n for n, other in enumerate(everything) if torch.equal(other["input_tensor"], item["input_tensor"]))
            for item in items
        ]
        assert found == sorted(set(found))  # each at most once, in the order of the files
        return found

    assert chosen(5, 0) == chosen(5, 0)
    assert len(chosen(5, 0)) == 5
    assert len({tuple(chosen(5, seed)) for seed in range(5)}) > 1
    assert chosen(12, 3) == chosen(99, 3) == list(range(12))


def test_a_data_loader_takes_the_dataset(tmp_path):
    for number in range(3):
        write_recording(sequence(number), tmp_path / f"{number}.safetensors")
    dataset = DefaultDataset(tmp_path)
    loaded = list(DataLoader(dataset, batch_size=None, shuffle=False))
    assert len(loaded) == len(dataset) == 3
    assert torch.equal(loaded[2]["input_tensor"], dataset[2]["input_tensor"])


def test_inputs_of_a_linear_or_of_another_block_are_items_too(model):
    recorder = DataRecorder(model)
    recorder.register_input_hooks(["model.layers.0", "model.layers.1"])
    recorder.register_pos_embed_hooks(["model.layers.1"])
    recorder.register_linear_input_hooks("model.layers.0.mlp")
    generate(model, prompt())
    (block,) = build_calib_dataset_inputs([recorder.recorded], key="model_input.model.layers.1")
    assert block["kwargs"]["position_ids"].shape == (BATCH, TOKENS)
    (linear,) = build_calib_dataset_inputs([recorder.recorded], key="linear_input.model.layers.0.mlp.down_proj")
    assert linear["input_tensor"].shape == (BATCH, TOKENS, 128)
    assert linear["kwargs"] == {}


def test_a_file_is_read_in_parts(tmp_path):
    recording = {
        "a": [torch.full((2,), float(n)) for n in range(5)],
        "b": [(torch.zeros(n), torch.ones(1)) for n in range(5)],
    }
    write_recording(recording, tmp_path / "x.safetensors")
    found = read_recording(tmp_path / "x.safetensors", ["b"], slice(1, 3))
    assert set(found) == {"b"}
    assert [tuple(part.shape for part in step) for step in found["b"]] == [((1,), (1,)), ((2,), (1,))]


def test_pickled_recordings_of_others_need_the_opt_in(tmp_path):
    embed = [[torch.ones(1, 4, 2), torch.zeros(1, 4, 2)], [torch.ones(1, 1, 2), torch.zeros(1, 1, 2)]]
    data = {**sequence(0, 4, 2), "model_pos_embed": embed}
    (tmp_path / "0.pkl").write_bytes(pickle.dumps(data))
    with pytest.raises(CheckpointError, match="allow_pickle=True"):
        build_calib_dataset_inputs(tmp_path)
    (item,) = build_calib_dataset_inputs(tmp_path, allow_pickle=True)
    assert item["input_tensor"].shape == (1, 5, 8)
    assert [part.shape for part in item["kwargs"]["position_embeddings"]] == [(1, 5, 2)] * 2


@pytest.mark.parametrize("data", [[1, 2], {"model_input": torch.ones(2)}, {"model_input": [(1, 2)]}])
def test_what_is_no_recording_is_refused(tmp_path, data):
    (tmp_path / "x.pkl").write_bytes(pickle.dumps(data))
    with pytest.raises(CalibrationError, match="holds no recording"):
        build_calib_dataset_inputs(tmp_path, allow_pickle=True)


def test_a_pipe_in_place_of_a_recording_is_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "a.safetensors")
    with pytest.raises(CheckpointError, match="is a pipe"):
        DefaultDataset(tmp_path)


def test_what_cannot_be_used_is_said(tmp_path):
    with pytest.raises(CalibrationError, match="no recordings in"):
        build_calib_dataset_inputs(tmp_path)
    with pytest.raises(CalibrationError, match="no recordings in"):
        build_calib_dataset_inputs([])
    with pytest.raises(CheckpointError, match="there is no file or directory"):
        build_calib_dataset_inputs(tmp_path / "missing.safetensors")
    (tmp_path / "x.safetensors").write_bytes(b"junk")
    with pytest.raises(CheckpointError, match="damaged"):
        build_calib_dataset_inputs(tmp_path)
    write_recording(sequence(0), tmp_path / "x.safetensors")
    with pytest.raises(CalibrationError, match="holds no 'model_inptu'; register it"):
        build_calib_dataset_inputs(tmp_path, key="model_inptu")
    with pytest.raises(CalibrationError, match="at least 1, not 0"):
        build_calib_dataset_inputs(tmp_path, 0)


def test_other_safetensors_are_no_recordings(tmp_path):
    from safetensors.torch import save_file

    save_file({"weight": torch.ones(2)}, tmp_path / "model.safetensors")
    with pytest.raises(CalibrationError, match=r"model\.safetensors holds no recording"):
        build_calib_dataset_inputs(tmp_path)


@pytest.mark.parametrize("in_file", [False, True])
@pytest.mark.parametrize("key", ["model_position_ids", "model_input_ids"])
def test_steps_that_do_not_belong_together_are_refused(tmp_path, key, in_file):
    data = {**sequence(0, 4, 3), key: [torch.arange(4).unsqueeze(0)]}
    write_recording(data, tmp_path / "x.safetensors")
    with pytest.raises(CalibrationError, match=f"as many steps of '{key}' as of 'model_input'"):
        build_calib_dataset_inputs(tmp_path if in_file else [data])


class TestADatasetIsGiven:
    """As FullQuantTransformer's scripts do it: the dataset first, then a choice from it."""

    def test_it_is_what_the_directory_gives(self, tmp_path):
        for seed in range(6):
            write_recording(sequence(seed), tmp_path / f"{seed}.safetensors")
        dataset = DefaultDataset(root_dir=str(tmp_path))
        chosen = build_calib_dataset_inputs(dataset, num_samples=3, seed=1, device="cpu")
        expected = build_calib_dataset_inputs(tmp_path, num_samples=3, seed=1)
        assert len(chosen) == len(expected) == 3
        assert all(torch.equal(a["input_tensor"], b["input_tensor"]) for a, b in zip(chosen, expected, strict=True))

    def test_every_tensor_goes_to_the_device(self, model):
        recorder = recorded(model, lambda: generate(model, prompt()))
        (item,) = build_calib_dataset_inputs([recorder.recorded], device="meta")
        tensors = [item["input_tensor"], item["input_ids"], item["kwargs"]["position_ids"]]
        assert all(tensor.is_meta for tensor in (*tensors, *item["kwargs"]["position_embeddings"]))

    def test_what_contradicts_it_is_an_error(self, tmp_path):
        dataset = DefaultDataset([sequence(0)])
        with pytest.raises(
            ConfigError, match=r"key='linear_input.x' is for recordings; this DefaultDataset has chosen"
        ):
            build_calib_dataset_inputs(dataset, key="linear_input.x")
        for arguments in ({}, {"files": tmp_path, "root_dir": tmp_path}):
            with pytest.raises(ConfigError, match="give the recordings once: files, or root_dir"):
                DefaultDataset(**arguments)
        with pytest.raises(CalibrationError, match="num_samples must be a whole number of at least 1, not 0"):
            build_calib_dataset_inputs(dataset, num_samples=0)
        for seed in (2**64, -1, "x"):
            with pytest.raises(CalibrationError, match="seed must be a whole number"):
                build_calib_dataset_inputs(dataset, num_samples=1, seed=seed)
        with pytest.raises(ConfigError, match="device 'gpu0' is none"):
            build_calib_dataset_inputs(dataset, device="gpu0")
        with pytest.raises(ConfigError, match="recordings are a directory"):
            DefaultDataset(3)
        with pytest.raises(CheckpointError, match="there is no file or directory"):
            DefaultDataset(root_dir=tmp_path / "nowhere")

"""Recordings as a calibration set: the arguments of a block, one item per sequence.

A recording is a table of lists: {"model_input": [prefill, decode step, decode step, …], "model_pos_embed": […], …}.
A step is a tensor, or a tuple of tensors. In safetensors a step is named KEY:STEP or KEY:STEP:PART, and the metadata
say how many there are. The steps of one sequence are joined along its tokens, since what enters a causal block is the
same whether the tokens came at once or one by one.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.utils.data import Dataset

from fewbit import io
from fewbit.errors import CalibrationError, CheckpointError, ConfigError
from fewbit.files import check_regular
from fewbit.models.nested import to_device
from fewbit.safetensors_file import write_safetensors

Step = Tensor | tuple[Tensor, ...]
Recording = Mapping[str, Sequence[Step]]
Files = str | Path | Recording | Sequence[str | Path | Recording]
"""A directory of recordings, files, recordings in memory."""
Item = dict[str, Any]
"""{"input_tensor": [batch, tokens, channels], "kwargs": {…}} and, if they were recorded, "input_ids"."""

INPUT, POSITION_EMBEDDINGS, POSITION_IDS = "model_input", "model_pos_embed", "model_position_ids"
INPUT_IDS, ATTENTION_MASK = "model_input_ids", "model_attention_mask"
OUTPUT, LINEAR_INPUT = "model_output", "linear_input"
FORMAT = "fewbit-recording"
ALL = slice(None)
SUFFIXES = (".safetensors", *io.TORCH_SUFFIXES, *io.PICKLE_SUFFIXES)


def write_recording(recording: Recording, path: Path, *, allow_pickle: bool = False) -> None:
    """Store a recording as safetensors, or by another suffix as `io.dump` does."""
    if path.suffix != ".safetensors":
        io.dump({key: list(steps) for key, steps in recording.items()}, path, allow_pickle=allow_pickle)
        return
    tensors: dict[str, Tensor] = {}
    parts: dict[str, list[int]] = {}
    for key, steps in recording.items():
        parts[key] = [len(step) if isinstance(step, tuple) else 0 for step in steps]
        for number, step in enumerate(steps):
            named = {f":{part}": tensor for part, tensor in enumerate(step)} if isinstance(step, tuple) else {"": step}
            tensors |= {f"{key}:{number}{suffix}": tensor for suffix, tensor in named.items()}
    write_safetensors(path, tensors, {"format": FORMAT, "steps": json.dumps(parts)})


def read_recording(
    path: str | Path, keys: Iterable[str] | None = None, steps: slice = ALL, *, allow_pickle: bool = False
) -> dict[str, list[Step]]:
    """What was recorded under `keys` (all if None) in `steps`; a key that is not there is left out.

    Raises CheckpointError for a file that cannot be read, CalibrationError for one that holds no recording.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        return _checked(io.load(path, allow_pickle=allow_pickle), path, keys, steps)
    check_regular(path)
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != FORMAT:
                raise CalibrationError(f"{path} holds no recording; DataRecorder.save_inputs writes one")
            found: dict[str, list[Step]] = {}
            for key, parts in json.loads(metadata["steps"]).items():
                if keys is None or key in keys:
                    found[key] = [
                        tuple(file.get_tensor(f"{key}:{number}:{part}") for part in range(parts[number]))
                        if parts[number]
                        else file.get_tensor(f"{key}:{number}")
                        for number in range(len(parts))[steps]
                    ]
            return found
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} is damaged or no safetensors file ({error})") from None


class DefaultDataset(Dataset[Item]):
    """Recorded sequences, read when they are asked for.

    Args:
        files: a directory of recordings (or root_dir), files, or recordings in memory (`DataRecorder.recorded`).
        num_samples: how many sequences to choose at random by `seed`; None, or more than there are, takes all.
        key: what to take as input: "model_input", "model_input.NAME" of a named module, "linear_input.NAME", …
        allow_pickle: read pickles, which can run code.
    """

    def __init__(
        self,
        files: Files | None = None,
        num_samples: int | None = None,
        seed: int = 0,
        *,
        root_dir: str | Path | None = None,
        key: str = INPUT,
        allow_pickle: bool = False,
    ) -> None:
        if (files is None) == (root_dir is None):
            raise ConfigError("give the recordings once: files, or root_dir for a directory")
        self.key = key
        self._allow_pickle = allow_pickle
        sequences = [
            (source, steps)
            for source in _sources(root_dir if files is None else files)
            for steps in _sequences(*self._read(source, POSITION_IDS).values())
        ]
        self._chosen = [sequences[index] for index in _sample(len(sequences), num_samples, seed)]

    def __len__(self) -> int:
        return len(self._chosen)

    def __getitem__(self, index: int) -> Item:
        """One sequence.

        input_tensor: [batch, tokens, channels], prefill and decode steps joined.
        kwargs: what was recorded of position_ids [batch, tokens], position_embeddings (a tuple of
        [batch, tokens, head_dim]) and, where tokens are padding, attention_mask bool [batch, tokens].
        input_ids: [batch, tokens], if they were recorded.
        """
        source, steps = self._chosen[index]
        recording = self._read(source, POSITION_IDS, POSITION_EMBEDDINGS, INPUT_IDS, ATTENTION_MASK, steps=steps)
        inputs = _joined(recording[self.key], 1)
        item: Item = {"input_tensor": inputs, "kwargs": {}}
        for name, found in recording.items():
            if name.startswith(POSITION_IDS):
                item["kwargs"]["position_ids"] = _joined(found, -1, inputs.shape[0])
            elif name.startswith(POSITION_EMBEDDINGS):
                item["kwargs"]["position_embeddings"] = _joined(found, -2, inputs.shape[0])
            elif name == INPUT_IDS:
                item["input_ids"] = _joined(found, 1)
            elif name == ATTENTION_MASK:
                mask = found[-1]  # the last step's covers those before it
                if isinstance(mask, Tensor) and mask.shape == inputs.shape[:2] and not bool(mask.all()):
                    item["kwargs"]["attention_mask"] = mask.bool()
        return item

    def _read(self, source: Path | Recording, *beside: str, steps: slice = ALL) -> dict[str, list[Step]]:
        """The inputs, and what was recorded in the same calls; nothing is beside the inputs of linears."""
        suffix = self.key.removeprefix(INPUT)
        named = [key + suffix if key in (POSITION_IDS, POSITION_EMBEDDINGS) else key for key in beside]
        keys = (self.key, *(named if self.key == INPUT or self.key.startswith(f"{INPUT}.") else ()))
        if isinstance(source, Path):
            recording = read_recording(source, keys, steps, allow_pickle=self._allow_pickle)
        else:
            recording = _checked(source, "the recording", keys, steps)
        name = source if isinstance(source, Path) else "the recording"
        inputs = recording.pop(self.key, None)
        if not inputs:
            raise CalibrationError(f"{name} holds no {self.key!r}; register it before the model runs")
        if unlike := next((key for key, found in recording.items() if len(found) != len(inputs)), None):
            raise CalibrationError(
                f"{name} holds not as many steps of {unlike!r} as of {self.key!r}; register both before the model runs"
            )
        return {self.key: inputs} | recording


def build_calib_dataset_inputs(
    dataset: Dataset[Item] | Files,
    num_samples: int | None = None,
    seed: int = 0,
    device: torch.device | str | None = None,
    *,
    key: str | None = None,
    allow_pickle: bool = False,
) -> list[Item]:
    """Items of a dataset in memory: the inputs of `run_gptq_for_sequential_layers`.

    Args:
        dataset: a DefaultDataset, another one that has such items, or what a DefaultDataset is made of.
        num_samples: how many items to choose at random by `seed`; None, or more than there are, takes all.
        device: where their tensors go; where they are if None.
        key, allow_pickle: as for DefaultDataset; a dataset has its own already.
    """
    if not isinstance(dataset, Dataset):
        dataset = DefaultDataset(dataset, key=INPUT if key is None else key, allow_pickle=allow_pickle)
    elif key is not None:
        raise ConfigError(f"key={key!r} is for recordings; this {type(dataset).__name__} has chosen already")
    total = len(dataset)  # type: ignore[arg-type]  # Dataset does not promise it
    items = [dataset[index] for index in _sample(total, num_samples, seed)]
    return items if device is None else [to_device(item, device_of(device)) for item in items]


def _sample(total: int, wanted: int | None, seed: int) -> list[int]:
    """Numbers of the items to take out of `total`, in order; all if there are fewer than wanted."""
    if wanted is not None and (not isinstance(wanted, int) or wanted < 1):
        raise CalibrationError(f"num_samples must be a whole number of at least 1, not {wanted!r}")
    if not isinstance(seed, int) or not 0 <= seed < 2**63:
        raise CalibrationError(f"seed must be a whole number from 0 to 2^63 − 1, not {seed!r}")
    if wanted is None or wanted >= total:
        return list(range(total))
    order = torch.randperm(total, generator=torch.Generator().manual_seed(seed))
    return [int(index) for index in order[:wanted].sort().values]


def device_of(name: torch.device | str | int) -> torch.device:
    """A device by its torch name; ConfigError if there is none."""
    try:
        return torch.device(name)
    except (RuntimeError, TypeError):
        raise ConfigError(f'device {name!r} is none; give "cpu", "cuda" or "cuda:0"') from None


def _sources(files: Files | None) -> list[Path | Recording]:
    if isinstance(files, Mapping):
        return [files]
    if not isinstance(files, str | Path | Iterable):
        raise ConfigError(f"recordings are a directory, files or what DataRecorder.recorded holds, not {files!r}")
    if not isinstance(files, str | Path):
        sources = [source if isinstance(source, Mapping) else Path(source) for source in files]
    elif not Path(files).exists():
        raise CheckpointError(f"there is no file or directory {files}; DataRecorder.save_inputs writes recordings")
    else:
        inside = sorted(Path(files).iterdir()) if Path(files).is_dir() else None
        sources = [Path(files)] if inside is None else [path for path in inside if path.suffix in SUFFIXES]
    if not sources:
        raise CalibrationError(f"there are no recordings in {files}; DataRecorder.save_inputs writes them")
    return sources


def _sequences(steps: Sequence[Any], positions: Sequence[Any] | None = None) -> list[slice]:
    """The steps of each sequence."""
    starts = [number for number in range(len(steps)) if not _goes_on(steps, positions, number)]
    return [slice(start, stop) for start, stop in zip(starts, [*starts[1:], len(steps)], strict=True)]


def _goes_on(steps: Sequence[Any], positions: Sequence[Any] | None, number: int) -> bool:
    """Whether a step belongs to the sequence of the one before: with position ids where every row's positions go on,
    without them where there is one token per row."""
    before, step = steps[number - 1], steps[number]
    if number == 0 or step.ndim != 3 or step.shape[0] != before.shape[0]:
        return False
    if positions is None:
        return bool(step.shape[1] == 1)
    before, step = positions[number - 1], positions[number]
    return before.shape[:-1] == step.shape[:-1] and bool((step[..., 0] == before[..., -1] + 1).all())


def _checked(data: Any, name: object, keys: Iterable[str] | None, steps: slice) -> dict[str, list[Step]]:
    """A recording that may have been made by something else; tuples may be lists there."""
    if not isinstance(data, Mapping) or not all(isinstance(found, list | tuple) for found in data.values()):
        raise CalibrationError(f"{name} holds no recording: a table of lists of tensors, like DataRecorder's")
    found = {}
    for key, recorded in data.items():
        if keys is None or key in keys:
            found[key] = [step if isinstance(step, Tensor) else tuple(step) for step in recorded[steps]]
            parts = [part for step in found[key] if isinstance(step, tuple) for part in step]
            if not all(isinstance(part, Tensor) for part in parts):
                raise CalibrationError(f"{name} holds no recording: there is more than tensors in {key!r}")
    return found


def _joined(steps: Sequence[Any], dim: int, batch: int = 1) -> Any:
    """Steps one after another along the tokens (tuples part by part), and where rows share them, one for each row."""
    if isinstance(steps[0], tuple):
        return tuple(_joined(part, dim, batch) for part in zip(*steps, strict=True))
    joined = steps[0] if len(steps) == 1 else torch.cat(list(steps), dim)
    return joined.expand(batch, *joined.shape[1:]) if joined.shape[0] == 1 else joined

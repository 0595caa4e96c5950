"""The files beside the weights of a run or an export: configuration, tokenizer, templates, processor, code.

Copied is what `save_pretrained` or a copy of the directory would hold besides weights; what is left behind is named.
"""

import copy
import os
import re
import shutil
import stat
from collections.abc import Container, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import PretrainedConfig, PreTrainedModel
from transformers.dynamic_module_utils import custom_object_save
from transformers.generation import GenerationConfig
from transformers.utils import GENERATION_CONFIG_NAME

from fewbit.checkpoint.configuration import CONFIG_FILE, read_config
from fewbit.errors import CheckpointError, RunError, first_line, printable
from fewbit.files import read_json_object, replacing, write_json
from fewbit.scratch import is_scratch, temporary_directory

RESERVED = frozenset(
    ("fewbit.json", "journal.jsonl", "report.json", "outside.safetensors", "blocks", "exports", "work", ".lock",
     "fewbit-export.json")
)  # fmt: skip
"""What fewbit itself puts at the top of a run or an export."""
LARGEST_SIDE_FILE = 2**28  # bytes; the largest tokenizers have a tenth of it
MOST_NAMED = 8
_WEIGHTS = re.compile(
    r"\.(safetensors|bin|pt|pth|ckpt|gguf|ggml|h5|msgpack|onnx|onnx_data|pb|tflite|npz|pkl|pickle|distcp|ot|nemo)$"
    r"|\.index(\.[\w-]+)?\.json$",
    re.IGNORECASE,
)
_PASSED_OVER = frozenset((".git", ".gitattributes", ".gitignore", ".cache", ".DS_Store", "__pycache__"))
_SWITCHES = ("do_sample", "num_beams", "return_dict_in_generate", "use_cache")
"""Settings of a generation config that decide whether others are allowed."""
_WITH_CODE = (CONFIG_FILE, "tokenizer_config.json", "processor_config.json", "preprocessor_config.json")


def is_weight(name: str) -> bool:
    """Whether a file holds weights, or says where they are."""
    return _WEIGHTS.search(name) is not None


def copy_side_files(
    source: Path, target: Path, changes: Mapping[str, Any] | None = None, weights: Container[Path] = ()
) -> list[str]:
    """Copy all files but weights from a model's, a run's or an export's directory to an existing one.

    Args:
        changes: fields of config.json to change in the copy.
        weights: files of `source` whose tensors the copy holds in another form; they are not named as left behind.

    Returns what was left behind, a few words each. Raises CheckpointError for a config.json that is none.
    """
    left: list[str] = []
    for path in _side_files(source, target, left, weights):
        _copy(path, target / path.relative_to(source))
    described = read_config(source)
    changed = described | dict(changes or {})
    changed.pop("transformers_weights", None)  # names a file that is left behind
    if changed != described or not (target / CONFIG_FILE).exists():
        write_json(target / CONFIG_FILE, changed)
    without_code = [name for name in _WITH_CODE if _drop_dangling_code(target / name)]
    return left + [f"auto_map of {name} (the code is not there)" for name in without_code]


def in_words(left: list[str]) -> list[str]:
    """A warning about what `copy_side_files` left behind, if anything."""
    more = f" and {len(left) - MOST_NAMED} more" if len(left) > MOST_NAMED else ""
    return [f"left behind: {', '.join(left[:MOST_NAMED])}{more}"] if left else []


@contextmanager
def saved_side_files(
    model: PreTrainedModel, config: PretrainedConfig, tokenizer: Any
) -> Iterator[tuple[Path, list[str]]]:
    """A directory with what `save_pretrained` of a loaded model writes besides weights, and notes on what was mended.

    The model is not touched. Raises CheckpointError for a configuration or tokenizer that cannot be saved.
    """
    config, generation = copy.deepcopy(config), copy.deepcopy(getattr(model, "generation_config", None))
    notes = []
    config.dtype = str(model.dtype).removeprefix("torch.")
    config.architectures = [type(model).__name__]
    with temporary_directory("config") as directory:
        try:
            if model.is_remote_code():
                custom_object_save(model, directory, config=config)
            notes += _moved_to_generation(config, generation)
            config.save_pretrained(directory)
        except Exception as error:  # whatever a configuration's own checks raise, the user can change it only
            raise CheckpointError(f"the model's configuration cannot be saved: {first_line(error)}") from None
        if generation is not None and model.can_generate():
            notes += _saved_generation(generation, directory)
        if hasattr(tokenizer, "save_pretrained"):
            try:
                tokenizer.save_pretrained(directory)
            except Exception as error:
                raise CheckpointError(f"the tokenizer cannot be saved: {first_line(error)}") from None
        yield directory, notes


def _side_files(source: Path, target: Path, left: list[str], weights: Container[Path]) -> list[Path]:
    """Every file of `source` to be copied; what is not is added to `left`, in words."""
    real, found = source.resolve(), list[Path]()
    roots = [real, real.parent.parent / "blobs"] if real.parent.name == "snapshots" else [real]
    for folder, folders, files in os.walk(source):
        here = Path(folder)
        passed = _PASSED_OVER | RESERVED if here == source and _is_fewbits(source) else _PASSED_OVER
        entered: list[Path] = []
        for name in (*sorted(folders), *sorted(files)):
            path, is_folder = here / name, name in folders
            if name in passed or is_scratch(name) or path == target or path in weights:
                continue
            reason = "a run has one of that name" if here == source and name in RESERVED else None
            reason = reason or (_why_not_enter(path, weights) if is_folder else _why_not_copy(path, roots))
            if reason:
                left.append(f"{printable(path.relative_to(source))}{'/' if is_folder else ''} ({reason})")
            else:
                (entered if is_folder else found).append(path)
        folders[:] = [path.name for path in entered]
    return found


def _why_not_enter(folder: Path, weights: Container[Path]) -> str | None:
    """Why a folder stays behind; None for one whose files are looked at."""
    if folder.is_symlink():
        return "a link"
    if folder.name.startswith("."):
        return "hidden"
    if _is_fewbits(folder):
        return "a run or an export"
    if any(is_weight(path.name) and path not in weights for path in folder.iterdir() if path.is_file()):
        return "other weights"
    return None


def _why_not_copy(path: Path, roots: Iterable[Path]) -> str | None:
    """Why a file stays behind; None for one that comes along. `roots`: where links may lead, as in the hub's cache."""
    if is_weight(path.name):
        return "weights"
    if path.name.startswith("."):
        return "hidden"
    try:
        aim, found = path.resolve(), path.stat()
    except (OSError, RuntimeError):  # RuntimeError: links in a circle
        return "a link to nothing"
    if path.is_symlink() and not any(aim.is_relative_to(root) for root in roots):
        return "a link that leads out of the directory"
    if not stat.S_ISREG(found.st_mode):
        return "no regular file"
    if found.st_size > LARGEST_SIDE_FILE:
        return f"{found.st_size / 1e6:.0f} MB"
    return None if os.access(path, os.R_OK) else "not readable"


def _is_fewbits(folder: Path) -> bool:
    return (folder / "fewbit.json").exists() or (folder / "fewbit-export.json").exists()


def _copy(path: Path, target: Path) -> None:
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with replacing(target) as beside:
            shutil.copyfile(path, beside)
    except OSError as error:
        raise RunError(f"{printable(path)} could not be copied to {printable(target)}: {error.strerror}") from None


def _moved_to_generation(config: PretrainedConfig, generation: GenerationConfig | None) -> list[str]:
    """Generation settings have no place in config.json; transformers refuses to save them there."""
    found = config._get_generation_parameters()
    for name, value in found.items():
        if generation is not None and getattr(generation, name, None) is None:
            setattr(generation, name, value)
        vars(config).pop(name, None)
    return [f"{', '.join(sorted(found))} of the configuration went into generation_config.json"] if found else []


def mend_generation_config(directory: Path) -> list[str]:
    """Make a copied generation_config.json one that transformers can save; notes on what was mended."""
    file = directory / GENERATION_CONFIG_NAME
    try:
        generation = GenerationConfig.from_dict(read_json_object(file))
    except Exception:  # there is none, or it says what no reader knows: it stays the copy that it is
        return []
    with temporary_directory("generation") as saved:
        notes = _saved_generation(generation, saved)
        if notes:
            _copy(saved / GENERATION_CONFIG_NAME, file)
    return notes


def _saved_generation(generation: GenerationConfig, directory: Path) -> list[str]:
    """Write generation_config.json, mended so that it can be saved: sampling is switched on if it has settings, and
    settings that still contradict the rest are dropped."""
    if _saves(generation, directory):
        return []
    mended, lost, sampled = GenerationConfig(), list[str](), list[str]()
    names = [name for name in generation.to_diff_dict() if name != "transformers_version"]
    for name in sorted(names, key=lambda name: (name not in _SWITCHES, name)):
        tried = copy.deepcopy(mended)
        setattr(tried, name, getattr(generation, name))
        if not (saves := _saves(tried, directory)):
            tried.do_sample = True
            saves = _saves(tried, directory)
            (sampled if saves else lost).append(name)
        mended = tried if saves else mended
    mended.save_pretrained(directory)
    said = {
        "do_sample is on, because {} cannot be saved without": sampled,
        "{} cannot be saved with the rest and is left out": lost,
    }
    return [f"generation config: {text.format(', '.join(names))}" for text, names in said.items() if names]


def _saves(generation: GenerationConfig, directory: Path) -> bool:
    """Whether transformers' own checks let it through. A full disk is no verdict on the settings."""
    try:
        generation.save_pretrained(directory)
    except OSError:
        raise
    except Exception:  # a refused setting, or a value that is no JSON: which error it is differs between settings
        return False
    return True


def _drop_dangling_code(file: Path) -> bool:
    """Take out of a configuration's auto_map what names code that does not lie beside it; whether there was any."""
    try:
        described = read_json_object(file) if file.is_file() else {}
    except CheckpointError:
        return False
    found = described.pop("auto_map", None)
    code = found if isinstance(found, dict) else {}
    kept = {name: value for name, value in code.items() if not _dangles(value, file.parent)}
    if kept == code:
        return False
    write_json(file, described | ({"auto_map": kept} if kept else {}))
    return True


def _dangles(value: Any, directory: Path) -> bool:
    """Whether an entry of auto_map (MODULE.CLASS, or a list of such) names a module that is not there. Those of
    another repository (REPOSITORY--MODULE.CLASS) are found by their name."""
    names = value if isinstance(value, list) else [value]
    modules = [name.partition(".")[0] for name in names if isinstance(name, str) and "--" not in name]
    return any(not (directory / f"{module}.py").exists() for module in modules)

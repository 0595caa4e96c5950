"""Tries damaged runs, exports, models and recipes, each in a process of its own with bounded time and memory.

Right is: a `FewbitError`, or the result that undamaged files give. Wrong is any other exception, more than 30 seconds,
more memory than the file's size and a gibibyte, and a changed value that verify, resume, export or evaluate accepts.
"""

from __future__ import annotations

import json
import os
import random
import resource
import shutil
import signal
import tempfile
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import fewbit
from fewbit.errors import FewbitError
from fewbit.runs.inspection import inspect
from fuzzing.mutations import HUGE, mutate

SECONDS = 30
EXTRA_MEMORY = 2**30
FORMAT = "compressed-tensors"
EXPORT = f"run/exports/{FORMAT}"
TEXT = "the quick brown fox jumps over the lazy dog and the five boxing wizards jump quickly. " * 40
TOKENS = torch.randint(5, 250, (2, 24), generator=torch.Generator().manual_seed(0))
PER_CHANNEL = {"weight": {"dtype": "int8", "qscheme": "per_channel"}}
RECIPE: dict[str, Any] = {
    "scheme": "W4A16", "group_size": 16, "algorithm": {"name": "gptq", "damping": 0.01}, "exclude": ["lm_head"],
    "layer_quant_config": {"re:.*mlp.*": "W8A16-g16", "*.v_proj": PER_CHANNEL},
    "calibration": {"num_samples": 4, "sequence_length": 24}, "seed": 0,
}  # fmt: skip
RUN: dict[str, Any] = {
    "scheme": "W8A8",
    "algorithm": "rtn",
    "num_samples": 4,
    "sequence_length": 24,
    "progress": False,
}


@dataclass(frozen=True)
class Finding:
    """Something that went wrong."""

    seed: int
    operation: str
    mutation: str
    what: str


def prepare(base: Path) -> None:
    """A model, a run with an export, a recipe and a text in `base`."""
    (base / "text.txt").write_text(TEXT)
    (base / "recipe.yaml").write_text(json.dumps(RECIPE))
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=300, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=128, bos_token_id=None, eos_token_id=0,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(base / "model")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    end = ["<end>"]
    trainer = trainers.BpeTrainer(vocab_size=290, special_tokens=end, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([TEXT], trainer)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>").save_pretrained(base / "model")
    run = fewbit.quantize(base / "model", output=base / "run", calibration=base / "text.txt", **RUN)
    run.export(FORMAT)
    (base / "expected").write_text(repr(fewbit.evaluate(run, TOKENS).perplexity))


# --- what is tried: each returns None, or says what it accepted -----------------------------------------------------


def resume(place: Path, base: Path) -> str | None:
    fewbit.quantize(place / "model", output=place / "run", calibration=place / "text.txt", resume=True, **RUN)
    return _differs(place / "run", base / "run", rows=True)


def export(place: Path, base: Path) -> str | None:
    fewbit.Run(place / "run").export(FORMAT, place / "again")
    return _differs(place / "again", base / EXPORT)


def verify(place: Path, base: Path) -> str | None:
    fewbit.Run(place / "run").verify()
    return _differs(place / EXPORT, base / EXPORT)


def evaluate_run(place: Path, base: Path) -> str | None:
    found = fewbit.evaluate(place / "run", TOKENS).perplexity
    return None if repr(found) == (base / "expected").read_text() else f"perplexity {found}"


def evaluate_export(place: Path, base: Path) -> str | None:
    fewbit.evaluate(place / EXPORT, TOKENS)
    return None


def evaluate_text(place: Path, base: Path) -> str | None:
    fewbit.evaluate(place / "model", place / "text.txt", sequence_length=24, max_windows=2)
    return None


def report(place: Path, base: Path) -> str | None:
    return None if isinstance(fewbit.Run(place / "run").report, dict) else "a report that is no table"


def quantize(place: Path, base: Path) -> str | None:
    fewbit.quantize(place / "model", output=place / "new", calibration=place / "text.txt", **RUN)
    return None


def look(place: Path, base: Path) -> str | None:
    inspect(place / "model")
    return None


def look_with_recipe(place: Path, base: Path) -> str | None:
    inspect(place / "model", fewbit.Config.from_yaml(place / "recipe.yaml"))
    return None


def quantize_with_recipe(place: Path, base: Path) -> str | None:
    recipe = fewbit.Config.read_yaml(place / "recipe.yaml")
    text = place / "text.txt"
    fewbit.quantize(place / "model", output=place / "new", config=recipe, calibration=text, progress=False)
    return None


Operation = Callable[[Path, Path], str | None]
TARGETS: dict[str, tuple[float, tuple[Operation, ...]]] = {
    "run": (0.35, (resume, export, verify, evaluate_run, report)),
    EXPORT: (0.25, (verify, verify, evaluate_export)),
    "model": (0.25, (look, quantize, evaluate_text)),
    "recipe.yaml": (0.15, (look_with_recipe, quantize_with_recipe)),
}
"""What is damaged, how often, and what is tried then."""


def attempt(base: Path, seed: int) -> Finding | None:
    """Damage a copy of what `prepare` made as `seed` says, and try it."""
    chooser = random.Random(seed)
    weights = [share for share, _ in TARGETS.values()]
    target = chooser.choices(list(TARGETS), weights)[0]
    operation = chooser.choice(TARGETS[target][1])
    with tempfile.TemporaryDirectory(prefix="fuzz-") as place:
        shutil.copytree(base, place, dirs_exist_ok=True)
        mutation = mutate(Path(place), _files(base, target), chooser)
        result = _in_a_process(lambda: operation(Path(place), base))
    return None if result is None else Finding(seed, operation.__name__, mutation, result)


def _files(base: Path, target: str) -> list[str]:
    root = base / target
    files = [root] if root.is_file() else [path for path in sorted(root.rglob("*")) if path.is_file()]
    inside = f"{EXPORT}/"
    return [
        name
        for name in (str(path.relative_to(base)) for path in files)
        if not name.endswith("/.lock") and (target == EXPORT or not name.startswith(inside))
    ]


def _in_a_process(run: Callable[[], str | None]) -> str | None:
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        said = _guarded(run)
        os.write(writing, said.encode("utf-8", "replace")[:4000])
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        said = pipe.read().decode("utf-8", "replace")
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        return f"more than {SECONDS} seconds" if number == signal.SIGALRM else f"killed by signal {number}"
    return said or None


def _guarded(run: Callable[[], str | None]) -> str:
    """Empty if all is well."""
    silent = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silent, 1)
    os.dup2(silent, 2)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    most = pages * resource.getpagesize() + EXTRA_MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    signal.signal(signal.SIGALRM, signal.SIG_DFL)  # pytest-timeout's handler would wait for Python's next step
    signal.alarm(SECONDS)
    torch.set_num_threads(1)  # the parent's threads are not in this process, and would be waited for
    try:
        accepted = run()
        return "" if accepted is None else f"accepted: {accepted}"
    except FewbitError as error:
        return f"no sentence: {error}" if "\n" in str(error) or len(str(error)) > 3000 else ""
    except BaseException as error:
        frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "/fewbit/" in frame.filename]
        last = frames[-1] if frames else traceback.extract_tb(error.__traceback__)[-1]
        where = f"{Path(last.filename).name}:{last.lineno} ({last.name})"
        return f"{type(error).__name__} in {where}: {str(error)[:300]}"


def _differs(found: Path, expected: Path, rows: bool = False) -> str | None:
    """What holds other values in one directory than in another; None if nothing does."""
    for path in sorted(expected.rglob("*")):
        name = path.relative_to(expected)
        if not path.is_file() or name.name in (".lock", "journal.jsonl", "fewbit-export.json"):
            continue
        if name.parts[0] == "exports":
            continue
        other = found / name
        if not other.is_file():
            return f"{name} is missing"
        if name.name == "report.json":
            if rows and _rows(other) != _rows(path):
                return f"rows of {name}"
        elif other.stat().st_size >= HUGE or not _same(other, path):
            return f"{name} differs"
    return None


def _same(one: Path, other: Path) -> bool:
    if one.read_bytes() == other.read_bytes():
        return True
    if one.suffix == ".safetensors":
        found, expected = load_file(one), load_file(other)
        return found.keys() == expected.keys() and all(
            found[name].dtype == tensor.dtype
            and found[name].shape == tensor.shape
            and torch.equal(found[name].view(-1).view(torch.uint8), tensor.view(-1).view(torch.uint8))
            for name, tensor in expected.items()
        )
    return one.suffix == ".json" and json.loads(one.read_bytes()) == json.loads(other.read_bytes())


def _rows(file: Path) -> Any:
    rows = json.loads(file.read_text())["linears"]
    return [{key: value for key, value in row.items() if key != "seconds"} for row in rows]

"""Tiny random models of every family, saved as the checkpoints that a user has. Nothing comes from the network."""

from __future__ import annotations

import os
import random
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: on tensors this small, threads cost twice what they save

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

VOCABULARY = 304
LENGTH = 32  # tokens of a calibration sequence; longer than every sliding window below
END_OF_TEXT = "<|endoftext|>"

_SHAPE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.12,  # about 1/√64: activations keep their size, so logits differ from token to token
    "bos_token_id": None,
    "eos_token_id": 0,
    "pad_token_id": None,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"tie_word_embeddings": False},
    "mistral": {"tie_word_embeddings": False, "sliding_window": 8},
    "qwen2": {"tie_word_embeddings": False},
    "qwen3": {"tie_word_embeddings": True, "head_dim": 16},
    "gemma3_text": {"num_hidden_layers": 7, "sliding_window": 8, "head_dim": 16, "query_pre_attn_scalar": 16},
}

LONGEST = ["test_demo_model", "test_memory", "test_versions", "test_fuzzing"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The files that take longest first, so that of two processes none waits for the other at the end."""
    items.sort(key=lambda item: LONGEST.index(item.path.stem) if item.path.stem in LONGEST else len(LONGEST))


@pytest.fixture(
    params=["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"))]
)
def device(request: pytest.FixtureRequest) -> str:
    """Every kind of device that this machine has."""
    return str(request.param)


@pytest.fixture(params=list(FAMILIES))
def family(request: pytest.FixtureRequest) -> str:
    """Every listed family in turn."""
    return str(request.param)


@pytest.fixture(scope="session")
def text() -> str:
    """About 5000 tokens of words that follow each other unevenly."""
    chooser = random.Random(0)
    syllables = [first + vowel for first in "bdfgklmnprst" for vowel in "aeiou"]
    words = ["".join(chooser.choices(syllables, k=chooser.randint(1, 3))) for _ in range(120)]
    weights = [1 / (rank + 1) for rank in range(len(words))]
    sentences = [" ".join(chooser.choices(words, weights, k=chooser.randint(4, 12))) for _ in range(300)]
    return ". ".join(sentences) + ".\n"


@pytest.fixture(scope="session")
def calibration_file(tmp_path_factory: pytest.TempPathFactory, text: str) -> Path:
    file = tmp_path_factory.mktemp("calibration") / "calibration.txt"
    file.write_text(text[: len(text) // 2], encoding="utf-8")
    return file


@pytest.fixture(scope="session")
def evaluation_file(tmp_path_factory: pytest.TempPathFactory, text: str) -> Path:
    """Other text than `calibration_file`."""
    file = tmp_path_factory.mktemp("evaluation") / "evaluation.txt"
    file.write_text(text[len(text) // 2 :], encoding="utf-8")
    return file


@pytest.fixture(scope="session")
def tokenizer(text: str) -> PreTrainedTokenizerFast:
    """A byte-level BPE trained on `text`: no character is unknown to it."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator([text], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token=END_OF_TEXT, model_max_length=256)


def make_model(family: str, seed: int = 0, **overrides: Any) -> PreTrainedModel:
    """A random float32 model; norms and biases are random too, so that leaving one out is seen."""
    config = AutoConfig.for_model(family, **_SHAPE | FAMILIES.get(family, {}) | overrides)
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.data.add_(0.2 * torch.randn_like(parameter))
    return model


@pytest.fixture(scope="session")
def random_model() -> Callable[..., PreTrainedModel]:
    """random_model(family, seed=0, **config fields): a fresh model in memory."""
    return make_model


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> Callable[..., Path]:
    """checkpoint(family, dtype=…, sharded=…, seed=…): directory of a saved model, made once; copy before changing."""
    made: dict[Any, Path] = {}

    def save(family: str, dtype: torch.dtype = torch.float32, sharded: bool = False, seed: int = 0) -> Path:
        key = (family, dtype, sharded, seed)
        if key not in made:
            directory = tmp_path_factory.mktemp(f"{family}-{str(dtype).removeprefix('torch.')}") / "model"
            size = {"max_shard_size": "150KB"} if sharded else {}
            make_model(family, seed).to(dtype).save_pretrained(directory, **size)
            tokenizer.save_pretrained(directory)
            made[key] = directory
        return made[key]

    return save


@pytest.fixture
def llama(checkpoint: Callable[..., Path], tmp_path: Path) -> Path:
    """A llama checkpoint of one's own, to be damaged."""
    return Path(shutil.copytree(checkpoint("llama"), tmp_path / "llama"))


@pytest.fixture(scope="session")
def quick(calibration_file: Path) -> dict[str, Any]:
    """Arguments of fewbit.quantize that make a run of less than a second."""
    return {
        "scheme": "W4A16",
        "group_size": 32,
        "algorithm": "rtn",
        "num_samples": 8,
        "sequence_length": LENGTH,
        "calibration": calibration_file,
        "device": "cpu",
        "progress": False,
    }


@pytest.fixture(scope="session")
def finished_run(
    tmp_path_factory: pytest.TempPathFactory, checkpoint: Callable[..., Path], quick: dict[str, Any]
) -> Callable[..., Path]:
    """finished_run(family, dtype=…, **arguments of quantize): directory of a run, made once; copy before changing."""
    from fewbit.api import quantize

    made: dict[str, Path] = {}

    def run(family: str = "llama", dtype: torch.dtype = torch.float32, **arguments: Any) -> Path:
        key = repr((family, dtype, sorted(arguments.items())))
        if key not in made:
            output = tmp_path_factory.mktemp("run") / "run"
            made[key] = quantize(checkpoint(family, dtype), output=output, **quick | arguments).directory
        return made[key]

    return run


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """cli("quantize", model, …): exit code, stdout and stderr of the `fewbit` command, run in this process."""
    from fewbit.cli import main

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["fewbit", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as left:
            main()
        captured = capsys.readouterr()
        return int(left.value.code or 0), captured.out, captured.err

    return run


@pytest.fixture(scope="session")
def files_of() -> Callable[[Path], dict[str, bytes]]:
    """files_of(run): every safetensors file of a native checkpoint by its name, to compare two runs byte by byte."""

    def read(run: Path) -> dict[str, bytes]:
        files = [*sorted((run / "blocks").iterdir()), run / "outside.safetensors"]
        return {file.name: file.read_bytes() for file in files}

    return read


@pytest.fixture(scope="session")
def dequantized() -> Callable[..., PreTrainedModel]:
    """dequantized(run, dtype): a transformers model whose weights are the run's, codes times scales."""
    from fewbit.checkpoint.native import NativeCheckpoint

    def load(run: Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
        checkpoint = NativeCheckpoint(run)
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(run), dtype=dtype).eval()
        lost = model.load_state_dict(checkpoint.read(checkpoint.info(), dtype), strict=False)
        assert not lost.unexpected_keys
        assert set(lost.missing_keys) <= {"lm_head.weight"}  # tied
        model.tie_weights()
        return model

    return load

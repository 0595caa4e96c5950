"""The library in four lines: quantize, export, evaluate."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NoReturn

from transformers import PreTrainedModel

from fewbit.calibration.tokens import CalibrationData
from fewbit.config.algorithms import AlgorithmConfig
from fewbit.config.recipe import Config, merge_recipe
from fewbit.config.run_options import RunOptions
from fewbit.errors import FewbitError
from fewbit.formats import Verification, export_directory, verify
from fewbit.formats import export as export_run
from fewbit.runs.quantize import quantize_model
from fewbit.runs.report import read_report


@dataclass(frozen=True)
class Run:
    """A finished quantization run in a directory."""

    directory: str | Path

    @cached_property
    def report(self) -> dict[str, Any]:
        """report.json: every linear, totals, environment, resolved recipe."""
        return read_report(Path(self.directory))

    def export(self, format: str, output: str | Path | None = None) -> Path:
        """Write the run in another engine's format; by default to RUN/exports/FORMAT."""
        return export_run(self.directory, format, output or export_directory(self.directory, format))

    def verify(self) -> list[Verification]:
        """Decode every export with its engine's own library and compare it with the run exactly."""
        return verify(self.directory)

    def __fspath__(self) -> str:
        return str(self.directory)


def quantize(
    model: str | Path | PreTrainedModel,
    scheme: str | None = None,
    *,
    output: str | Path,
    calibration: CalibrationData | None = None,
    config: Config | Mapping[str, Any] | None = None,
    group_size: int | None = None,
    algorithm: str | AlgorithmConfig | Sequence[AlgorithmConfig] | None = None,
    num_samples: int | None = None,
    sequence_length: int | None = None,
    seed: int | None = None,
    tokenizer: Any = None,
    device: str = RunOptions.device,
    activation_memory: str | int = RunOptions.activation_memory,
    resume: bool = RunOptions.resume,
    export: str | Sequence[str] = RunOptions.export,
    progress: bool = RunOptions.progress,
) -> Run:
    """Quantize a checkpoint directory, a hub id or a transformers model into the directory `output`.

    Args:
        model, calibration, tokenizer: see `fewbit.runs.quantize.quantize_model`.
        config: a recipe; `scheme`, `group_size`, `algorithm`, `num_samples`, `sequence_length` and `seed` override its
            fields (`fewbit.config.recipe`).
        device, activation_memory, resume, export, progress: see `fewbit.config.run_options.RunOptions`.

    Raises FewbitError for input that cannot be used; its text says what to do.
    """
    data = {"num_samples": num_samples, "sequence_length": sequence_length, "seed": seed}
    recipe = merge_recipe(config, scheme=scheme, group_size=group_size, algorithm=algorithm, **data)
    formats = (export,) if isinstance(export, str) else tuple(export)
    options = RunOptions(device, activation_memory, resume, formats, progress)
    return Run(quantize_model(model, recipe, output, calibration=calibration, tokenizer=tokenizer, options=options))


def load(path: str | Path) -> NoReturn:
    """A run or an export as a model that runs: not offered yet, so FewbitError."""
    raise FewbitError(
        f"fewbit.load cannot yet open {path} as a model that runs: load an export with transformers' from_pretrained "
        "or with vLLM, measure it with fewbit.evaluate, and read files of tensors with fewbit.io.load"
    )

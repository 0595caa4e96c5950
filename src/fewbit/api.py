"""The library in four lines: quantize, export, evaluate."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NoReturn

from transformers import PreTrainedModel

from fewbit import evaluation
from fewbit.calibration.tokens import CalibrationData
from fewbit.checkpoint.arguments import DEFAULT_ACTIVATION_MEMORY
from fewbit.config.algorithms import AlgorithmConfig, algorithm_configs
from fewbit.config.recipe import Config
from fewbit.config.schemes import parse_scheme
from fewbit.errors import FewbitError
from fewbit.formats import Verification, already_there, export_directory, exporter, verify
from fewbit.formats import export as export_run
from fewbit.runs.plan import Plan
from fewbit.runs.quantize import quantize_model
from fewbit.runs.report import read_report


@dataclass(frozen=True)
class Run:
    """A finished quantization run in a directory."""

    directory: Path

    @cached_property
    def report(self) -> dict[str, Any]:
        """report.json: every linear, totals, environment, resolved recipe."""
        return read_report(self.directory)

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
    device: str = "auto",
    activation_memory: str | int = DEFAULT_ACTIVATION_MEMORY,
    resume: bool = False,
    export: Sequence[str] = (),
    progress: bool = True,
) -> Run:
    """Quantize a checkpoint directory, a hub id or a transformers model into the directory `output`.

    Args:
        model: see `fewbit.runs.quantize.quantize_model`, which also explains `calibration`, `tokenizer`,
            `activation_memory` and `resume`.
        scheme: a name of `fewbit schemes`, e.g. "W4A16".
        export: formats to export to, into RUN/exports/FORMAT; what they cannot hold is said before the work.
        config: a whole recipe instead of, or below, the short arguments: what both give, the short argument decides.

    Raises FewbitError for input that cannot be used; its text says what to do.
    """
    recipe = merge_recipe(
        config,
        scheme=scheme,
        group_size=group_size,
        algorithm=algorithm,
        num_samples=num_samples,
        sequence_length=sequence_length,
        seed=seed,
    )
    targets = [exporter(name) for name in dict.fromkeys(export)]
    for target in targets if resume else ():
        already_there(output, target.name, finished=False)  # what is in the way is said before the work

    def check(plan: Plan) -> None:
        for target in targets:
            target.check(plan.contents)

    directory = quantize_model(
        model,
        recipe,
        output,
        calibration=calibration,
        tokenizer=tokenizer,
        device=device,
        activation_memory=activation_memory,
        resume=resume,
        progress=progress,
        check=check,
    )
    run = Run(directory)
    for target in targets:
        if not already_there(directory, target.name):
            run.export(target.name)
    return run


def merge_recipe(recipe: Config | Mapping[str, Any] | None, **given: Any) -> Config:
    """A recipe with the short arguments (those of the CLI) that are not None put in its place."""
    data = dict(recipe.to_dict() if isinstance(recipe, Config) else recipe or {})
    given = {name: value for name, value in given.items() if value is not None}
    lengths = {name: given.pop(name) for name in ("num_samples", "sequence_length") if name in given}
    if lengths:
        data["calibration"] = dict(data.get("calibration") or {}) | lengths
    if "scheme" in given:
        data.pop("global_quant_config", None)
        if parse_scheme(given["scheme"])[1] is not None:
            data.pop("attention", None)  # the scheme names its own KV cache
    if "algorithm" in given:
        before = data.pop("algo_config", None) or data.get("algorithm")
        named = isinstance(given["algorithm"], str) and ":" not in given["algorithm"]
        if named and before is not None and _names(before) == _names(given["algorithm"]):
            given["algorithm"] = before  # bare names of the algorithms that the recipe has keep their options
    return Config.from_dict(data | given)


def _names(algorithms: Any) -> list[str]:
    return [config.name for config in algorithm_configs(algorithms)]


def evaluate(model: str | Path | PreTrainedModel | Run, text: Any, **options: Any) -> evaluation.Evaluation:
    """`fewbit.evaluation.evaluate`, which also takes a Run as model or as `against`."""
    against = options.pop("against", None)
    return evaluation.evaluate(_path_of(model), text, against=_path_of(against), **options)


def _path_of(model: Any) -> Any:
    return model.directory if isinstance(model, Run) else model


def load(path: str | Path) -> NoReturn:
    """A run or an export as a model that runs: not offered yet, so FewbitError."""
    raise FewbitError(
        f"fewbit.load cannot yet open {path} as a model that runs: load an export with transformers' from_pretrained "
        "or with vLLM, measure it with fewbit.evaluate, and read files of tensors with fewbit.io.load"
    )

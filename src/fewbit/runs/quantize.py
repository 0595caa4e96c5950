"""The main job: from a model and a recipe to a finished run."""

import hashlib
import json
import time
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

from fewbit import process
from fewbit.calibration.tokens import CalibrationData, CalibrationSet, calibration_set
from fewbit.checkpoint.hub import resolve_directory
from fewbit.checkpoint.native import OUTSIDE, write_part
from fewbit.checkpoint.side_files import copy_side_files, in_words, mend_generation_config, saved_side_files
from fewbit.checkpoint.tokenizer import load_tokenizer
from fewbit.config.algorithms import AlgorithmConfig
from fewbit.config.recipe import Config
from fewbit.config.run_options import RunOptions, choose_device, parse_size
from fewbit.engine.block_quantizer import BlockQuantizer, Targets
from fewbit.engine.channel_scaler import ChannelScaler
from fewbit.engine.phases import MODEL_PHASES
from fewbit.errors import ConfigError
from fewbit.files import write_json
from fewbit.formats import already_there, export, export_directory, exporter
from fewbit.formats.format import ExportFormat
from fewbit.models.blockwise import BlockwiseModel
from fewbit.models.limits import check_length, check_tokens
from fewbit.models.memory import trim_heap
from fewbit.models.scalings import head_dim, scalings
from fewbit.nn.attach import refuse_quantized
from fewbit.runs.plan import Plan, make_plan
from fewbit.runs.progress import ProgressView, progress_view
from fewbit.runs.report import REPORT, build_report
from fewbit.runs.run_directory import Identity, RunDirectory
from fewbit.runs.walk import Walk
from fewbit.version import __version__

NO_CALIBRATION = "none"
DEFAULTS = RunOptions()


@process.neutral()
def quantize_model(
    model: str | Path | PreTrainedModel,
    config: Config,
    output: str | Path,
    *,
    calibration: CalibrationData | None = None,
    tokenizer: Any = None,
    options: RunOptions = DEFAULTS,
) -> Path:
    """Quantize `model` by `config` into the directory `output`; returns that directory.

    Args:
        model: checkpoint directory, hub id, or a transformers model in memory.
        calibration: text file, texts, token ids or batches (see calibration.tokens); None is the shipped text,
            "none" quantizes without data (round to nearest only).
        tokenizer: of a model in memory; directories bring their own.

    Raises FewbitError with a sentence for the user; nothing is written before model, recipe and data are checked.
    """
    started = time.perf_counter()
    directory = RunDirectory(output)
    targets = _targets(directory, options)
    directory.refuse(options.resume)
    device, memory = choose_device(options.device), parse_size(options.activation_memory)
    blockwise = open_model(model, config.at("model"))
    plan = make_plan(blockwise, config)
    for target in targets:
        target.check(plan.contents)
    data = _calibration(blockwise, config, plan, calibration, tokenizer)
    plan = replace(plan, warnings=plan.warnings + _check(data, blockwise, plan, config))
    quantizer = _quantizer(blockwise, plan, config, device)  # looks at the model as it is
    identity = _identity(blockwise, config, data, plan)
    if not options.resume:
        _check_weights(blockwise)
    view = progress_view(options.progress)
    try:
        with _side_files(blockwise, tokenizer) as (files, notes):
            directory.open(identity, options.resume)
            notes += in_words(copy_side_files(files, directory.path, blockwise.config_changes, blockwise.source.files))
            notes += mend_generation_config(directory.path)
        plan = replace(plan, warnings=plan.warnings + notes)
        prepared = time.perf_counter()
        for warning in plan.warnings:
            view.warn(warning)
        quantizer = replace(quantizer, listener=view)
        walk = Walk(blockwise, plan, config, quantizer, directory, view, memory)
        rows = walk.run(data)
        walked = time.perf_counter()
        plan = replace(plan, warnings=plan.warnings + directory.damaged)
        digest = write_part(directory.path / OUTSIDE, {}, blockwise.source.read(blockwise.outside_tensors()))
        directory.record_files({OUTSIDE: digest})
        run = _described(model, blockwise, device, data, walk.strategy(data) if data is not None else "none")
        seconds = {"prepare": prepared - started, "blocks": walked - prepared, "total": time.perf_counter() - started}
        write_json(directory.path / REPORT, build_report(config, plan, rows, run, seconds))
    finally:
        view.stop()
        directory.close()
    export_missing(directory.path, targets, view)
    return directory.path


def _targets(directory: RunDirectory, options: RunOptions) -> list[ExportFormat]:
    """Formats to export to; RunError now, not after the work, if something is in the way of an export."""
    targets = [exporter(name) for name in dict.fromkeys(options.export)]
    for target in targets if options.resume else ():
        already_there(directory.path, target.name, finished=False)
    return targets


def export_missing(run: Path, targets: Iterable[ExportFormat], view: ProgressView) -> None:
    """Export to each format of which the run has no export yet."""
    for target in targets:
        place = export_directory(run, target.name)
        if already_there(run, target.name):
            view.note(f"{place} is already there")
        else:
            export(run, target.name, place)


def open_model(model: str | Path | PreTrainedModel, phases: Iterable[AlgorithmConfig] = ()) -> BlockwiseModel:
    """A checkpoint directory, a hub id or a module, ready to be walked, with what `phases` make of it."""
    if isinstance(model, str | Path):
        opened = BlockwiseModel.from_directory(resolve_directory(model))
    else:
        if isinstance(model, torch.nn.Module):
            refuse_quantized(model)
        opened = BlockwiseModel.from_module(model)
    for phase in phases:
        opened = MODEL_PHASES[phase.name](opened, phase)
    return opened


def _quantizer(model: BlockwiseModel, plan: Plan, config: Config, device: torch.device) -> BlockQuantizer:
    """What quantizes the blocks. It may try on the model what can be scaled, so that comes before anything changes."""
    configs = {name: linear.config for name, linear in plan.contents.linears.items() if linear.config is not None}
    codes = config.codes
    turned = {name for name, linear in model.linears().items() if linear.scales_at > 0}
    inputs, scalers = plan.contents.activations, []
    for search in config.scale_searches:
        where, head = scalings(model, search.scaling_layers), head_dim(model)
        scalers.append(ChannelScaler(search, model.source, configs, inputs, where, head, codes.compensates, turned))
    targets = Targets(configs, inputs)
    return BlockQuantizer(model, targets, codes, device, scalers=scalers, refinements=config.at("block"))


def _calibration(
    model: BlockwiseModel, config: Config, plan: Plan, data: CalibrationData | None, tokenizer: Any
) -> CalibrationSet | None:
    if isinstance(data, str) and data == NO_CALIBRATION:
        searching = [found.name for found in config.algo_config if found.needs.moment]
        if searching:
            raise ConfigError(f"{searching[0]} needs calibration data; use --algorithm rtn to quantize without")
        if plan.needs_data:
            raise ConfigError(
                "static activation scales need calibration data; give --calibration, or use a scheme with dynamic ones"
            )
        return None
    wanted = config.calibration
    load = partial(load_tokenizer, model.source.directory)  # for text only: a broken one is no matter to ids
    return calibration_set(data, tokenizer, wanted.num_samples, wanted.sequence_length, config.seed, load)


def _check(data: CalibrationSet | None, model: BlockwiseModel, plan: Plan, config: Config) -> list[str]:
    """CalibrationError for data that the model cannot take; warnings for sequences that are too long and for fewer
    tokens than input channels, with which H is singular."""
    if data is None:
        return []
    check_tokens(model, data.batches)
    warnings = check_length(model, max(batch["input_ids"].shape[1] for batch in data.batches))
    widths = [linear.shape[1] for linear in plan.contents.weights]
    if config.codes.needs.moment and widths and data.tokens < max(widths):
        warnings.append(
            f"{data.tokens} calibration tokens are fewer than the {max(widths)} inputs of the widest linear, so "
            f"{config.codes.name} fits weights to this text; give more (--num-samples, --sequence-length)"
        )
    return warnings


def _check_weights(model: BlockwiseModel) -> None:
    """Read every tensor once, so that NaN and infinity are found before any work."""
    names = {name for index in range(len(model)) for name in model.block_tensors(index)} | set(model.outside_tensors())
    for name in sorted(names):
        model.source.read([name])
    trim_heap()


def _identity(model: BlockwiseModel, config: Config, data: CalibrationSet | None, plan: Plan) -> Identity:
    described = model.config.to_dict()
    described.pop("transformers_version", None)
    architecture = json.dumps(described, sort_keys=True, default=str)
    fingerprint = hashlib.sha256((model.source.fingerprint() + architecture).encode()).hexdigest()
    return Identity(
        recipe=config.to_dict(),
        model=fingerprint,
        calibration=data.fingerprint() if data is not None else NO_CALIBRATION,
        version=__version__,
        libraries={"torch": torch.__version__, "transformers": transformers.__version__},
        num_blocks=len(model),
        contents=plan.contents.facts(),
    )


def _side_files(model: BlockwiseModel, tokenizer: Any) -> AbstractContextManager[tuple[Path, list[str]]]:
    """The directory of configuration, tokenizer and other files beside the weights, and notes on what was mended."""
    if model.module is not None:
        return saved_side_files(model.module, model.config, tokenizer)
    assert model.source.directory is not None
    return nullcontext((model.source.directory, []))


def _described(
    model: str | Path | PreTrainedModel,
    blockwise: BlockwiseModel,
    device: torch.device,
    data: CalibrationSet | None,
    forward: str,
) -> dict[str, Any]:
    """The run, for the report."""
    used: dict[str, Any] = {"source": NO_CALIBRATION, "sequences": 0, "tokens": 0}
    if data is not None:
        used = {name: getattr(data, name) for name in ("source", "sequences", "requested", "tokens")}
    return {
        "model": str(model) if isinstance(model, str | Path) else type(model).__name__,
        "architecture": blockwise.architecture.name,
        "blocks": len(blockwise),
        "device": str(device),
        "compute_dtype": "float32",
        "forward": forward,
        "calibration": used,
    }

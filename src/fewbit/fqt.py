"""FullQuantTransformer's names, as its README writes them: `from fewbit.fqt import GPTQConfig, DataRecorder, …`.

They are fewbit's own; only two mean something else than in `fewbit`, where GPTQConfig and SmoothQuantConfig are the
options of the methods alone. The differences are in docs/coming-from.md.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from fewbit.algorithms.scale_search import ScaleSearch
from fewbit.calibration.recorded import DefaultDataset, build_calib_dataset_inputs
from fewbit.calibration.recorder import DataRecorder
from fewbit.engine import sequential, sequential_smoothing
from fewbit.engine.layer_stack import Inputs
from fewbit.engine.sequential import SequentialGPTQConfig as GPTQConfig
from fewbit.engine.sequential_smoothing import SequentialSmoothQuantConfig as SmoothQuantConfig
from fewbit.engine.stage_quantizer import LinearResult
from fewbit.io import dump, load
from fewbit.models.forward_manager import LayerForwardManager, forward_manager
from fewbit.nn.fake_quant import FakeQuantLinear, FP8FakeLinear, W4A16FakeLinear, W8A8FakeLinear
from fewbit.nn.quant_linear import QuantLinear
from fewbit.nn.quantizer import Quantizer
from fewbit.runs.progress import setup_logging

build_calib_datset_inputs = build_calib_dataset_inputs
FP8Linear = FP8FakeLinear
"""Computes with the values of FP8, in float."""

__all__ = [
    "DataRecorder",
    "DefaultDataset",
    "FP8Linear",
    "FakeQuantLinear",
    "GPTQConfig",
    "LayerForwardManager",
    "QuantLinear",
    "Quantizer",
    "SmoothQuantConfig",
    "W4A16FakeLinear",
    "W8A8FakeLinear",
    "build_calib_dataset_inputs",
    "build_calib_datset_inputs",
    "dump",
    "forward_manager",
    "load",
    "run_gptq_for_sequential_layers",
    "run_smooth_quant_for_sequential_layers",
    "setup_logging",
]


def run_gptq_for_sequential_layers(
    layers: Iterable[nn.Module], inputs: Inputs, cfg: GPTQConfig, **options: Any
) -> dict[str, LinearResult]:
    """`fewbit.run_gptq_for_sequential_layers` with everything in one config; `options` are its keyword arguments."""
    return sequential.run_gptq_for_sequential_layers(layers, inputs, cfg, **options)


def run_smooth_quant_for_sequential_layers(
    layers: Iterable[nn.Module], inputs: Inputs, cfg: SmoothQuantConfig, **options: Any
) -> dict[str, ScaleSearch]:
    """`fewbit.run_smooth_quant_for_sequential_layers` with everything in one config; `options` as above."""
    return sequential_smoothing.run_smooth_quant_for_sequential_layers(layers, inputs, cfg, **options)

"""FullQuantTransformer's names, as its README writes them: `from fewbit.fqt import GPTQConfig, DataRecorder, …`.

They are fewbit's own; only two mean something else than in `fewbit`, where GPTQConfig and SmoothQuantConfig are the
options of the methods alone. The differences are in docs/coming-from.md.
"""

from collections.abc import Iterable
from typing import Any

from torch import nn

from fewbit.algorithms.scale_search import ScaleSearch
from fewbit.calibration.recorded import DefaultDataset as DefaultDataset
from fewbit.calibration.recorded import build_calib_dataset_inputs as build_calib_dataset_inputs
from fewbit.calibration.recorder import DataRecorder as DataRecorder
from fewbit.engine import sequential, sequential_smoothing
from fewbit.engine.layer_stack import Inputs
from fewbit.engine.sequential import SequentialGPTQConfig as GPTQConfig
from fewbit.engine.sequential_smoothing import SequentialSmoothQuantConfig as SmoothQuantConfig
from fewbit.engine.stage_quantizer import LinearResult
from fewbit.io import dump as dump
from fewbit.io import load as load
from fewbit.models.forward_manager import LayerForwardManager as LayerForwardManager
from fewbit.models.forward_manager import forward_manager as forward_manager
from fewbit.nn.fake_quant import FakeQuantLinear as FakeQuantLinear
from fewbit.nn.fake_quant import FP8FakeLinear as FP8FakeLinear
from fewbit.nn.fake_quant import W4A16FakeLinear as W4A16FakeLinear
from fewbit.nn.fake_quant import W8A8FakeLinear as W8A8FakeLinear
from fewbit.nn.quant_linear import QuantLinear as QuantLinear
from fewbit.nn.quantizer import Quantizer as Quantizer
from fewbit.runs.progress import setup_logging as setup_logging

build_calib_datset_inputs = build_calib_dataset_inputs
FP8Linear = FP8FakeLinear
"""Computes with the values of FP8, in float."""


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

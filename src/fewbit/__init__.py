"""fewbit: quantize large language models after training.

The names below are imported when they are first used, so that `fewbit --help` does not wait for torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from fewbit.version import __version__ as __version__

if TYPE_CHECKING:
    from fewbit.api import Run as Run
    from fewbit.api import evaluate as evaluate
    from fewbit.api import quantize as quantize
    from fewbit.calibration.recorded import DefaultDataset as DefaultDataset
    from fewbit.calibration.recorded import build_calib_dataset_inputs as build_calib_dataset_inputs
    from fewbit.calibration.recorder import DataRecorder as DataRecorder
    from fewbit.config.algorithms import AlgorithmConfig as AlgorithmConfig
    from fewbit.config.algorithms import AWQConfig as AWQConfig
    from fewbit.config.algorithms import GPTQConfig as GPTQConfig
    from fewbit.config.algorithms import RTNConfig as RTNConfig
    from fewbit.config.algorithms import ScalingLayer as ScalingLayer
    from fewbit.config.algorithms import SmoothQuantConfig as SmoothQuantConfig
    from fewbit.config.quark import Dtype as Dtype
    from fewbit.config.quark import PerBlockMXDiffsObserver as PerBlockMXDiffsObserver
    from fewbit.config.quark import PerBlockMXObserver as PerBlockMXObserver
    from fewbit.config.quark import PerChannelMinMaxObserver as PerChannelMinMaxObserver
    from fewbit.config.quark import PerGroupMinMaxObserver as PerGroupMinMaxObserver
    from fewbit.config.quark import PerTensorHistogramObserver as PerTensorHistogramObserver
    from fewbit.config.quark import PerTensorHistogramObserverPro as PerTensorHistogramObserverPro
    from fewbit.config.quark import PerTensorMinMaxObserver as PerTensorMinMaxObserver
    from fewbit.config.quark import PerTensorMSEObserver as PerTensorMSEObserver
    from fewbit.config.quark import PerTensorPercentileObserver as PerTensorPercentileObserver
    from fewbit.config.quark import PlaceholderObserver as PlaceholderObserver
    from fewbit.config.quark import QSchemeType as QSchemeType
    from fewbit.config.quark import QuantizationMode as QuantizationMode
    from fewbit.config.quark import RoundType as RoundType
    from fewbit.config.quark import ScaleType as ScaleType
    from fewbit.config.quark import ZeroPointType as ZeroPointType
    from fewbit.config.quark_specs import *  # noqa: F403
    from fewbit.config.recipe import CalibrationConfig as CalibrationConfig
    from fewbit.config.recipe import Config as Config
    from fewbit.config.spec import AttentionConfig as AttentionConfig
    from fewbit.config.spec import QuantizationConfig as QuantizationConfig
    from fewbit.config.spec import QuantizationSpec as QuantizationSpec
    from fewbit.errors import FewbitError as FewbitError
    from fewbit.evaluation.reference import Reference as Reference
    from fewbit.io import dump as dump
    from fewbit.io import load as load
    from fewbit.model_quantizer import ModelQuantizer as ModelQuantizer
    from fewbit.models.forward_manager import LayerForwardManager as LayerForwardManager
    from fewbit.models.forward_manager import forward_manager as forward_manager
    from fewbit.nn.fake_quant import FakeQuantConv2d as FakeQuantConv2d
    from fewbit.nn.fake_quant import FakeQuantLinear as FakeQuantLinear
    from fewbit.nn.fake_quant import FP8FakeLinear as FP8FakeLinear
    from fewbit.nn.fake_quant import W4A4FakeLinear as W4A4FakeLinear
    from fewbit.nn.fake_quant import W4A8FakeLinear as W4A8FakeLinear
    from fewbit.nn.fake_quant import W4A16FakeLinear as W4A16FakeLinear
    from fewbit.nn.fake_quant import W8A8FakeLinear as W8A8FakeLinear
    from fewbit.nn.kv_cache import QuantizedCache as QuantizedCache
    from fewbit.nn.quant_linear import QuantLinear as QuantLinear
    from fewbit.nn.quantizer import Quantizer as Quantizer
    from fewbit.pipeline.progress import setup_logging as setup_logging
    from fewbit.pipeline.sequential import SequentialGPTQConfig as SequentialGPTQConfig
    from fewbit.pipeline.sequential import run_gptq_for_sequential_layers as run_gptq_for_sequential_layers
    from fewbit.pipeline.sequential_smoothing import SequentialSmoothQuantConfig as SequentialSmoothQuantConfig
    from fewbit.pipeline.sequential_smoothing import (
        run_smooth_quant_for_sequential_layers as run_smooth_quant_for_sequential_layers,
    )
    from fewbit.ptq import calibrate as calibrate
    from fewbit.ptq import freeze as freeze
    from fewbit.ptq import quantize_ as quantize_
    from fewbit.tensor import QuantTensor as QuantTensor

    QConfig, QLayerConfig, QTensorConfig = Config, QuantizationConfig, QuantizationSpec
    AlgoConfig = AlgorithmConfig
    build_calib_datset_inputs = build_calib_dataset_inputs

_HOME = {
    "Run": "fewbit.api",
    "evaluate": "fewbit.api",
    "quantize": "fewbit.api",
    "DefaultDataset": "fewbit.calibration.recorded",
    "build_calib_dataset_inputs": "fewbit.calibration.recorded",
    "DataRecorder": "fewbit.calibration.recorder",
    "AWQConfig": "fewbit.config.algorithms",
    "AlgorithmConfig": "fewbit.config.algorithms",
    "GPTQConfig": "fewbit.config.algorithms",
    "RTNConfig": "fewbit.config.algorithms",
    "ScalingLayer": "fewbit.config.algorithms",
    "SmoothQuantConfig": "fewbit.config.algorithms",
    "Dtype": "fewbit.config.quark",
    "PerBlockMXDiffsObserver": "fewbit.config.quark",
    "PerBlockMXObserver": "fewbit.config.quark",
    "PerChannelMinMaxObserver": "fewbit.config.quark",
    "PerGroupMinMaxObserver": "fewbit.config.quark",
    "PerTensorHistogramObserver": "fewbit.config.quark",
    "PerTensorHistogramObserverPro": "fewbit.config.quark",
    "PerTensorMinMaxObserver": "fewbit.config.quark",
    "PerTensorMSEObserver": "fewbit.config.quark",
    "PerTensorPercentileObserver": "fewbit.config.quark",
    "PlaceholderObserver": "fewbit.config.quark",
    "QSchemeType": "fewbit.config.quark",
    "QuantizationMode": "fewbit.config.quark",
    "RoundType": "fewbit.config.quark",
    "ScaleType": "fewbit.config.quark",
    "ZeroPointType": "fewbit.config.quark",
    "BFP16Spec": "fewbit.config.quark_specs",
    "Bfloat16Spec": "fewbit.config.quark_specs",
    "FP4PerGroupSpec": "fewbit.config.quark_specs",
    "FP6E2M3PerGroupSpec": "fewbit.config.quark_specs",
    "FP6E3M2PerGroupSpec": "fewbit.config.quark_specs",
    "FP8E4M3PerChannelSpec": "fewbit.config.quark_specs",
    "FP8E4M3PerGroupSpec": "fewbit.config.quark_specs",
    "FP8E4M3PerTensorSpec": "fewbit.config.quark_specs",
    "FP8E5M2PerChannelSpec": "fewbit.config.quark_specs",
    "FP8E5M2PerGroupSpec": "fewbit.config.quark_specs",
    "FP8E5M2PerTensorSpec": "fewbit.config.quark_specs",
    "Float16Spec": "fewbit.config.quark_specs",
    "Int2PerGroupSpec": "fewbit.config.quark_specs",
    "Int3PerChannelSpec": "fewbit.config.quark_specs",
    "Int3PerGroupSpec": "fewbit.config.quark_specs",
    "Int4PerChannelSpec": "fewbit.config.quark_specs",
    "Int4PerGroupSpec": "fewbit.config.quark_specs",
    "Int4PerTensorSpec": "fewbit.config.quark_specs",
    "Int8PerChannelSpec": "fewbit.config.quark_specs",
    "Int8PerGroupSpec": "fewbit.config.quark_specs",
    "Int8PerTensorSpec": "fewbit.config.quark_specs",
    "MX6Spec": "fewbit.config.quark_specs",
    "MX9Spec": "fewbit.config.quark_specs",
    "OCP_MXFP4Spec": "fewbit.config.quark_specs",
    "OCP_MXFP6E2M3Spec": "fewbit.config.quark_specs",
    "OCP_MXFP6E3M2Spec": "fewbit.config.quark_specs",
    "OCP_MXFP8E4M3Spec": "fewbit.config.quark_specs",
    "OCP_MXFP8E5M2Spec": "fewbit.config.quark_specs",
    "OCP_MXINT8Spec": "fewbit.config.quark_specs",
    "ProgressiveSpec": "fewbit.config.quark_specs",
    "ScaleQuantSpec": "fewbit.config.quark_specs",
    "Uint4PerChannelSpec": "fewbit.config.quark_specs",
    "Uint4PerGroupSpec": "fewbit.config.quark_specs",
    "Uint4PerTensorSpec": "fewbit.config.quark_specs",
    "Uint8PerChannelSpec": "fewbit.config.quark_specs",
    "Uint8PerGroupSpec": "fewbit.config.quark_specs",
    "Uint8PerTensorSpec": "fewbit.config.quark_specs",
    "CalibrationConfig": "fewbit.config.recipe",
    "Config": "fewbit.config.recipe",
    "AttentionConfig": "fewbit.config.spec",
    "QuantizationConfig": "fewbit.config.spec",
    "QuantizationSpec": "fewbit.config.spec",
    "FewbitError": "fewbit.errors",
    "Reference": "fewbit.evaluation.reference",
    "dump": "fewbit.io",
    "load": "fewbit.io",
    "ModelQuantizer": "fewbit.model_quantizer",
    "LayerForwardManager": "fewbit.models.forward_manager",
    "forward_manager": "fewbit.models.forward_manager",
    "FP8FakeLinear": "fewbit.nn.fake_quant",
    "FakeQuantConv2d": "fewbit.nn.fake_quant",
    "FakeQuantLinear": "fewbit.nn.fake_quant",
    "W4A16FakeLinear": "fewbit.nn.fake_quant",
    "W4A4FakeLinear": "fewbit.nn.fake_quant",
    "W4A8FakeLinear": "fewbit.nn.fake_quant",
    "W8A8FakeLinear": "fewbit.nn.fake_quant",
    "QuantizedCache": "fewbit.nn.kv_cache",
    "QuantLinear": "fewbit.nn.quant_linear",
    "Quantizer": "fewbit.nn.quantizer",
    "setup_logging": "fewbit.pipeline.progress",
    "SequentialGPTQConfig": "fewbit.pipeline.sequential",
    "run_gptq_for_sequential_layers": "fewbit.pipeline.sequential",
    "SequentialSmoothQuantConfig": "fewbit.pipeline.sequential_smoothing",
    "run_smooth_quant_for_sequential_layers": "fewbit.pipeline.sequential_smoothing",
    "calibrate": "fewbit.ptq",
    "freeze": "fewbit.ptq",
    "quantize_": "fewbit.ptq",
    "QuantTensor": "fewbit.tensor",
}
_ALIASES = {
    "QTensorConfig": "QuantizationSpec",  # Quark 0.11 renamed its classes; both names work
    "QLayerConfig": "QuantizationConfig",
    "QConfig": "Config",
    "AlgoConfig": "AlgorithmConfig",
    "build_calib_datset_inputs": "build_calib_dataset_inputs",  # as FullQuantTransformer spells it
}

__all__ = [*_HOME, *_ALIASES]


def __getattr__(name: str) -> Any:
    known = _ALIASES.get(name, name)
    if known not in _HOME:
        raise AttributeError(f"module 'fewbit' has no attribute {name!r}")
    return getattr(import_module(_HOME[known]), known)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME, *_ALIASES])

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
    from fewbit.engine.sequential import SequentialGPTQConfig as SequentialGPTQConfig
    from fewbit.engine.sequential import run_gptq_for_sequential_layers as run_gptq_for_sequential_layers
    from fewbit.engine.sequential_smoothing import SequentialSmoothQuantConfig as SequentialSmoothQuantConfig
    from fewbit.engine.sequential_smoothing import (
        run_smooth_quant_for_sequential_layers as run_smooth_quant_for_sequential_layers,
    )
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
    from fewbit.ptq import calibrate as calibrate
    from fewbit.ptq import freeze as freeze
    from fewbit.ptq import quantize_ as quantize_
    from fewbit.runs.progress import setup_logging as setup_logging
    from fewbit.tensor import QuantTensor as QuantTensor

    QConfig, QLayerConfig, QTensorConfig = Config, QuantizationConfig, QuantizationSpec
    AlgoConfig = AlgorithmConfig
    build_calib_datset_inputs = build_calib_dataset_inputs

_NAMES = {
    "api": "Run evaluate quantize",
    "calibration.recorded": "DefaultDataset build_calib_dataset_inputs",
    "calibration.recorder": "DataRecorder",
    "config.algorithms": "AWQConfig AlgorithmConfig GPTQConfig RTNConfig ScalingLayer SmoothQuantConfig",
    "config.quark": """
        Dtype PerBlockMXDiffsObserver PerBlockMXObserver PerChannelMinMaxObserver PerGroupMinMaxObserver
        PerTensorHistogramObserver PerTensorHistogramObserverPro PerTensorMSEObserver PerTensorMinMaxObserver
        PerTensorPercentileObserver PlaceholderObserver QSchemeType QuantizationMode RoundType ScaleType
        ZeroPointType
    """,
    "config.quark_specs": """
        BFP16Spec Bfloat16Spec FP4PerGroupSpec FP6E2M3PerGroupSpec FP6E3M2PerGroupSpec FP8E4M3PerChannelSpec
        FP8E4M3PerGroupSpec FP8E4M3PerTensorSpec FP8E5M2PerChannelSpec FP8E5M2PerGroupSpec FP8E5M2PerTensorSpec
        Float16Spec Int2PerGroupSpec Int3PerChannelSpec Int3PerGroupSpec Int4PerChannelSpec Int4PerGroupSpec
        Int4PerTensorSpec Int8PerChannelSpec Int8PerGroupSpec Int8PerTensorSpec MX6Spec MX9Spec OCP_MXFP4Spec
        OCP_MXFP6E2M3Spec OCP_MXFP6E3M2Spec OCP_MXFP8E4M3Spec OCP_MXFP8E5M2Spec OCP_MXINT8Spec ProgressiveSpec
        ScaleQuantSpec Uint4PerChannelSpec Uint4PerGroupSpec Uint4PerTensorSpec Uint8PerChannelSpec
        Uint8PerGroupSpec Uint8PerTensorSpec
    """,
    "config.recipe": "CalibrationConfig Config",
    "config.spec": "AttentionConfig QuantizationConfig QuantizationSpec",
    "errors": "FewbitError",
    "evaluation.reference": "Reference",
    "io": "dump load",
    "model_quantizer": "ModelQuantizer",
    "models.forward_manager": "LayerForwardManager forward_manager",
    "nn.fake_quant": """
        FP8FakeLinear FakeQuantConv2d FakeQuantLinear W4A16FakeLinear W4A4FakeLinear W4A8FakeLinear W8A8FakeLinear
    """,
    "nn.kv_cache": "QuantizedCache",
    "nn.quant_linear": "QuantLinear",
    "nn.quantizer": "Quantizer",
    "runs.progress": "setup_logging",
    "engine.sequential": "SequentialGPTQConfig run_gptq_for_sequential_layers",
    "engine.sequential_smoothing": "SequentialSmoothQuantConfig run_smooth_quant_for_sequential_layers",
    "ptq": "calibrate freeze quantize_",
    "tensor": "QuantTensor",
}
"""What each module gives to `fewbit`."""
_HOME = {name: f"fewbit.{module}" for module, names in _NAMES.items() for name in names.split()}
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

"""The names of `fewbit`, for type checkers and for `__init__.py`, which reads them here."""

from fewbit import fqt as fqt
from fewbit import io as io
from fewbit import quark as quark
from fewbit.api import Run as Run
from fewbit.api import load as load
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
from fewbit.evaluation import evaluate as evaluate
from fewbit.evaluation.reference import Reference as Reference
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
from fewbit.version import __version__ as __version__

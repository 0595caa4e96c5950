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
    from fewbit.config.algorithms import AWQConfig as AWQConfig
    from fewbit.config.algorithms import GPTQConfig as GPTQConfig
    from fewbit.config.algorithms import RTNConfig as RTNConfig
    from fewbit.config.algorithms import SmoothQuantConfig as SmoothQuantConfig
    from fewbit.config.quark import Dtype as Dtype
    from fewbit.config.quark import PerBlockMXObserver as PerBlockMXObserver
    from fewbit.config.quark import PerChannelMinMaxObserver as PerChannelMinMaxObserver
    from fewbit.config.quark import PerGroupMinMaxObserver as PerGroupMinMaxObserver
    from fewbit.config.quark import PerTensorHistogramObserver as PerTensorHistogramObserver
    from fewbit.config.quark import PerTensorMinMaxObserver as PerTensorMinMaxObserver
    from fewbit.config.quark import PerTensorMSEObserver as PerTensorMSEObserver
    from fewbit.config.quark import PerTensorPercentileObserver as PerTensorPercentileObserver
    from fewbit.config.quark import PlaceholderObserver as PlaceholderObserver
    from fewbit.config.quark import QSchemeType as QSchemeType
    from fewbit.config.quark import RoundType as RoundType
    from fewbit.config.quark import ScaleType as ScaleType
    from fewbit.config.recipe import CalibrationConfig as CalibrationConfig
    from fewbit.config.recipe import Config as Config
    from fewbit.config.spec import AttentionConfig as AttentionConfig
    from fewbit.config.spec import QuantizationConfig as QuantizationConfig
    from fewbit.config.spec import QuantizationSpec as QuantizationSpec
    from fewbit.errors import FewbitError as FewbitError
    from fewbit.pipeline.progress import setup_logging as setup_logging
    from fewbit.tensor import QuantTensor as QuantTensor

_HOME = {
    "Run": "fewbit.api",
    "evaluate": "fewbit.api",
    "quantize": "fewbit.api",
    "AWQConfig": "fewbit.config.algorithms",
    "GPTQConfig": "fewbit.config.algorithms",
    "RTNConfig": "fewbit.config.algorithms",
    "SmoothQuantConfig": "fewbit.config.algorithms",
    "Dtype": "fewbit.config.quark",
    "PerBlockMXObserver": "fewbit.config.quark",
    "PerChannelMinMaxObserver": "fewbit.config.quark",
    "PerGroupMinMaxObserver": "fewbit.config.quark",
    "PerTensorHistogramObserver": "fewbit.config.quark",
    "PerTensorMinMaxObserver": "fewbit.config.quark",
    "PerTensorMSEObserver": "fewbit.config.quark",
    "PerTensorPercentileObserver": "fewbit.config.quark",
    "PlaceholderObserver": "fewbit.config.quark",
    "QSchemeType": "fewbit.config.quark",
    "RoundType": "fewbit.config.quark",
    "ScaleType": "fewbit.config.quark",
    "CalibrationConfig": "fewbit.config.recipe",
    "Config": "fewbit.config.recipe",
    "AttentionConfig": "fewbit.config.spec",
    "QuantizationConfig": "fewbit.config.spec",
    "QuantizationSpec": "fewbit.config.spec",
    "FewbitError": "fewbit.errors",
    "setup_logging": "fewbit.pipeline.progress",
    "QuantTensor": "fewbit.tensor",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'fewbit' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])

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
    from fewbit.config.recipe import CalibrationConfig as CalibrationConfig
    from fewbit.config.recipe import Config as Config
    from fewbit.config.recipe import GPTQConfig as GPTQConfig
    from fewbit.config.recipe import RTNConfig as RTNConfig
    from fewbit.config.spec import QuantizationConfig as QuantizationConfig
    from fewbit.config.spec import QuantizationSpec as QuantizationSpec
    from fewbit.errors import FewbitError as FewbitError
    from fewbit.pipeline.progress import setup_logging as setup_logging
    from fewbit.tensor import QuantTensor as QuantTensor

_HOME = {
    "Run": "fewbit.api",
    "evaluate": "fewbit.api",
    "quantize": "fewbit.api",
    "CalibrationConfig": "fewbit.config.recipe",
    "Config": "fewbit.config.recipe",
    "GPTQConfig": "fewbit.config.recipe",
    "RTNConfig": "fewbit.config.recipe",
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

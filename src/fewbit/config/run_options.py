"""How a run or an evaluation is carried out. What a run computes is decided by the recipe, the model and the data.

The docstrings under these fields are the help of the command line.
"""

import re
from dataclasses import dataclass

import torch

from fewbit.errors import ConfigError, RunError, shown

_UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}


@dataclass(frozen=True)
class ComputeOptions:
    """Where and in how much memory hidden states are computed."""

    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    activation_memory: str | int = "4GiB"
    """Memory for hidden states between blocks; what does not fit goes to disk."""


@dataclass(frozen=True)
class RunOptions(ComputeOptions):
    """How a run is carried out."""

    resume: bool = False
    """Continue an interrupted run."""
    export: tuple[str, ...] = ()
    """Also export to this format, into RUN/exports/FORMAT; may be repeated."""
    progress: bool = True
    """Show blocks, errors and the time left on stderr."""


@dataclass(frozen=True)
class EvaluationOptions(ComputeOptions):
    """How an evaluation is carried out."""

    sequence_length: int = 2048
    """Tokens per window."""
    max_windows: int | None = None
    """Use only the first windows of the text."""

    def __post_init__(self) -> None:
        if self.sequence_length < 2:
            raise ConfigError(f"the sequence length must be at least 2, not {self.sequence_length}")
        if self.max_windows is not None and self.max_windows < 1:
            raise ConfigError(f"the number of windows must be at least 1, not {self.max_windows}")


def choose_device(name: str) -> torch.device:
    """The device that computes. "auto" takes a CUDA GPU if there is one."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except (RuntimeError, TypeError):
        raise ConfigError(f"unknown device {shown(name)}; use auto, cpu, cuda or cuda:N") from None
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f"device {name!r} is not supported; use auto, cpu, cuda or cuda:N")
    if device.type == "cuda" and not (torch.cuda.is_available() and (device.index or 0) < torch.cuda.device_count()):
        raise RunError(f"device {name!r} was asked for, but this machine has no such GPU; use --device cpu")
    return device


def parse_size(value: str | int) -> int:
    """Bytes of "4GiB", "500MB" or a number."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", str(value))
    if match is None or match[2].lower() not in _UNITS:
        raise ConfigError(f"{shown(value)} is no size; write for example 4GiB or 500MB")
    return int(min(float(match[1]), 2.0**62) * _UNITS[match[2].lower()])

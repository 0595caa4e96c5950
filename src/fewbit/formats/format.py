"""What a format is: how a model lies in a directory, read by fewbit, and written for engines where they read it."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from fewbit.checkpoint.native import NativeCheckpoint, StoredStep
from fewbit.checkpoint.source import TensorSource
from fewbit.contents import Contents
from fewbit.errors import ConfigError
from fewbit.formats.verification import Verification
from fewbit.tensor import QuantizedActivation


@dataclass(frozen=True)
class Opened:
    """A model in a directory."""

    source: TensorSource | None = None
    """Its weights; None: the directory's own safetensors, as they are."""
    activations: Mapping[str, QuantizedActivation] = field(default_factory=dict)
    """What is quantized while it runs, by module and slot."""
    steps: Mapping[str, Sequence[StoredStep]] = field(default_factory=dict)
    """What happens to the inputs of linears, by their names."""


@dataclass(frozen=True)
class Format:
    """A format that fewbit reads."""

    name: str
    open: Callable[[Path], Opened | None]
    """The model in a directory, or None if something else is there."""


@dataclass(frozen=True)
class ExportFormat(Format):
    """A format of engines, which fewbit writes as well."""

    check: Callable[[Contents], None]
    """ConfigError for what the format cannot hold; before the work, or of a run."""
    layouts: Callable[[Contents], list[str]]
    """What the format calls the ways in which the weights lie."""
    engines: Callable[[Contents], str]
    """Engines that load it, each with what it needs or does otherwise in brackets; "" if there are none."""
    notes: Callable[[Contents], list[str]]
    """What a user should know about loading it, in sentences."""
    write: Callable[[NativeCheckpoint, Path], None]
    """Write a run, which `check` has passed, into an empty directory."""
    verify: Callable[[Path, NativeCheckpoint], Verification]
    """Compare an export with the run by an independent decoder; VerificationError names the first difference."""

    def holds(self, contents: Contents) -> bool:
        """Whether such a run can be exported."""
        try:
            self.check(contents)
        except ConfigError:
            return False
        return True

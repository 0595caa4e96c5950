"""What a block has become so far, from its loading to its writing."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from fewbit.checkpoint.native import Smoothing
from fewbit.engine.stage_quantizer import LinearResult
from fewbit.models.architecture import Scaling


@dataclass(frozen=True)
class Found:
    """Scales of channels that were folded at one stage."""

    scaling: Scaling
    alpha: float
    """Exponent that was best."""
    columns: Tensor
    """[in]: what the readers' columns were multiplied by."""
    folded: tuple[str, ...]
    """Tensors around a norm that changed. (Those around a linear change exactly, so nobody has to know them.)"""


@dataclass
class BlockWork:
    """The results of one block's stages."""

    index: int
    prefix: str
    """What the full names of its modules begin with."""
    results: dict[str, LinearResult] = field(default_factory=dict)
    """Quantized linears by full name."""
    dense: dict[str, Tensor] = field(default_factory=dict)
    """Other tensors that changed."""
    found: list[Found] = field(default_factory=list)

    def smoothing(self) -> Smoothing:
        """What a resumed run has to know: what norms were divided by. Linears are divided exactly."""
        by_norm = [found for found in self.found if found.folded]
        columns = {f"{self.prefix}{name}": found.columns.cpu() for found in by_norm for name in found.scaling.readers}
        return Smoothing(columns, tuple(name for found in by_norm for name in found.folded))

    def alpha_of(self, name: str) -> float | None:
        """Exponent of the scales that a linear's input was divided by; None if it was not."""
        inside = name.removeprefix(self.prefix)
        exponents = [found.alpha for found in self.found if inside in found.scaling.readers]
        return exponents[0] if exponents else None

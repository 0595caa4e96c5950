"""What a block has become so far, from its loading to its writing."""

from dataclasses import dataclass, field

from torch import Tensor

from fewbit.checkpoint.native import StoredStep
from fewbit.engine.stage_quantizer import LinearResult
from fewbit.models.architecture import Scaling


@dataclass(frozen=True)
class FoldedScale:
    """Channel scales that were folded at one stage."""

    scaling: Scaling
    alpha: float
    """Exponent that was best."""
    columns: Tensor
    """[in]: what the consumers' columns were multiplied by."""
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
    scales: list[FoldedScale] = field(default_factory=list)

    steps: dict[str, list[StoredStep]] = field(default_factory=dict)
    """Of linears' inputs by full name: what a run stores."""

    @property
    def folded(self) -> list[str]:
        """Tensors around norms that changed, which a resumed run has to know. Linears are divided exactly."""
        return list(dict.fromkeys(name for found in self.scales for name in found.folded))

    def divided_by_norms(self) -> set[str]:
        """Full names of the linears that divide their input by what a norm was divided by."""
        return {f"{self.prefix}{name}" for found in self.scales if found.folded for name in found.scaling.consumers}

    def alpha_of(self, name: str) -> float | list[float] | None:
        """Exponent of the scales that a linear's input was divided by (one for each of several searches); None if it
        was not."""
        inside = name.removeprefix(self.prefix)
        exponents = [found.alpha for found in self.scales if inside in found.scaling.consumers]
        return exponents if len(exponents) > 1 else next(iter(exponents), None)

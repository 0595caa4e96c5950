"""What every weight quantization method gives back."""

from dataclasses import dataclass

from torch import Tensor

from fewbit.tensor import QuantTensor


@dataclass(frozen=True)
class Outcome:
    """A quantized weight and how it went; None is what did not happen or was not computed."""

    weight: QuantTensor
    damping: float | None = None
    """Share of mean(diag H) that was added to H's diagonal."""
    fallback: str | None = None
    """Why another method than the requested one was used."""
    error: Tensor | None = None
    """δ H δᵀ of each row, float64 [rows], against the weight that was given."""

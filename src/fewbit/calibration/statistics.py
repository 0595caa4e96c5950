"""What calibration keeps of the input of a group of linears."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fewbit.errors import CalibrationError
from fewbit.numerics import second_moment


@dataclass
class Statistics:
    """Token count and second moment of one input. Complete after `finish`."""

    moment: Tensor
    """H = XᵀX, [channels, channels] float32; only its upper tiles are filled before `finish`."""
    tokens: int = 0

    @classmethod
    def empty(cls, channels: int, device: torch.device | str = "cpu") -> Statistics:
        return cls(torch.zeros(channels, channels, device=device))

    def add(self, x: Tensor, mask: Tensor | None = None) -> None:
        """Count the tokens of `x` [..., channels]; `mask` [...] bool leaves padding out."""
        rows = x.reshape(-1, x.shape[-1]) if mask is None else x[mask]
        second_moment.accumulate(self.moment, rows.float())
        self.tokens += rows.shape[0]

    def finish(self, name: str) -> Statistics:
        """Mirror H; CalibrationError if `name`'s inputs held NaN or infinity."""
        second_moment.symmetrize(self.moment)
        diagonal = self.moment.diagonal()  # a non-finite input makes its own square non-finite
        if not bool(torch.isfinite(diagonal).all()):
            channel = int((~torch.isfinite(diagonal)).nonzero()[0])
            raise CalibrationError(
                f"the input of {name!r} holds NaN or infinity (channel {channel}); is the model damaged?"
            )
        return self

"""Statistics of the input of a group of linears."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from fewbit.errors import CalibrationError
from fewbit.numerics import second_moment


@dataclass
class Statistics:
    """Token count, second moment, largest values and drift of one input. Complete after `finish`."""

    moment: Tensor
    """H = XᵀX, [channels, channels] float32; only its upper tiles are filled before `finish`."""
    tokens: int = 0
    drift: Tensor | None = None
    """(X̃ − X)ᵀX, [channels, channels] float32, where X̃ is the same input in the full-precision model. It may be
    measured on some of the tokens only; `finish` scales it to all. None if it is not measured at all."""
    drift_tokens: int = 0

    largest: Tensor | None = None
    """Largest magnitude of each channel over all tokens, [channels] float32; None before the first."""

    wanted_sample: int = 0
    """Tokens of the input to keep."""
    _kept: list[Tensor] = field(default_factory=list)
    _stride: int = 1
    outliers: Tensor | None = None
    """The tokens [tokens, channels] with the largest values, an eighth as many as the sample. A few tokens, such as
    the first of a sequence, can hold most of the error of quantized activations, and a sample misses them."""

    @classmethod
    def empty(cls, channels: int, device: torch.device | str = "cpu", sample: int = 0) -> Statistics:
        return cls(torch.zeros(channels, channels, device=device), wanted_sample=sample)

    @property
    def sample(self) -> Tensor | None:
        """Evenly spaced tokens of the input [tokens, channels], at most as many as were wanted; None if none were."""
        if not self._kept:
            return None
        kept = torch.cat(self._kept)
        count = min(self.wanted_sample, kept.shape[0])
        return kept[torch.arange(count, device=kept.device) * kept.shape[0] // count] if count else kept

    def add(
        self, x: Tensor, mask: Tensor | None = None, reference: Tensor | None = None, known: Tensor | None = None
    ) -> None:
        """Count the tokens of `x` [..., channels]; `mask` [...] bool leaves padding out.

        `reference`, of the same shape, is the input of the same tokens in the full-precision model; `known` [...] bool
        says for which of them it is, where that is not for all.
        """
        rows = _rows(x, mask)
        second_moment.accumulate(self.moment, rows)
        if rows.shape[0]:
            largest = torch.maximum(rows.amax(0), -rows.amin(0))
            self.largest = largest if self.largest is None else torch.maximum(self.largest, largest)
        if self.wanted_sample:
            self._keep(rows)
        self.tokens += rows.shape[0]
        if reference is not None:
            if self.drift is None:
                self.drift = torch.zeros_like(self.moment)
            if known is not None:
                known = known if mask is None else known & mask
                mask, rows = known, _rows(x, known)
            if rows.shape[0]:
                second_moment.accumulate_product(self.drift, _rows(reference, mask) - rows, rows)
            self.drift_tokens += rows.shape[0]

    def scaled(self, columns: Tensor) -> Statistics:
        """Of the input divided by `columns` [channels]: H / (s sᵀ), and all else likewise."""
        return replace(
            self,
            moment=_divided(self.moment, columns),
            drift=None if self.drift is None else _divided(self.drift, columns),
            largest=None if self.largest is None else self.largest / columns,
            outliers=None if self.outliers is None else self.outliers / columns,
            _kept=[kept / columns for kept in self._kept],
        )

    def _keep(self, rows: Tensor) -> None:
        """Every n-th token; n doubles whenever too many were kept."""
        self._kept.append(rows[-self.tokens % self._stride :: self._stride].clone())
        while sum(kept.shape[0] for kept in self._kept) >= 2 * self.wanted_sample:
            self._kept = [torch.cat(self._kept)[::2]]
            self._stride *= 2
        rows = rows if self.outliers is None else torch.cat([self.outliers, rows])
        count = min(rows.shape[0], max(1, self.wanted_sample // 8))
        largest = rows.abs().amax(1).sort(descending=True, stable=True).indices[:count]  # of equal ones the first
        self.outliers = rows[largest.sort().values].clone()

    def finish(self, name: str) -> Statistics:
        """Mirror H; CalibrationError if `name`'s inputs held NaN or infinity."""
        second_moment.symmetrize(self.moment)
        if self.drift is not None:
            self.drift *= self.tokens / max(1, self.drift_tokens)
        diagonal = self.moment.diagonal()  # a non-finite input makes its own square non-finite
        if not bool(torch.isfinite(diagonal).all()):
            channel = int((~torch.isfinite(diagonal)).nonzero()[0])
            raise CalibrationError(
                f"the input of {name!r} holds NaN or infinity (channel {channel}); is the model damaged?"
            )
        return self


def _divided(moment: Tensor, scale: Tensor) -> Tensor:
    by = scale.reciprocal()
    divided: Tensor = moment * by.unsqueeze(1) * by
    return divided


def _rows(x: Tensor, mask: Tensor | None) -> Tensor:
    """Tokens that count, [tokens, channels] float32."""
    return (x.reshape(-1, x.shape[-1]) if mask is None else x[mask]).float()

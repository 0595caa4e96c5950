"""A histogram without a range: float32 values counted by sign, exponent and the leading bits of their mantissa.

Bins are ranges of bit patterns, so a value's bin depends on the value alone, and integer counts add up to the same in
any order: however data is cut into batches, the histogram is the same, bit for bit. (Usual histograms stretch their
bins when a batch exceeds their range, and depend on the order.)
"""

import torch
from torch import Tensor

MANTISSA_BITS = 10  # of float32's 23: bins are 0.1 % wide, an eighth of the widest step of an 8-bit grid or less
FEWEST_MANTISSA_BITS = 5
MANY_TILES = 128  # from here on bins are wider, so that 4096 tiles take about 100 MB
FLOAT32_MANTISSA = 23
MAGNITUDE = 0x7FFFFFFF  # all bits of a float32 but its sign


class FloatHistogram:
    """Counts of the values of some tiles, each counted on its own.

    counts [tiles, 2n + 1] int64 in the order of the values: n bins of negative numbers, one of zero (and of what is
    below 2^-126), n of positive ones, which hold all bit patterns from the smallest to the largest magnitude seen.
    """

    def __init__(self, tiles: int, device: torch.device | str = "cpu") -> None:
        spare = max(0, (tiles - 1).bit_length() - (MANY_TILES - 1).bit_length())
        self.mantissa_bits = max(FEWEST_MANTISSA_BITS, MANTISSA_BITS - spare)
        self._shift = FLOAT32_MANTISSA - self.mantissa_bits
        self._first = 0
        """Bit pattern, shifted, of the smallest magnitude's bin."""
        self.counts = torch.zeros(tiles, 1, dtype=torch.int64, device=device)

    @property
    def bins(self) -> int:
        """n: of either sign."""
        return self.counts.shape[1] // 2

    def add(self, tiles: Tensor) -> None:
        """Count `tiles` [tiles, values] float32."""
        pattern = tiles.contiguous().view(torch.int32)
        key = (pattern & MAGNITUDE) >> self._shift
        lowest_normal = 1 << self.mantissa_bits
        largest = int(key.max())
        if largest >= lowest_normal:
            self._grow(int(torch.where(key < lowest_normal, largest, key).min()), largest)
        place = (key - (self._first - 1)).clamp_(min=0) if self.bins else torch.zeros_like(key)
        place = torch.where(pattern < 0, -place, place) + self.bins
        width = self.counts.shape[1]
        place = place.long() + width * torch.arange(tiles.shape[0], device=tiles.device).unsqueeze(-1)
        self.counts += torch.bincount(place.flatten(), minlength=self.counts.numel()).view_as(self.counts)

    def _grow(self, smallest: int, largest: int) -> None:
        """Make room for bins from `smallest` to `largest`; counts stay with their bins."""
        before, old = self.bins, self._first if self.bins else smallest
        first = min(old, smallest)
        bins = max(old + before, largest + 1) - first
        if bins == before:
            return
        counts = self.counts.new_zeros(self.counts.shape[0], 2 * bins + 1)
        counts[:, bins] = self.counts[:, before]
        start = old - first
        counts[:, bins + 1 + start :][:, :before] = self.counts[:, before + 1 :]
        counts[:, bins - start - before :][:, :before] = self.counts[:, :before]
        self.counts, self._first = counts, first

    def edges(self) -> tuple[Tensor, Tensor]:
        """Smallest and largest magnitude of each of the n bins, float32 [n]."""
        key = torch.arange(self._first, self._first + self.bins, dtype=torch.int32, device=self.counts.device)
        low = key << self._shift
        high = low | ((1 << self._shift) - 1)
        return low.view(torch.float32), high.view(torch.float32)

    def points(self) -> tuple[Tensor, Tensor]:
        """What stands for the values when a grid is scored: points [p] float32 and how many values each stands for,
        [tiles, p] float32. Zeros, which every grid has, are left out. A bin is one point in its middle; a wider bin
        several, evenly spread, so that steps of a grid inside it are seen."""
        low, high = self.edges()
        parts = 1 << (MANTISSA_BITS - self.mantissa_bits)
        place = (torch.arange(parts, device=low.device) + 0.5) / parts
        magnitude = (low.unsqueeze(-1) + (high - low).unsqueeze(-1) * place).flatten()
        values = torch.cat([-magnitude.flip(0), magnitude])
        counts = torch.cat([self.counts[:, : self.bins], self.counts[:, self.bins + 1 :]], dim=1)
        used = (counts > 0).any(0)
        shares = (counts[:, used].float() / parts).repeat_interleave(parts, dim=1)
        return values[used.repeat_interleave(parts)], shares

    def magnitude_at(self, rank: int) -> Tensor:
        """The largest magnitude of the bin that holds the magnitude of that rank (0: the smallest). [tiles]"""
        magnitudes = self.counts[:, self.bins :].clone()
        magnitudes[:, 1:] += self.counts[:, : self.bins].flip(1)
        ends = torch.cat([self.edges()[1].new_zeros(1), self.edges()[1]])
        return ends[_bin_of(magnitudes, rank)]

    def value_at(self, rank: int, upper: bool) -> Tensor:
        """The upper or lower end of the bin that holds the value of that rank (0: the lowest). [tiles]"""
        near, far = self.edges()
        below, above = (near, far) if upper else (far, near)
        ends = torch.cat([-below.flip(0), near.new_zeros(1), above])
        return ends[_bin_of(self.counts, rank)]


def _bin_of(counts: Tensor, rank: int) -> Tensor:
    """Index of the bin of each row that holds its value of that rank."""
    wanted = torch.full_like(counts[:, :1], rank)
    return torch.searchsorted(counts.cumsum(1), wanted, right=True).squeeze(1)

"""Named schemes: each is a row of a table, not a class."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from fewbit.config.spec import QuantizationConfig, QuantizationSpec
from fewbit.errors import ConfigError, nearest

DEFAULT_GROUP_SIZE = 128
TYPICAL_SHAPE = (4096, 4096)
"""Of the weight whose bits are quoted: with one scale per channel they depend on it, a little."""


@dataclass(frozen=True)
class Scheme:
    """One row: the name that users know and what it stands for."""

    name: str
    config: QuantizationConfig
    exports: tuple[str, ...]
    engines: str

    @property
    def bits_per_weight(self) -> float:
        """Stored bits per weight of a 16-bit matrix: codes, scales and zero points."""
        spec = self.config.weight
        assert spec is not None
        return spec.stored_bits(TYPICAL_SHAPE) / math.prod(TYPICAL_SHAPE)


def _weight_only(bits: int, symmetric: bool) -> Scheme:
    spec = QuantizationSpec(
        dtype=f"int{bits}" if symmetric else f"uint{bits}",
        qscheme="per_group",
        group_size=DEFAULT_GROUP_SIZE,
        symmetric=symmetric,
    )
    name = f"W{bits}A16" + ("" if symmetric else "_ASYM")
    return Scheme(name, QuantizationConfig(weight=spec), ("compressed-tensors",), "vLLM, transformers")


SCHEMES: dict[str, Scheme] = {
    scheme.name: scheme for scheme in (_weight_only(bits, sym) for sym in (True, False) for bits in (8, 4, 3, 2))
}


def scheme_config(name: str, group_size: int | None = None) -> QuantizationConfig:
    """The QuantizationConfig of a named scheme; `group_size` replaces the default of 128, −1 means per channel."""
    scheme = SCHEMES.get(name.upper())
    if scheme is None:
        raise ConfigError(f"unknown scheme {name!r}{nearest(name.upper(), SCHEMES)} ('fewbit schemes' lists them)")
    return scheme.config if group_size is None else with_group_size(scheme.config, group_size)


def with_group_size(config: QuantizationConfig, group_size: int) -> QuantizationConfig:
    """The same config with another group size for the weight; −1 means one scale per output channel."""
    if config.weight is None:
        return config
    if group_size == -1:
        return replace(config, weight=replace(config.weight, qscheme="per_channel", group_size=None))
    if group_size < 1:
        raise ConfigError(f"group size must be a positive number, or -1 for one scale per channel, not {group_size}")
    return replace(config, weight=replace(config.weight, qscheme="per_group", group_size=group_size))

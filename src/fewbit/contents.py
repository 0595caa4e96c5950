"""What is in a run, or will be: the plan makes it before the work, the checkpoint after it, and both say the same.

Formats, reports and whoever else asks what a run holds read this. Nobody else takes names apart or knows families.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch

from fewbit.config.spec import AttentionConfig, QuantizationConfig, QuantizationSpec

LINEAR_SLOTS = ("input", "output")
NOMINAL_SHAPE = (4096, 4096)
"""Of the weight whose bits are quoted: with one scale per channel they depend on it, a little."""


@dataclass(frozen=True)
class LinearEntry:
    """A linear: what is quantized of it, or why nothing is."""

    name: str
    shape: tuple[int, int]
    """[out, in]"""
    config: QuantizationConfig | None
    """None if nothing is quantized. (A bias is stored rounded; a checkpoint does not know its spec.)"""
    rule: str = ""
    """The recipe's rule, or the reason, for which nothing is."""
    block: int | None = None
    """Number of the block that it is in, if it is in one."""
    role: str = ""
    """Its path inside the block, e.g. "self_attn.q_proj"."""
    routed: bool = False
    """Tokens are routed to it: it is part of an expert."""

    @property
    def weight(self) -> QuantizationSpec | None:
        return self.config.weight if self.config is not None else None

    @property
    def input(self) -> QuantizationSpec | None:
        return self.config.input_tensors if self.config is not None else None

    @property
    def output(self) -> QuantizationSpec | None:
        return self.config.output_tensors if self.config is not None else None

    @property
    def status(self) -> str:
        """A word for reports."""
        if self.config is not None:
            return "quantized" if self.config.weight is not None else "activations"
        return "excluded" if self.rule.startswith("exclude") else "skipped"

    @property
    def reason(self) -> str:
        """Why its weight stays as it is, if it does."""
        return self.rule or "its weight stays as it is"

    @property
    def weight_name(self) -> str:
        """Its weight's name among the stored tensors."""
        return f"{self.name}.weight"

    @property
    def block_rows(self) -> int | None:
        """Rows of the weight's blocks that share a scale; None if it has no blocks."""
        size = self.weight.block_size if self.weight is not None else None
        return size[0] if size is not None else None

    def stored_bits(self, dtype: torch.dtype = torch.bfloat16) -> int:
        """Of its weight, which the model's checkpoint holds in `dtype`."""
        assert self.weight is not None
        return self.weight.stored_bits(self.shape, dtype)


@dataclass(frozen=True)
class AttentionEntry:
    """An attention module."""

    name: str
    kind: str
    """Its class."""
    specs: Mapping[str, QuantizationSpec] = field(default_factory=dict)
    """What is quantized in it: key, value, query, probabilities; empty if nothing is."""


@dataclass(frozen=True)
class Contents:
    """What is quantized in a model and what is not."""

    linears: Mapping[str, LinearEntry]
    """By name, in the model's order."""
    attention: Mapping[str, AttentionEntry] = field(default_factory=dict)
    """All attention modules by name, quantized or not."""
    fused: tuple[tuple[str, ...], ...] = ()
    """Names of linears that engines compute as one, because they share an input and lie in one module: q, k and v,
    gate and up. In the order of their rows, quantized or not."""
    others: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    """Shapes of the matrices that belong to no linear and stay as they are: routers, experts in one tensor."""
    tied: Mapping[str, str] = field(default_factory=dict)
    """Tensors that are not stored but the same as one that is: {missing name: stored name}."""
    family: str = ""
    """Name of the architecture."""
    model_type: str = ""
    """That of config.json."""
    blocks: str = ""
    """Path of the list of blocks."""

    @property
    def weights(self) -> list[LinearEntry]:
        """The linears with a quantized weight."""
        return [linear for linear in self.linears.values() if linear.weight is not None]

    @property
    def unquantized(self) -> list[str]:
        """Names of the linears that stay as they are, weights and inputs."""
        return [name for name, linear in self.linears.items() if linear.config is None]

    @cached_property
    def activations(self) -> dict[str, QuantizationSpec]:
        """Spec of every activation that is quantized, by module and slot: MODULE.input, ATTENTION_MODULE.key …"""
        slots = {
            f"{name}.{slot}": getattr(known, slot) for name, known in self.linears.items() for slot in LINEAR_SLOTS
        }
        slots |= {
            f"{name}.{slot}": spec for name, known in self.attention.items() for slot, spec in known.specs.items()
        }
        return {name: spec for name, spec in slots.items() if spec is not None}

    @property
    def bits_per_weight(self) -> float:
        """Stored bits per quantized weight of a 16-bit model: codes, scales and zero points."""
        weights = self.weights
        return sum(linear.stored_bits() for linear in weights) / sum(math.prod(linear.shape) for linear in weights)

    def fused_linears(self) -> Iterator[list[LinearEntry]]:
        """Of each fused group with several quantized weights, those linears."""
        for names in self.fused:
            members = [linear for name in names if (linear := self.linears.get(name)) and linear.weight is not None]
            if len(members) > 1:
                yield members

    def cut_block(self) -> tuple[LinearEntry, LinearEntry] | None:
        """The first weight that ends within a block although other rows follow when engines fuse it, and one that it
        is fused with. Experts lie one behind the other, so none of an expert's may."""
        for members in self.fused_linears():
            for linear in members if members[-1].routed else members[:-1]:
                if linear.block_rows is not None and linear.shape[0] % linear.block_rows:
                    return linear, members[-1] if linear is not members[-1] else members[0]
        return None

    def facts(self) -> dict[str, Any]:
        """What the files of a run's blocks do not say, as JSON has it."""
        return {
            "family": self.family,
            "model_type": self.model_type,
            "blocks": self.blocks,
            "attention": {name: known.kind for name, known in self.attention.items()},
            "fused": [list(names) for names in self.fused],
            "routed": [linear.name for linear in self.linears.values() if linear.routed],
            "unquantized": {
                name: [linear.rule, linear.block, *linear.shape]
                for name, linear in self.linears.items()
                if linear.config is None
            },
            "others": {name: list(shape) for name, shape in self.others.items()},
            "tied": dict(self.tied),
        }

    @classmethod
    def restored(
        cls,
        facts: Mapping[str, Any],
        weights: Mapping[str, tuple[QuantizationSpec | None, tuple[int, int], int]],
        activations: Mapping[str, QuantizationSpec],
    ) -> Contents:
        """From `facts` and what the blocks' files say: spec, shape and block of linears by name, and activations."""
        blocks, routed = str(facts["blocks"]), set(facts["routed"])

        def entry(name: str, block: int | None, shape: tuple[int, int], **known: Any) -> LinearEntry:
            role = "" if block is None else name.removeprefix(f"{blocks}.{block}.")
            return LinearEntry(name, shape, **known, block=block, role=role, routed=name in routed)

        linears = {}
        for name, (spec, shape, block) in weights.items():
            flows = {f"{slot}_tensors": activations.get(f"{name}.{slot}") for slot in LINEAR_SLOTS}
            linears[name] = entry(name, block, shape, config=QuantizationConfig(weight=spec, **flows))
        for name, (rule, block, rows, columns) in facts["unquantized"].items():
            linears[name] = entry(name, block, (rows, columns), config=None, rule=rule)
        inside: dict[str, dict[str, QuantizationSpec]] = {name: {} for name in facts["attention"]}
        for name, spec in activations.items():
            module, _, slot = name.rpartition(".")
            if slot not in LINEAR_SLOTS:
                inside.setdefault(module, {})[slot] = spec
        return cls(
            linears,
            {name: AttentionEntry(name, facts["attention"].get(name, ""), specs) for name, specs in inside.items()},
            tuple(tuple(names) for names in facts["fused"]),
            {name: tuple(shape) for name, shape in facts["others"].items()},
            dict(facts["tied"]),
            *(str(facts[name]) for name in ("family", "model_type", "blocks")),
        )


def nominal(config: QuantizationConfig | None = None, attention: AttentionConfig | None = None) -> Contents:
    """One linear and one attention module, quantized like this: to ask what can become of a scheme."""
    specs = {} if attention is None else {slot: spec for slot, spec in attention.specs.items() if spec is not None}
    linears = {} if config is None else {"m": LinearEntry("m", NOMINAL_SHAPE, config)}
    return Contents(linears, {"a": AttentionEntry("a", "Attention", specs)})

"""What is in a run, or will be: the plan makes it before the work, the checkpoint after it, and both say the same."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from pydantic import TypeAdapter

from fewbit.config.spec import AttentionConfig, QuantizationConfig, QuantizationSpec

LINEAR_SLOTS = ("input", "output")
ATTENTION_SLOTS = ("key", "value", "query", "probabilities")
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
    steps: tuple[str, ...] = ()
    """Kinds of what happens to its input while the model runs, in order, but for its quantization (nn/steps.py)."""

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
            return "activations" if self.weight is None else "quantized"
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
        return self.weight.block_size[0] if self.weight is not None and self.weight.block_size is not None else None

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
        slots = {f"{name}.{slot}": getattr(one, slot) for name, one in self.linears.items() for slot in LINEAR_SLOTS}
        slots |= {f"{name}.{slot}": spec for name, one in self.attention.items() for slot, spec in one.specs.items()}
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
        """All but the specs and steps, which the files of a run's blocks say, as JSON has it."""
        linears = {name: replace(linear, config=None, steps=()) for name, linear in self.linears.items()}
        attention = {name: replace(module, specs={}) for name, module in self.attention.items()}
        made: dict[str, Any] = json.loads(json.dumps(asdict(replace(self, linears=linears, attention=attention))))
        return made

    @classmethod
    def restored(
        cls, facts: Any, specs: Mapping[str, QuantizationSpec], steps: Mapping[str, tuple[str, ...]]
    ) -> Contents:
        """From `facts`, specs (of weights by their names, of activations by module and slot) and the steps of linears'
        inputs. ValueError if the facts are none, or know no module of a spec."""
        bare, left = TypeAdapter(cls).validate_python(facts), dict(specs)
        linears, attention = {}, {}
        for name, linear in bare.linears.items():
            slots = {f"{slot}_tensors": left.pop(f"{name}.{slot}", None) for slot in LINEAR_SLOTS}
            config = QuantizationConfig(weight=left.pop(linear.weight_name, None), **slots)
            linears[name] = replace(linear, config=config if config.quantizes else None, steps=steps.get(name, ()))
        for name, module in bare.attention.items():
            found = {slot: left.pop(f"{name}.{slot}", None) for slot in ATTENTION_SLOTS}
            attention[name] = replace(module, specs={slot: spec for slot, spec in found.items() if spec is not None})
        if left:
            raise ValueError(f"no module is known for {next(iter(left))!r}")
        return replace(bare, linears=linears, attention=attention)


def nominal(config: QuantizationConfig | None = None, attention: AttentionConfig | None = None) -> Contents:
    """One linear and one attention module, quantized like this: to ask what can become of a scheme."""
    specs = {} if attention is None else {slot: spec for slot, spec in attention.specs.items() if spec is not None}
    linears = {} if config is None else {"m": LinearEntry("m", NOMINAL_SHAPE, config)}
    return Contents(linears, {"a": AttentionEntry("a", "Attention", specs)})

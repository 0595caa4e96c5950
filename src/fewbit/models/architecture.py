"""What a model family looks like, as data. A new family is a few lines in FAMILIES."""

from __future__ import annotations

from dataclasses import dataclass

# Linears of a block in execution order; the members of one group share one input.
Groups = tuple[tuple[str, ...], ...]

ATTENTION_AND_GATED_MLP: Groups = (
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ("self_attn.o_proj",),
    ("mlp.gate_proj", "mlp.up_proj"),
    ("mlp.down_proj",),
)


@dataclass(frozen=True)
class Scaling:
    """Channels that are divided at their producer and multiplied back in every reader's columns.

    Names are paths inside a block.
    """

    producer: str
    """A norm, or a linear whose output channels reach the readers one by one (values through attention, up through
    the gated product). A producer with fewer channels than its readers makes them for several heads each."""
    readers: tuple[str, ...]
    """All linears that read them."""
    others: tuple[str, ...] = ()
    """All parameters [..., channels] of other modules that read them: routers, experts in one tensor."""
    offset: bool = False
    """The producer is a norm that multiplies by (1 + weight)."""


def _scalings(before_mlp: str = "post_attention_layernorm", offset: bool = False) -> tuple[Scaling, ...]:
    """Those of ATTENTION_AND_GATED_MLP behind pre-norms."""
    attention, output, mlp, down = ATTENTION_AND_GATED_MLP
    return (
        Scaling("input_layernorm", attention, offset=offset),
        Scaling("self_attn.v_proj", output),
        Scaling(before_mlp, mlp, offset=offset),
        Scaling("mlp.up_proj", down),
    )


@dataclass(frozen=True)
class Architecture:
    """Where things are in a family's modules, and what is particular about it. Names are module paths."""

    name: str
    model_types: tuple[str, ...]
    """`model_type` of the configurations that this row describes."""
    groups: Groups
    scalings: tuple[Scaling, ...] = ()
    """What can be scaled; empty for a family that was detected: see scalings.py."""
    blocks: str = "model.layers"
    embeddings: str = "model.embed_tokens"
    head: str = "lm_head"
    offset_norm: bool = False
    """The norm multiplies by (1 + weight) instead of weight."""
    post_norms: bool = False
    """Attention and MLP outputs pass a norm before they are added to the residual stream."""
    qk_norm: bool = False
    """Queries and keys are normalized per head before RoPE."""
    sliding_window: bool = False
    """Some blocks see a sliding window only, so masks and RoPE differ from block to block."""
    detected: bool = False
    """Found by looking at the modules, not listed in FAMILIES."""

    @property
    def traits(self) -> list[str]:
        """The particulars in words."""
        named = {
            "offset norms": self.offset_norm,
            "post-norms": self.post_norms,
            "q/k norms": self.qk_norm,
            "sliding windows": self.sliding_window,
            "detected": self.detected,
        }
        return [words for words, present in named.items() if present]


FAMILIES = (
    Architecture("llama", ("llama", "mistral"), ATTENTION_AND_GATED_MLP, _scalings()),
    Architecture("qwen2", ("qwen2",), ATTENTION_AND_GATED_MLP, _scalings()),
    Architecture("qwen3", ("qwen3",), ATTENTION_AND_GATED_MLP, _scalings(), qk_norm=True),
    Architecture(
        "gemma3",
        ("gemma3_text",),
        ATTENTION_AND_GATED_MLP,
        _scalings("pre_feedforward_layernorm", offset=True),
        offset_norm=True,
        post_norms=True,
        qk_norm=True,
        sliding_window=True,
    ),
)


def listed(model_type: str) -> Architecture | None:
    """The family's row, or None for a family that is not listed."""
    return next((family for family in FAMILIES if model_type in family.model_types), None)

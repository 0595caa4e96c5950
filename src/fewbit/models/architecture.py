"""What a model family looks like, as data. A new family is a few lines in FAMILIES."""

from collections.abc import Collection
from dataclasses import dataclass


@dataclass(frozen=True)
class Group:
    """Linears of a block that share one input."""

    members: tuple[str, ...]
    """Their paths inside the block."""
    producer: str | None = None
    """The norm or linear that makes the input, channel by channel (values through attention, up through the gated
    product), so that it can be divided and the members' columns multiplied; None if nobody is known."""
    routed: bool = False
    """Tokens are chosen or reordered on their way here (experts): the input is not laid out like the batch."""


Groups = tuple[Group, ...]
"""Of one kind of block, in execution order."""


@dataclass(frozen=True)
class Scaling:
    """Channels divided at their producer and multiplied back in every consumer's columns.

    Names are paths inside a block.
    """

    producer: str
    """A norm, or a linear whose output channels reach the consumers one by one. A producer with fewer channels than
    its consumers makes them for several heads each."""
    consumers: tuple[str, ...]
    """All linears that read them."""
    others: tuple[str, ...] = ()
    """All parameters [..., channels] of other modules that read them: routers, experts in one tensor."""
    offset: bool = False
    """A norm as producer multiplies by (1 + weight)."""


def _decoder(before_mlp: str = "post_attention_layernorm") -> Groups:
    """Attention and a gated MLP, each behind a norm."""
    return (
        Group(("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), "input_layernorm"),
        Group(("self_attn.o_proj",), "self_attn.v_proj"),
        Group(("mlp.gate_proj", "mlp.up_proj"), before_mlp),
        Group(("mlp.down_proj",), "mlp.up_proj"),
    )


@dataclass(frozen=True)
class Architecture:
    """Where things are in a family's modules. Names are module paths."""

    name: str
    model_types: tuple[str, ...]
    """`model_type` of the configurations that this row describes."""
    kinds: tuple[Groups, ...] = ()
    """The groups of each kind of block (dense and MoE layers, a vision tower's …); empty for a family that was
    detected, whose blocks are looked at."""
    blocks: str = "model.layers"
    embeddings: str = "model.embed_tokens"
    head: str = "lm_head"
    offset_norm: bool = False
    """Norms multiply by (1 + weight) instead of weight."""
    detected: bool = False
    """Found by looking at the modules, not listed in FAMILIES."""

    def groups(self, linears: Collection[str]) -> Groups | None:
        """Of a block with these linears: those of the kind that covers most of them; None if no kind fits."""
        fitting = [kind for kind in self.kinds if set(linears).issuperset(members_of(kind))]
        return max(fitting, key=lambda kind: len(members_of(kind)), default=None)

    def scalings(self, groups: Groups) -> tuple[Scaling, ...]:
        """What can be scaled by the groups' own word."""
        linears = members_of(groups)
        return tuple(
            Scaling(
                producer,
                tuple(name for group in groups if group.producer == producer for name in group.members),
                offset=self.offset_norm and producer not in linears,
            )
            for producer in dict.fromkeys(group.producer for group in groups)
            if producer is not None
        )


def members_of(groups: Groups) -> list[str]:
    """All linears of the groups, in order."""
    return [name for group in groups for name in group.members]


FAMILIES = (
    Architecture("llama", ("llama", "mistral"), (_decoder(),)),
    Architecture("qwen2", ("qwen2",), (_decoder(),)),
    Architecture("qwen3", ("qwen3",), (_decoder(),)),
    Architecture("gemma3", ("gemma3_text",), (_decoder("pre_feedforward_layernorm"),), offset_norm=True),
)


def listed(model_type: str) -> Architecture | None:
    """The family's row, or None for a family that is not listed."""
    return next((family for family in FAMILIES if model_type in family.model_types), None)

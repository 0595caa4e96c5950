r"""Which modules a config group is for, said so that every engine finds the same.

For a linear that it fuses (qkv_proj from q_proj, k_proj, v_proj) an engine looks for the fused name, for the parts'
names and for the class, the latter two in this order (vLLM) or the other (SGLang). So groups that differ never name a
class: each has patterns that match its own modules and nothing else, and the fused name where all parts are its own.

    re:model\.layers\.(?:0|1)\.self_attn\.(?:k_proj|q_proj|qkv_proj|v_proj)$

Engines match patterns from the start of a name (re.match).
"""

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

FUSED: Mapping[str, tuple[str, ...]] = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
    "w13": ("w1", "w3"),
    "fused_qkv_a_proj": ("q_a_proj", "kv_a_proj_with_mqa"),
    "fused_qkv_a_proj_with_mqa": ("q_a_proj", "kv_a_proj_with_mqa"),
}
"""Names that vLLM and SGLang give to linears that they read from several, and those, in the order of their rows."""
_WRAPPED = {"model.language_model.": "language_model.model."}
"""Where a vision-language model's text model is in the checkpoint, and in vLLM, which does not translate patterns."""


def patterns(names: Iterable[str]) -> list[str]:
    """`re:` patterns that match the modules `names` (not empty), the linears they are fused into, and nothing else."""
    by_leaves: dict[tuple[tuple[str, ...], frozenset[str]], set[tuple[int, ...]]] = defaultdict(set)
    leaves: dict[str, set[str]] = defaultdict(set)
    for name in names:
        owner, _, leaf = name.rpartition(".")
        leaves[owner].add(leaf)
    for owner, found in leaves.items():
        parts = owner.split(".") if owner else []
        indices = tuple(int(part) for part in parts if _is_index(part))
        fused = {whole for whole, members in FUSED.items() if found.issuperset(members)}
        by_leaves[tuple("#" if _is_index(part) else part for part in parts), frozenset(found | fused)].add(indices)
    return sorted(
        _pattern(template, choice, sorted(last))
        for (template, last), numbers in by_leaves.items()
        for choice in _products(numbers)
    )


def _is_index(part: str) -> bool:
    return part.isdecimal() and part.isascii() and str(int(part)) == part


def _products(numbers: set[tuple[int, ...]]) -> list[list[list[int]]]:
    """Tuples of one length as few products of numbers: {(0, 1), (0, 2), (1, 1), (1, 2)} is [0, 1] × [1, 2]."""
    if () in numbers:
        return [[]]
    behind: dict[int, set[tuple[int, ...]]] = defaultdict(set)
    for first, *rest in numbers:
        behind[first].add(tuple(rest))
    alike: dict[frozenset[tuple[int, ...]], list[int]] = defaultdict(list)
    for first in sorted(behind):
        alike[frozenset(behind[first])].append(first)
    return [[firsts, *product] for rest, firsts in alike.items() for product in _products(set(rest))]


def _pattern(template: Sequence[str], choice: list[list[int]], last: list[str]) -> str:
    numbers = iter(choice)
    parts = (_any_of(map(str, next(numbers))) if part == "#" else re.escape(part) for part in template)
    owner = "".join(rf"{part}\." for part in parts)
    for stored, elsewhere in _WRAPPED.items():
        if owner.startswith(re.escape(stored)):
            owner = _any_of([stored, elsewhere]) + owner.removeprefix(re.escape(stored))
    return f"re:{owner}{_any_of(last)}$"


def _any_of(words: Iterable[str]) -> str:
    """A pattern of one of some words."""
    escaped = [re.escape(word) for word in words]
    return escaped[0] if len(escaped) == 1 else f"(?:{'|'.join(escaped)})"

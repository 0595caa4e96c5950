"""Which linears of a block share an input, and their order of execution, observed while batches pass the block."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Collection, Sequence
from itertools import pairwise

from torch import Tensor, nn

from fewbit.models.architecture import Groups
from fewbit.models.hooks import removed_at_the_end
from fewbit.nn.linear import linear_of


def shared_inputs(block: nn.Module, names: Collection[str], forwards: Sequence[Callable[[], object]]) -> Groups:
    """Groups of the named linears of `block`, in the order of execution. What no batch reaches is in no group.

    `forwards` run the block, a batch each. The first is enough unless tokens are routed: further ones are run as long
    as there are linears that none has reached.
    """
    groups: list[tuple[str, ...]] = []
    group_of: dict[str, int] = {}
    follows: set[tuple[int, int]] = set()
    for forward in forwards:
        order: list[int] = []
        for members in _calls(block, names, forward):
            new = tuple(name for name in members if name not in group_of)
            if new:
                group_of |= dict.fromkeys(new, len(groups))
                groups.append(new)
            order += [number for number in dict.fromkeys(group_of[name] for name in members) if number not in order]
        follows |= set(pairwise(order))
        if len(group_of) == len(names):
            break
    place = {name: number for number, name in enumerate(names)}
    ordered = _ordered(len(groups), follows, [place[group[0]] for group in groups])
    return tuple(groups[number] for number in ordered)


def _calls(block: nn.Module, names: Collection[str], forward: Callable[[], object]) -> list[list[str]]:
    """Names of the linears that one forward calls, those with the same input together."""
    seen: list[tuple[Tensor, int, list[str]]] = []  # holding the tensors keeps their identities distinct

    def note(name: str, x: Tensor) -> None:
        version = 0 if x.is_inference() else x._version  # writing into a tensor makes it another input
        for tensor, then, members in seen:
            if tensor is x and then == version:
                members.append(name)
                return
        seen.append((x, version, [name]))

    with removed_at_the_end() as hooks:
        for name in names:
            linear = linear_of(block, name)
            hooks.append(linear.register_forward_pre_hook(lambda _module, args, name=name: note(name, args[0])))
        forward()
    return [list(dict.fromkeys(members)) for _, _, members in seen]


def _ordered(count: int, follows: Collection[tuple[int, int]], places: Sequence[int]) -> list[int]:
    """Numbers below `count`, each after those it follows; where that leaves a choice, by `places`.

    Batches that contradict each other leave a ring: it is cut where `places` says.
    """
    before = {number: {first for first, second in follows if second == number} for number in range(count)}
    after = {number: [second for first, second in follows if first == number] for number in range(count)}
    ready = [(places[number], number) for number in range(count) if not before[number]]
    heapq.heapify(ready)
    ordered: list[int] = []
    while len(ordered) < count:
        if not ready:
            ready = [min((places[number], number) for number in range(count) if number not in ordered)]
        _, number = heapq.heappop(ready)
        if number in ordered:
            continue
        ordered.append(number)
        for second in after[number]:
            before[second].discard(number)
            if not before[second] and second not in ordered:
                heapq.heappush(ready, (places[second], second))
    return ordered

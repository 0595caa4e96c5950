"""A block's kind, the linears that share an input and their order of execution, observed while batches pass it."""

import heapq
from collections.abc import Callable, Collection, Hashable, Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from fewbit.models.architecture import Group, Groups
from fewbit.models.hooks import removed_at_the_end
from fewbit.models.token_identity import TokenIdentity
from fewbit.nn.linear import linear_of


def kind_of(block: nn.Module) -> Hashable:
    """Equal for blocks that are built alike."""
    return type(block), *((name, tuple(parameter.shape)) for name, parameter in block.named_parameters())


def probe_tokens(vocabulary: int) -> list[Tensor]:
    """Token ids [tokens] of the batches that pass a block to see it: a few, then more where few do not reach all."""
    chooser = torch.Generator().manual_seed(0)
    return [torch.arange(8), *(torch.randint(vocabulary, (64,), generator=chooser) for _ in range(4))]


def linears_in(block: nn.Module) -> list[str]:
    """Paths of a block's linears."""
    return [name for name, module in block.named_modules() if isinstance(module, nn.Linear)]


def shared_inputs(block: nn.Module, names: Collection[str], forwards: Sequence[Callable[[], object]]) -> Groups:
    """Groups of the named linears of `block`, in the order of execution. What no batch reaches is in no group.

    `forwards` run the block, a batch each. The first is enough unless tokens are routed: further ones are run as long
    as there are linears that none has reached.
    """
    groups: list[tuple[str, ...]] = []
    routed: list[bool] = []
    group_of: dict[str, int] = {}
    follows: set[tuple[int, int]] = set()
    for forward in forwards:
        order: list[int] = []
        for members, elsewhere in _calls(block, names, forward):
            new = tuple(name for name in members if name not in group_of)
            if new:
                group_of |= dict.fromkeys(new, len(groups))
                groups.append(new)
                routed.append(elsewhere)
            for number in {group_of[name] for name in members}:
                routed[number] |= elsewhere
            order += [number for number in dict.fromkeys(group_of[name] for name in members) if number not in order]
        follows |= set(pairwise(order))
        if len(group_of) == len(names):
            break
    place = {name: number for number, name in enumerate(names)}
    ordered = _ordered(len(groups), follows, [place[group[0]] for group in groups])
    return tuple(Group(groups[number], routed=routed[number]) for number in ordered)


def _calls(block: nn.Module, names: Collection[str], forward: Callable[[], object]) -> list[tuple[list[str], bool]]:
    """Names of the linears that one forward calls, those with the same input together, and whether its tokens are
    others than the block's, or in another order."""
    seen: list[tuple[Tensor, int, list[str]]] = []  # holding the tensors keeps their identities distinct
    identity = TokenIdentity()

    def note(name: str, x: Tensor) -> None:
        version = 0 if x.is_inference() else x._version  # writing into a tensor makes it another input
        for tensor, then, members in seen:
            if tensor is x and then == version:
                members.append(name)
                return
        seen.append((x, version, [name]))

    with removed_at_the_end() as hooks, identity.following(block):
        for name in names:
            linear = linear_of(block, name)
            hooks.append(linear.register_forward_pre_hook(lambda _module, args, name=name: note(name, args[0])))
        forward()
    return [(list(dict.fromkeys(members)), identity.is_routed(x)) for x, _, members in seen]


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

"""Which channels of a model can be scaled: from the family's data, from the recipe, or found by looking.

A scaling is right if dividing the producer and multiplying the consumers leaves the block's output as it was, so that
is what is tried: 8 tokens pass a block of each kind before and after, with powers of two as scales, which float
arithmetic carries through exactly. A consumer that was left out, an activation function in between, a norm with an
offset: each shows in the output. What is found or given is used only if it passes.
"""

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations

import torch
from torch import Tensor, nn
from torch.func import functional_call

from fewbit.checkpoint.names import weight_of
from fewbit.config.algorithms import ScalingLayer
from fewbit.errors import ConfigError, nearest
from fewbit.models.architecture import Groups, Scaling
from fewbit.models.blockwise import BlockwiseModel
from fewbit.models.folding import channel_map, fold
from fewbit.models.hooks import removed_at_the_end
from fewbit.models.probe import kind_of, probe_tokens

TOLERANCE = 1e-4  # of the block's contribution; a consumer that was left out changes it by a large part
OTHERS_TRIED = 4  # parameters that may or may not be consumers: all their subsets are tried
WHAT_TO_WRITE = (
    'scaling_layers = [{"prev_op": "input_layernorm", "layers": ["self_attn.q_proj", "self_attn.k_proj", '
    '"self_attn.v_proj"]}, …], with names inside a block'
)


def scalings(model: BlockwiseModel, given: Sequence[ScalingLayer] | None = None) -> list[tuple[Scaling, ...]]:
    """What can be scaled in each block of the model; blocks of one kind have the same.

    Args:
        given: what the recipe says instead of the family's data.

    Raises ConfigError for a layer that no block has, one that cannot be scaled, or if nothing can be.
    """
    if given is not None:
        check_names(list(model.blocks), given)
    found: dict[Hashable, tuple[Scaling, ...]] = {}
    kinds = [kind_of(block) for block in model.blocks]
    for index, kind in enumerate(kinds):
        if kind not in found:
            found[kind] = _of_kind(model, index, given)
    if not any(found.values()):
        raise ConfigError(
            f"no layer of {model.architecture.name} was found whose output channels could be scaled; "
            f"write which: {WHAT_TO_WRITE}"
        )
    return [found[kind] for kind in kinds]


def _of_kind(model: BlockwiseModel, index: int, given: Sequence[ScalingLayer] | None) -> tuple[Scaling, ...]:
    """What can be scaled in a block and those like it."""
    groups, heads, block = model.groups(index), head_dim(model), model.blocks[index]
    if given is not None:
        given = [layer for layer in given if not _lacks(block, layer)]
    elif listed := tuple(one for one in model.architecture.scalings(groups) if _fits(block, one, heads)):
        return listed
    (inputs,) = model.enter([{"input_ids": probe_tokens(model.vocabulary)[0].unsqueeze(0)}])
    with model.loaded(index) as loaded, torch.no_grad():

        def forward(changed: Mapping[str, Tensor]) -> Tensor:
            output = functional_call(loaded, dict(changed), (inputs.hidden,), inputs.calls[index])
            first: Tensor = output[0] if isinstance(output, tuple) else output
            return first

        return scalings_of_block(loaded, groups, forward, inputs.hidden, heads, given)


def scalings_of_block(
    block: nn.Module,
    groups: Groups,
    forward: Callable[[Mapping[str, Tensor]], Tensor],
    hidden: Tensor,
    head_dim: int,
    given: Sequence[ScalingLayer] | None = None,
) -> tuple[Scaling, ...]:
    """What can be scaled in one block with weights, of whatever model; empty if nothing can be.

    `forward` runs the block on its input `hidden` with some of its tensors replaced, given by name. `groups` are
    linears that share an input, in execution order, all of which that forward reaches. `given` as for `scalings`.
    """
    probe = _Probe(block, {name: p.data for name, p in block.named_parameters()}, forward, hidden, head_dim)
    if given is not None:
        check_names([block], given)
        return tuple(_from_recipe(probe, layer) for layer in given)
    return tuple(_found(probe, groups))


def head_dim(model: BlockwiseModel) -> int:
    """Channels per head of attention."""
    config = model.config.get_text_config()
    given = getattr(config, "head_dim", None)
    return int(given or config.hidden_size // config.num_attention_heads)


def _fits(block: nn.Module, scaling: Scaling, heads: int) -> bool:
    """Whether the producer's channels, in heads of so many, can be told apart in the consumers."""
    rows = _weight(block, scaling.producer).shape[0]
    try:
        channel_map(_weight(block, scaling.consumers[0]).shape[-1], rows, heads)
    except ValueError:
        return False
    return True


def _weight(block: nn.Module, name: str) -> Tensor:
    weight = block.get_submodule(name).weight
    assert isinstance(weight, Tensor)
    return weight


@dataclass(frozen=True)
class _Probe:
    """A block with its weights, and a forward through it."""

    block: nn.Module
    tensors: Mapping[str, Tensor]
    forward: Callable[[Mapping[str, Tensor]], Tensor]
    """The block's output when some of its tensors are replaced."""
    hidden: Tensor
    head_dim: int

    def passes(self, scaling: Scaling) -> bool:
        """Whether the scaling leaves the block's output as it is."""
        channels = self.tensors[weight_of(scaling.producer)].shape[0]
        chooser = torch.Generator().manual_seed(0)
        exponents = torch.tensor([-2.0, -1.0, 1.0, 2.0])[torch.randint(4, (channels,), generator=chooser)]
        try:
            changed, _ = fold(self.tensors, scaling, torch.exp2(exponents).to(self.hidden.device), self.head_dim)
        except ValueError:
            return False
        before = self.forward({})
        error = (self.forward(changed) - before).norm()
        return bool(error < TOLERANCE * (before - self.hidden).norm())

    def settled(self, scaling: Scaling) -> Scaling | None:
        """The scaling with the kind of norm, and those of its possible other consumers, with which it passes."""
        is_norm = self.tensors[weight_of(scaling.producer)].ndim == 1
        for count in range(len(scaling.others), -1, -1):
            for others in combinations(scaling.others, count):
                for offset in (False, True) if is_norm else (False,):
                    candidate = replace(scaling, others=others, offset=offset)
                    if self.passes(candidate):
                        return candidate
        return None


def check_names(blocks: Sequence[nn.Module], given: Sequence[ScalingLayer]) -> None:
    """ConfigError for a layer whose modules no block has."""
    for layer in given:
        if all(_lacks(block, layer) for block in blocks):
            name = _lacks(blocks[0], layer)
            known = [known for known, _ in blocks[0].named_modules() if known]
            raise ConfigError(f"scaling_layers: a block has no module {name!r}{nearest(name, known)}")


def _lacks(block: nn.Module, layer: ScalingLayer) -> str | None:
    """The first module of a layer that the block does not have."""
    known = {name for name, _ in block.named_modules()} - {""}
    return next((name for name in (layer.prev_op, *layer.layers) if name not in known), None)


def _from_recipe(probe: _Probe, layer: ScalingLayer) -> Scaling:
    """A scaling as the recipe gives it; what it calls layers may be modules other than linears."""
    if weight_of(layer.prev_op) not in probe.tensors:
        raise ConfigError(f"scaling_layers: prev_op {layer.prev_op!r} has no weight of its own; name a norm or linear")
    linears = tuple(name for name in layer.layers if isinstance(probe.block.get_submodule(name), nn.Linear))
    if not linears:
        raise ConfigError(f"scaling_layers: none of {list(layer.layers)} is a linear, so nothing would be quantized")
    channels = _weight(probe.block, linears[0]).shape[-1]
    others = [
        parameter for name in layer.layers if name not in linears for parameter in _matrices(probe, name, channels)
    ]
    scaling = probe.settled(Scaling(layer.prev_op, linears, tuple(others)))
    if scaling is None:
        raise ConfigError(
            f"scaling_layers: with {layer.prev_op!r} divided and {list(layer.layers)} multiplied a block gives "
            f"another output; name every layer that reads {layer.prev_op!r} (routers and gates, too), and only a "
            "prev_op whose channels reach them without an activation function in between"
        )
    return scaling


def _matrices(probe: _Probe, module: str, channels: int) -> list[str]:
    """Parameters that a module itself owns and that may be multiplied with `channels` channels."""
    return [
        f"{module}.{name}"
        for name, parameter in probe.block.get_submodule(module).named_parameters(recurse=False)
        if parameter.ndim > 1 and parameter.shape[-1] == channels
    ]


def _found(probe: _Probe, groups: Groups) -> Iterator[Scaling]:
    """Scalings that pass: norms whose output linears read as it is, then linears whose channels reach a group."""
    made, read = _watched(probe)
    linears = {name for name, module in probe.block.named_modules() if isinstance(module, nn.Linear)}
    left = [group.members for group in groups]
    for producer, output in made.items():
        if producer in linears or probe.tensors[weight_of(producer)].ndim != 1:
            continue
        consumers = tuple(name for name in read if name in linears and _same_memory(read[name], output))
        if not consumers:
            continue
        others = [
            parameter
            for name, x in read.items()
            if name not in linears and _same_memory(x, output)
            for parameter in _matrices(probe, name, output.shape[-1])
        ]
        if len(others) > OTHERS_TRIED:
            continue
        if scaling := probe.settled(Scaling(producer, consumers, tuple(others))):
            left = [members for members in left if not set(members) <= set(consumers)]
            yield scaling
    order = list(read)
    for members in left:
        if members[0] not in order:  # experts that no token of the probe reached
            continue
        earlier = [name for name in order[: order.index(members[0])] if name in linears and name not in members]
        for producer in reversed(earlier):
            scaling = Scaling(producer, members)
            if _fits(probe.block, scaling, probe.head_dim) and probe.passes(scaling):
                yield scaling
                break


def _watched(probe: _Probe) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """What modules with a weight of their own gave out, and what modules with parameters were given, in order."""
    made: dict[str, Tensor] = {}
    read: dict[str, Tensor] = {}

    def watch(name: str) -> Callable[[nn.Module, tuple[object, ...], object], None]:
        def note(_module: nn.Module, inputs: tuple[object, ...], output: object) -> None:
            if weight_of(name) in probe.tensors and isinstance(output, Tensor):
                made[name] = output
            if inputs and isinstance(inputs[0], Tensor):
                read.setdefault(name, inputs[0])

        return note

    owners = {name.rpartition(".")[0] for name in probe.tensors}
    with removed_at_the_end() as hooks:
        for name in owners:
            hooks.append(probe.block.get_submodule(name).register_forward_hook(watch(name)))
        probe.forward({})
    return made, read


def _same_memory(x: Tensor, output: Tensor) -> bool:
    """Whether x is the output or a view of all of it. (Both are held, so an address stands for one tensor.)"""
    return x.data_ptr() == output.data_ptr() and x.numel() == output.numel() and x.shape[-1] == output.shape[-1]

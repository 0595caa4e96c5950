"""A user's list of layers as a stack of blocks: each computes in float32 while it is loaded, then is as it was."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn

from fewbit.calibration.hidden_states import HiddenStates
from fewbit.calibration.passage import Passage
from fewbit.calibration.recorded import Item
from fewbit.checkpoint.names import path_in, weight_of
from fewbit.checkpoint.source import ModuleSource
from fewbit.config.spec import SCALE_DTYPES
from fewbit.errors import ArchitectureError, CalibrationError
from fewbit.models.architecture import Group, Groups, members_of
from fewbit.models.block_stack import BlockCall
from fewbit.models.forward_manager import LayerForwardManager, attention_of, layer_type
from fewbit.models.nested import map_tensors
from fewbit.models.probe import shared_inputs
from fewbit.nn.exchange import Exchange

Inputs = Tensor | Sequence[Tensor | Item]
"""Batches of the first layer's input [batch, tokens, channels]; with keyword arguments as the items of a
DefaultDataset: {"input_tensor": …, "kwargs": {…}}. A 2-D attention_mask leaves padding out of the statistics."""


class LayerStack:
    """Layers in memory and how they are run. Nothing of them changes but by `change`, in `commit`.

    Args:
        layers: modules in the order of execution.
        root: what full names begin with: "" or "model.layers.".
        linears: per layer the full names of those to look at.
        manager: runs the layers.
    """

    def __init__(
        self,
        layers: Sequence[nn.Module],
        root: str,
        linears: Sequence[Sequence[str]],
        manager: LayerForwardManager,
    ) -> None:
        self.layers = layers
        self.linears = linears
        self.source = ModuleSource(nn.ModuleList(layers), prefix=root)
        self._root = root
        self._manager = manager
        self._changes = Exchange()

    def __len__(self) -> int:
        return len(self.layers)

    def prefix(self, index: int) -> str:
        return f"{self._root}{index}."

    def block_tensors(self, index: int) -> list[str]:
        return [name for name in self.source.info() if name.startswith(self.prefix(index))]

    def groups(self, index: int, passing: Sequence[Callable[[], object]] = ()) -> Groups:
        """Found by looking on while batches pass; linears that none reaches come last, each by itself."""
        names = [path_in(self.prefix(index), name) for name in self.linears[index]]
        groups = shared_inputs(self.layers[index], names, passing)
        reached = members_of(groups)
        return groups + tuple(Group((name,)) for name in names if name not in reached)

    def stored_dtype(self, name: str) -> torch.dtype:
        """The weight's own dtype, if that is one for scales."""
        dtype = self.source.info()[weight_of(name)].dtype
        return dtype if dtype in SCALE_DTYPES.values() else torch.float32

    @contextmanager
    def loaded(
        self,
        index: int,
        device: torch.device | str = "cpu",
        read: Callable[[], dict[str, Tensor]] | None = None,
    ) -> Iterator[nn.Module]:
        """The layer in float32 (float64 stays) and without dropout, where it is; afterwards it is as it was."""
        layer = self.layers[index]
        for_now = Exchange()
        for x in (*layer.parameters(), *layer.buffers()):
            if x.is_floating_point() and x.element_size() < 4:
                for_now.data(x, x.data.float())
        for module in layer.modules():
            for_now.item(vars(module), "training", False)
            if isinstance(module, nn.Linear):  # which may be given other weights
                for_now.item(module._parameters, "weight", module.weight)
        with for_now.for_now():
            yield layer

    def call_block(self, block: nn.Module, hidden: Tensor, call: BlockCall) -> Tensor:
        like = next(iter(block.parameters()), hidden)
        return self._manager.forward(block, _like(hidden, like), **_like(call, like))

    def change(self, index: int, tensors: Mapping[str, Tensor]) -> None:
        """Note other values of a layer's parameters, by their full names; they are cast to the dtype stored."""
        for path, parameter in self.layers[index].named_parameters():
            values = tensors.get(self.prefix(index) + path)
            if values is not None:
                self._changes.data(parameter, values.to(parameter.device, parameter.dtype))

    def commit(self) -> None:
        """Make all changes at once, or none if something is raised."""
        self._changes.commit()


class _OwnCalls(list[BlockCall]):
    """Keyword arguments by batch, the same for every layer."""

    def get(self, batch: int, block: int) -> BlockCall:
        return self[batch]


def pass_through_layers(stack: LayerStack, inputs: Inputs, reference: Callable[[int], Sequence[int]]) -> Passage:
    """Recorded inputs on their way through the layers; they are not changed.

    `reference` tells of so many batches the numbers of those that pass in full precision, too.
    CalibrationError for what are no inputs, ArchitectureError for embeddings that do not suit all layers.
    """
    items = [inputs] if isinstance(inputs, Tensor | Mapping) else inputs
    hidden: list[Tensor] = []
    calls = _OwnCalls()
    for item in items:
        if isinstance(item, Tensor):
            hidden.append(item)
            calls.append({})
        elif isinstance(item, Mapping) and isinstance(item.get("input_tensor"), Tensor):
            hidden.append(item["input_tensor"])
            calls.append(dict(item.get("kwargs") or {}))
        else:
            raise CalibrationError(
                f"an input is a tensor or {{'input_tensor': …, 'kwargs': …}}, not {type(item).__name__}; "
                "build_calib_dataset_inputs makes them"
            )
    if not hidden:
        raise CalibrationError("there are no inputs; record some with DataRecorder and build_calib_dataset_inputs")
    _check_rotations(stack.layers, calls)
    chosen = reference(len(hidden))
    states, full = (HiddenStates(None, None, device=None) for _ in range(2))
    for batch, x in enumerate(hidden):
        states.put(batch, x)
        if batch in chosen:
            full.put(batch, x)
    masks = [_mask(call) for call in calls]
    first = list(accumulate((x.shape[0] for x in hidden), initial=0))
    return Passage(stack, None, masks, calls, states, full if chosen else None, chosen, first)


def _mask(call: BlockCall) -> Tensor | None:
    """Bool [batch, tokens], True where a token counts; None if all do."""
    mask = call.get("attention_mask")
    return mask.bool() if isinstance(mask, Tensor) and mask.ndim == 2 else None


def _check_rotations(layers: Iterable[nn.Module], calls: Iterable[BlockCall]) -> None:
    """ArchitectureError if layers rotate positions in several ways and the inputs hold the embeddings of one."""
    kinds = set()
    for layer in layers:
        attention = attention_of(layer)
        rope = getattr(attention.config, "rope_parameters", None) if attention is not None else None
        if attention is not None and isinstance(rope, Mapping) and layer_type(attention) in rope:
            kinds.add(layer_type(attention))
    recorded = [call.get("position_embeddings") for call in calls]
    if len(kinds) > 1 and any(not isinstance(embeddings, Mapping | None) for embeddings in recorded):
        raise ArchitectureError(
            f"these layers rotate positions in {len(kinds)} ways ({', '.join(sorted(map(str, kinds)))}), but the "
            "inputs hold one kind of position_embeddings; give {layer type: embeddings}, or quantize the model with "
            "fewbit.quantize, which calls every layer as the model does"
        )


def _like(value: Any, like: Tensor) -> Any:
    """Tensors of a nested structure on the device of `like`, floats in its dtype."""
    return map_tensors(value, lambda x: x.to(like.device, like.dtype if x.is_floating_point() else x.dtype))

"""A stack of layers in memory and the batches that pass it: one layer at a time, in float32, then as it was."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from fewbit.calibration.recorded import Item
from fewbit.config.algorithms import GPTQConfig
from fewbit.config.matching import matching
from fewbit.config.spec import SCALE_DTYPES, QuantizationSpec
from fewbit.engine.reference import Reference
from fewbit.errors import ArchitectureError, CalibrationError, ConfigError, nearest
from fewbit.models.architecture import Groups
from fewbit.models.forward_manager import LayerForwardManager, attention_of, layer_type
from fewbit.models.nested import map_tensors
from fewbit.models.untouched import Untouched, sentence, untouched
from fewbit.nn import in_memory
from fewbit.nn.exchange import Exchange
from fewbit.nn.linear import linear_of

logger = logging.getLogger("fewbit")

Inputs = Tensor | Sequence[Tensor | Item]
"""Batches of the first layer's input [batch, tokens, channels]; with keyword arguments as the items of a
DefaultDataset: {"input_tensor": …, "kwargs": {…}}. A 2-D attention_mask leaves padding out of the statistics."""


@dataclass
class Batch:
    """What goes into the next layer."""

    hidden: Tensor
    """[batch, tokens, channels]."""
    reference: Tensor
    """The same in the full-precision model, where that is carried along."""
    kwargs: dict[str, Any]

    @property
    def mask(self) -> Tensor | None:
        """Bool [batch, tokens], True where a token counts; None if all do."""
        mask = self.kwargs.get("attention_mask")
        return mask.bool() if isinstance(mask, Tensor) and mask.ndim == 2 else None


@dataclass(frozen=True)
class Stack:
    """Layers, their linears and what goes into them, checked before anything is changed."""

    layers: list[nn.Module]
    linears: list[dict[str, str]]
    """Per layer {name inside the layer: full name} of those to quantize."""
    batches: list[Batch]
    root: str
    """What full names begin with."""


def open_stack(
    layers: Iterable[nn.Module], inputs: Inputs, spec: QuantizationSpec, exclude: Sequence[str], prefix: str
) -> Stack:
    """Layers and inputs for quantization by `spec`. FewbitError for what cannot be honoured."""
    spec.check_stored("the layers' weights")
    stack = [in_memory.unwrapped(layer) for layer in layers]
    root = f"{prefix}." if prefix else ""
    left = _no_linears(stack, root)
    linears = _linears(stack, root, exclude, left)
    _say_what_stays([one for one in left if not any(_covers(pattern, one) for pattern in exclude)])
    _check_shapes(stack, linears, spec)
    batches = _batches(inputs)
    _check_rotations(stack, batches)
    return Stack(stack, linears, batches, root)


def _batches(inputs: Inputs) -> list[Batch]:
    """Batches of recorded inputs; the tensors are not copied, and never written to."""
    items = [inputs] if isinstance(inputs, Tensor | Mapping) else inputs
    batches = []
    for item in items:
        if isinstance(item, Tensor):
            batches.append(Batch(item, item, {}))
        elif isinstance(item, Mapping) and isinstance(item.get("input_tensor"), Tensor):
            hidden = item["input_tensor"]
            batches.append(Batch(hidden, hidden, dict(item.get("kwargs") or {})))
        else:
            raise CalibrationError(
                f"an input is a tensor or {{'input_tensor': …, 'kwargs': …}}, not {type(item).__name__}; "
                "build_calib_dataset_inputs makes them"
            )
    if not batches:
        raise CalibrationError("there are no inputs; record some with DataRecorder and build_calib_dataset_inputs")
    return batches


def _linears(
    layers: Sequence[nn.Module], root: str, exclude: Sequence[str], left: Sequence[Untouched]
) -> list[dict[str, str]]:
    """Per layer {name inside the layer: full name} of its linears. ConfigError for a pattern that matches none."""
    found = [
        {
            name: f"{root}{index}" + (f".{name}" if name else "")
            for name, module in layer.named_modules()
            if isinstance(module, nn.Linear)
        }
        for index, layer in enumerate(layers)
    ]
    everything = [full for names in found for full in names.values()]
    if not everything:
        raise ArchitectureError("there is no linear in the layers, so there is nothing to quantize")
    covered = {pattern: matching(pattern, everything) for pattern in exclude}
    excluded = set().union(*covered.values())
    owners: dict[int, str] = {}
    for layer, names in zip(layers, found, strict=True):
        for name, full in names.items():
            if full not in excluded:
                in_memory.check_weight(linear_of(layer, name), full)
            if (first := owners.setdefault(id(linear_of(layer, name).weight), full)) != full:
                raise ConfigError(
                    f"{first!r} and {full!r} have one weight, which cannot be quantized for two inputs; give "
                    "them copies"
                )
    for pattern, names_of_it in covered.items():
        if not names_of_it and not any(_covers(pattern, one) for one in left):
            raise ConfigError(f"exclude: {pattern!r} matches no linear{nearest(pattern, everything)}")
    return [{name: full for name, full in names.items() if full not in excluded} for names in found]


def _no_linears(layers: Sequence[nn.Module], root: str) -> list[Untouched]:
    """Matrices of the layers that are no linears, by their full names."""
    stack = nn.ModuleList(layers)
    linears = [name for name, module in stack.named_modules() if isinstance(module, nn.Linear)]
    return [replace(one, name=root + one.name) for one in untouched(stack, linears)]


def _covers(pattern: str, one: Untouched) -> bool:
    """Whether an exclude pattern means this tensor, its module, or one that this is in."""
    parts = one.name.split(".")
    return bool(matching(pattern, [".".join(parts[:end]) for end in range(2, len(parts) + 1)]))


def _say_what_stays(left: Sequence[Untouched]) -> None:
    """ConfigError for stacks of matrices, such as experts in one tensor; a warning for others."""
    stacked = [one for one in left if len(one.shape) == 3 and min(one.shape) > 1 and not one.kind.startswith("Conv")]
    if stacked:
        raise ConfigError(
            f"{sentence(stacked)}; stacks of matrices (experts in one tensor) cannot be quantized here, so say "
            "that they stay: exclude=[…] with their names or wildcards"
        )
    if left:
        logger.warning(sentence(left))


def _check_shapes(layers: Sequence[nn.Module], linears: Sequence[Mapping[str, str]], spec: QuantizationSpec) -> None:
    """ConfigError for the first linear that the spec's groups or blocks do not divide."""
    for layer, names in zip(layers, linears, strict=True):
        for name, full in names.items():
            shape = linear_of(layer, name).weight.shape
            try:
                spec.tiling.scale_shape(tuple(shape))
            except ValueError as error:
                raise ConfigError(
                    f"{full!r} cannot be quantized: {error}; choose another size, or exclude it"
                ) from None


def _check_rotations(layers: Iterable[nn.Module], batches: Iterable[Batch]) -> None:
    """ArchitectureError if layers rotate positions in several ways and the inputs hold the embeddings of one."""
    kinds = set()
    for layer in layers:
        attention = attention_of(layer)
        rope = getattr(attention.config, "rope_parameters", None) if attention is not None else None
        if attention is not None and isinstance(rope, Mapping) and layer_type(attention) in rope:
            kinds.add(layer_type(attention))
    recorded = [batch.kwargs.get("position_embeddings") for batch in batches]
    if len(kinds) > 1 and any(not isinstance(embeddings, Mapping | None) for embeddings in recorded):
        raise ArchitectureError(
            f"these layers rotate positions in {len(kinds)} ways ({', '.join(sorted(map(str, kinds)))}), but the "
            "inputs hold one kind of position_embeddings; give {layer type: embeddings}, or quantize the model with "
            "fewbit.quantize, which calls every layer as the model does"
        )


@dataclass(frozen=True)
class Pass:
    """All batches through one layer."""

    layer: nn.Module
    batches: Sequence[Batch]
    manager: LayerForwardManager

    def forward(self, index: int) -> Tensor:
        """The output for one batch, float32 (or float64) on the layer's device."""
        batch = self.batches[index]
        return self._call(self.layer, batch.hidden, batch.kwargs)

    def emit(self, index: int, output: Tensor) -> None:
        """Make an output the next layer's input."""
        batch = self.batches[index]
        batch.hidden = output.to(batch.hidden.device)

    def reference(self, groups: Groups, config: GPTQConfig) -> Reference | None:
        """The same layer in full precision, if the drift of the inputs is wanted. Call it before weights change."""
        chosen = config.drift_batches(len(self.batches))
        if not chosen:
            return None
        # shares its parameters with the layer, which gets others when it is quantized
        original = copy.deepcopy(self.layer, {id(p): p for p in self.layer.parameters()})

        def forward(index: int) -> Tensor:
            batch = self.batches[index]
            return self._call(original, batch.reference, batch.kwargs)

        def emit(index: int, output: Tensor) -> None:
            self.batches[index].reference = output.to(self.batches[index].hidden.device)

        return Reference(original, groups, chosen, forward, emit)

    def _call(self, layer: nn.Module, hidden: Tensor, kwargs: dict[str, Any]) -> Tensor:
        like = next(iter(layer.parameters()), hidden)
        hidden, kwargs = _like(hidden, like), _like(kwargs, like)
        return self.manager.forward(layer, hidden, **kwargs)


@contextmanager
def computing(layer: nn.Module, linears: Iterable[nn.Linear] = (), changes: Exchange | None = None) -> Iterator[None]:
    """The layer in float32 (float64 stays) and without dropout; afterwards it is as it was, whatever happens.

    The `linears` may be given other weights inside: these go into `changes`, in the dtypes that the old ones have.
    """
    old = {linear: (linear.weight, linear.weight.dtype) for linear in linears}
    for_now = Exchange()
    for x in (*layer.parameters(), *layer.buffers()):
        if x.is_floating_point() and x.element_size() < 4:
            for_now.data(x, x.data.float())
    for module in layer.modules():
        for_now.item(vars(module), "training", False)
    for linear in old:
        for_now.item(linear._parameters, "weight", linear.weight)
    with for_now.for_now():
        yield
        new = {p: linear.weight.data.to(dtype) for linear, (p, dtype) in old.items() if linear.weight is not p}
    if changes is not None:  # collected only now that the parameters have their own values again
        for parameter, values in new.items():
            changes.data(parameter, values)


def stored_dtype(weight_dtype: torch.dtype) -> torch.dtype:
    """What scales are stored in, unless the spec says so: the weight's dtype, if that is one for scales."""
    return weight_dtype if weight_dtype in SCALE_DTYPES.values() else torch.float32


def _like(value: Any, like: Tensor) -> Any:
    """Tensors of a nested structure on the device of `like`, floats in its dtype."""
    return map_tensors(value, lambda x: x.to(like.device, like.dtype if x.is_floating_point() else x.dtype))

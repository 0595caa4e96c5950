"""Scales the channels of any stack of layers in memory for quantization: AWQ and SmoothQuant as one search.

The search is that of algorithms/scale_search.py; which channels can be scaled is found in each kind of layer by
trying (models/scalings.py). What the layers compute stays the same: a norm or linear is divided, those who read it are
multiplied. Weights stay floats, ready for whatever quantizes them next, `run_gptq_for_sequential_layers` for one.
"""

from collections.abc import Hashable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from fewbit import process
from fewbit.algorithms.scale_search import ScaleSearch
from fewbit.calibration.passage import Passage
from fewbit.calibration.statistics import Statistics
from fewbit.checkpoint.names import full_name, path_in, weight_of
from fewbit.config.algorithms import AWQConfig, ScaleSearchConfig, SmoothQuantConfig
from fewbit.config.schemes import scheme_config
from fewbit.config.spec import QuantizationConfig, QuantizationSpec
from fewbit.config.validation import config_class
from fewbit.engine.block_work import BlockWork
from fewbit.engine.channel_scaler import ChannelScaler
from fewbit.engine.given_layers import stack_of, understood
from fewbit.engine.layer_stack import Inputs, LayerStack, pass_through_layers
from fewbit.engine.stage_quantizer import Member
from fewbit.engine.staged import StagedForward
from fewbit.engine.stages import Stage
from fewbit.errors import ConfigError
from fewbit.models.architecture import Scaling, members_of
from fewbit.models.forward_manager import LayerForwardManager, attention_of, forward_manager
from fewbit.models.memory import trim_heap
from fewbit.models.probe import kind_of, linears_in, shared_inputs
from fewbit.models.scalings import scalings_of_block
from fewbit.models.token_identity import TokenIdentity
from fewbit.nn.exchange import Exchange
from fewbit.nn.linear import linear_of
from fewbit.nn.words import with_methods

LINEAR_TYPES = {"Int8Linear": "W8A8", "FP8Linear": "FP8_DYNAMIC"}
"""Names of linears that stand for a scheme; others are NAMEFakeLinear, or the scheme's own name."""


@config_class
class SequentialSmoothQuantConfig:
    """The search in one object, for `run_smooth_quant_for_sequential_layers`.

    With a weight-only kind of linear it is AWQ, with quantized activations SmoothQuant.
    """

    w_method: Literal["per-tensor", "per-channel", "per-token", "per-block"] | None = None
    """What shares a scale in a weight (per-channel and per-token: an output channel); None is what the kind of linear
    has."""
    a_method: Literal["per-tensor", "per-token", "per-block"] | None = None
    """The same in its input; says nothing where the kind of linear leaves that as it is."""
    q_linear_type: Any = "W8A8"
    """What the linears will be: a scheme's name ("W8A8", "W4A16", "FP8_DYNAMIC"), or a FakeQuantLinear with a preset
    (W8A8FakeLinear), itself or by its name; Int8Linear and FP8Linear are names of the first and the last scheme."""
    group_size: Annotated[int, Field(gt=0)] | None = None
    """Of per-block, or of the kind of linear's own weight groups."""
    duo_scale: bool | Literal["both"] = False
    """Whether the weights' sizes take part in the scale."""

    def __post_init__(self) -> None:
        _ = self.quantization  # what contradicts itself is refused now

    @property
    def quantization(self) -> QuantizationConfig:
        """How weights and inputs will be quantized."""
        name = self.q_linear_type if isinstance(self.q_linear_type, str) else _preset_of(self.q_linear_type)
        chosen = scheme_config(LINEAR_TYPES.get(name, name.removesuffix("FakeLinear")))
        assert chosen.weight is not None
        own_groups = self.w_method is None and chosen.weight.group_size is not None
        w_size = self.group_size if self.w_method == "per-block" or own_groups else None
        a_size = self.group_size if self.a_method == "per-block" else None
        if self.group_size is not None and w_size is None and a_size is None:
            raise ConfigError(f"group_size {self.group_size}: nothing of {name} has groups; say w_method='per-block'")
        return with_methods(
            chosen, w_method=self.w_method, a_method=self.a_method, w_group_size=w_size, a_group_size=a_size
        )

    @property
    def algorithm(self) -> ScaleSearchConfig:
        """The method and its options."""
        if self.quantization.input_tensors is None:
            return AWQConfig(duo_scale=self.duo_scale)
        return SmoothQuantConfig(duo_scale=self.duo_scale)


@process.neutral()
def run_smooth_quant_for_sequential_layers(
    layers: Iterable[nn.Module],
    inputs: Inputs,
    spec: QuantizationConfig | QuantizationSpec | SequentialSmoothQuantConfig | str,
    config: ScaleSearchConfig | None = None,
    *,
    gptq_follows: bool = False,
    exclude: Sequence[str] = (),
    prefix: str = "",
    forward: LayerForwardManager = forward_manager,
) -> dict[str, ScaleSearch]:
    """Scale the channels between the layers' modules in place, so that quantization costs less.

    All layers change at once, at the end: they are as they were if anything is raised.

    Args:
        layers: modules in the order of execution, with weights of any float dtype.
        inputs: what goes into the first layer, as for `run_gptq_for_sequential_layers`. They are not changed.
        spec: how the linears will be quantized: a QuantizationConfig, a spec for weights alone, a scheme's name, or a
            SequentialSmoothQuantConfig, which has the options of the method, too.
        config: SmoothQuantConfig (the default if inputs are quantized) counts the error of weights and inputs,
            AWQConfig that of the weights.
        gptq_follows: the error of weights is what GPTQ will leave of it, instead of what rounding leaves.
        exclude: names or wildcards of linears that will not be quantized: they are scaled, but do not count.
        prefix: put before the names of the result.
        forward: how layers are run.

    Returns what was found by the name of the norm or linear that was divided ("0.input_layernorm"): `scale` is what
    its consumers' columns were multiplied by, all ones where nothing is gained. In 16 bits only powers of two are
    tried where a linear is divided, and a norm's own rounding is made up for in its consumers.
    Raises ConfigError for what cannot be honoured, and if nothing in the layers can be scaled.
    """
    quantization, search = understood(spec, config, SequentialSmoothQuantConfig, ScaleSearchConfig)
    if search is None:
        search = AWQConfig() if quantization.input_tensors is None else SmoothQuantConfig()
    if search.clips:
        raise ConfigError(
            "clip=True cuts the weights off, so the layers would not compute the same; leave it out here"
        )
    assert quantization.weight is not None
    stack = stack_of(layers, quantization.weight, exclude, prefix, forward)
    passage = pass_through_layers(stack, inputs, lambda batches: ())
    configs = {name: quantization for names in stack.linears for name in names}
    inputs_too = quantization.input_tensors
    activations = {f"{name}.input": inputs_too for name in configs if inputs_too is not None}
    known: dict[Hashable, tuple[Scaling, ...]] = {}
    results: dict[str, ScaleSearch] = {}
    for index, layer in enumerate(stack.layers):
        kind, heads = kind_of(layer), _head_dim(layer)
        with stack.loaded(index):
            if kind not in known:
                known[kind] = _scalings(stack, passage, index, search)
            statistics = _gathered(layer, index, passage, known[kind], search.needs.sample if activations else 0)
        scaler = ChannelScaler(search, stack.source, configs, activations, (), heads, gptq_follows, stored=True)
        results |= _fold(stack, index, scaler, statistics, quantization.weight)
        trim_heap()
    if not results:
        raise ConfigError("no norm or linear was found in these layers whose output channels could be scaled")
    stack.commit()
    return results


def _scalings(stack: LayerStack, passage: Passage, index: int, search: ScaleSearchConfig) -> tuple[Scaling, ...]:
    """What can be scaled in a layer, found (or what the config says, checked) on the first batch.

    Where that does not reach all linears, because tokens are routed, every batch is tried: what is scaled has been
    found on each batch that reaches its consumers.
    """
    names = linears_in(stack.layers[index])
    reached, found = _scalings_on(stack, passage, index, 0, search)
    if search.scaling_layers is not None or len(reached) == len(names):
        return found
    others = [_scalings_on(stack, passage, index, batch, search) for batch in range(1, len(passage))]
    tried = [(reached, found), *others]
    candidates = dict.fromkeys(scaling for _, found in tried for scaling in found)
    return tuple(
        scaling
        for scaling in candidates
        if all(scaling in found for reached, found in tried if not reached.isdisjoint(scaling.consumers))
    )


def _scalings_on(
    stack: LayerStack, passage: Passage, index: int, batch: int, search: ScaleSearchConfig
) -> tuple[set[str], tuple[Scaling, ...]]:
    """Linears that one batch reaches, and what can be scaled as far as it tells."""
    layer = stack.layers[index]
    passing, names = partial(passage.forward(layer, index), batch), linears_in(layer)
    if not names:
        return set(), ()

    def forward(changed: Mapping[str, Tensor]) -> Tensor:
        others = Exchange()
        for name, parameter in layer.named_parameters():
            if name in changed:
                others.data(parameter, changed[name])
        with others.for_now():
            return passing()

    groups = shared_inputs(layer, names, [passing])
    output, hidden = passing(), passage.states.get(batch)
    # what a layer adds to its input is what must not change; one without a residual is measured as a whole
    residual = hidden.to(output) if hidden.shape == output.shape else torch.zeros_like(output)
    found = scalings_of_block(layer, groups, forward, residual, _head_dim(layer), search.scaling_layers)
    return set(members_of(groups)), found


def _gathered(
    layer: nn.Module, index: int, passage: Passage, scalings: Sequence[Scaling], sample: int
) -> dict[Scaling, Statistics]:
    """Statistics of the inputs that consumers share; the batches go on to the next layer."""
    statistics: dict[Scaling, Statistics] = {}

    def keep(stage: Stage, scaling: Scaling) -> None:
        if stage.statistics is not None:
            statistics[scaling] = stage.statistics

    stages = [
        Stage(
            order,
            {scaling.consumers[0]: linear_of(layer, scaling.consumers[0])},
            partial(keep, scaling=scaling),
            sample=sample,
            waits=False,
        )
        for order, scaling in enumerate(scalings)
    ]
    identity = TokenIdentity() if any(mask is not None for mask in passage.masks) else None
    with nullcontext() if identity is None else identity:
        forward = passage.forward(layer, index, identity=identity)
        staged = StagedForward(stages, passage.masks, forward, identity=identity)
        staged.run(partial(passage.emit, index=index), "staged")
    return statistics


def _fold(
    stack: LayerStack,
    index: int,
    scaler: ChannelScaler,
    statistics: Mapping[Scaling, Statistics],
    spec: QuantizationSpec,
) -> dict[str, ScaleSearch]:
    """Search and fold all scales of a layer; what was found by the name of the producer."""
    work, results = BlockWork(index, stack.prefix(index)), {}
    for scaling, gathered in statistics.items():
        names = [full_name(work.prefix, consumer) for consumer in scaling.consumers]
        names = [name for name in names if name in scaler.configs]
        members = [Member(name, _weight(stack, name, work), spec, stack.stored_dtype(name)) for name in names]
        if members and not scaler.is_cut(names):
            results[work.prefix + scaling.producer] = scaler.apply(scaling, members, gathered, work)
    stack.change(index, work.dense)
    return results


def _weight(stack: LayerStack, name: str, work: BlockWork) -> Tensor:
    """A linear's weight [out, in] as the block has it by now, float32 where the layer is."""
    weight = linear_of(stack.layers[work.index], path_in(work.prefix, name)).weight
    return work.dense.get(weight_of(name), weight.detach()).to(weight.device, torch.float32)


def _preset_of(linear_type: Any) -> str:
    """The scheme of a FakeQuantLinear with a preset."""
    preset = getattr(linear_type, "preset", None)
    if not isinstance(preset, str):
        raise ConfigError(
            "q_linear_type is a scheme's name or a FakeQuantLinear with a preset (W8A8FakeLinear), not "
            f"{linear_type!r}"
        )
    return preset


def _head_dim(layer: nn.Module) -> int:
    """Channels per head of a layer's attention; 1 if it has none."""
    return int(getattr(attention_of(layer), "head_dim", 1))

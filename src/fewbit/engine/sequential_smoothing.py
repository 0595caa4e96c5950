"""Scales the channels of any stack of layers in memory for quantization: AWQ and SmoothQuant as one search.

The search is that of algorithms/scale_search.py; which channels can be scaled is found in each kind of layer by
trying (models/scalings.py). What the layers compute stays the same: a norm or linear is divided, those who read it are
multiplied. Weights stay floats, ready for whatever quantizes them next, `run_gptq_for_sequential_layers` for one.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from fewbit import process
from fewbit.algorithms.scale_search import ScaleSearch, is_cut, search_scales
from fewbit.calibration.statistics import Statistics
from fewbit.config.algorithms import AWQConfig, ScaleSearchConfig, SmoothQuantConfig
from fewbit.config.schemes import scheme_config
from fewbit.config.spec import QuantizationConfig, QuantizationSpec
from fewbit.config.validation import config_class
from fewbit.engine.layer_stack import Inputs, Pass, computing, open_stack, stored_dtype
from fewbit.errors import ConfigError
from fewbit.models import folding
from fewbit.models.architecture import Scaling
from fewbit.models.forward_manager import LayerForwardManager, attention_of, forward_manager
from fewbit.models.hooks import removed_at_the_end
from fewbit.models.memory import trim_heap
from fewbit.models.probe import shared_inputs
from fewbit.models.scalings import scalings_of_block
from fewbit.nn.exchange import Exchange
from fewbit.nn.linear import linear_of
from fewbit.nn.words import with_methods

logger = logging.getLogger("fewbit")

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
        exclude: names or wildcards of linears that will not be quantized. They are scaled with the others that read
            the same channels, since they must be, but do not count.
        prefix: put before the names of the result.
        forward: how layers are run.

    Returns what was found by the name of the norm or linear that was divided ("0.input_layernorm"): `scale` is what
    its readers' columns were multiplied by, all ones where nothing is gained. In 16 bits only powers of two are tried
    where a linear is divided, and a norm's own rounding is made up for in its readers.
    Raises ConfigError for what cannot be honoured, and if nothing in the layers can be scaled.
    """
    quantization, search = _resolved(spec, config)
    assert quantization.weight is not None
    stack = open_stack(layers, inputs, quantization.weight, exclude, prefix)
    sample = 0 if quantization.input_tensors is None else search.sample_tokens
    known: dict[tuple[object, ...], tuple[Scaling, ...]] = {}
    results: dict[str, ScaleSearch] = {}
    changes = Exchange()
    for index, (layer, names) in enumerate(zip(stack.layers, stack.linears, strict=True)):
        run = Pass(layer, stack.batches, forward)
        with computing(layer):
            every = [name for name, module in layer.named_modules() if isinstance(module, nn.Linear)]
            kind = (type(layer), *((name, p.shape) for name, p in layer.named_parameters()))
            if kind not in known:
                known[kind] = _scalings(run, every, search)
            statistics = _gathered(run, known[kind], sample)
        tensors = {name: parameter.data for name, parameter in layer.named_parameters()}
        for scaling in known[kind]:
            readers = [name for name in scaling.readers if name in names]
            cut = any(is_cut(quantization.weight, tensors[f"{name}.weight"].shape) for name in readers)
            if not readers or cut or scaling not in statistics:
                continue
            found = _scaled(
                layer, tensors, scaling, readers, statistics.pop(scaling), quantization, search, gptq_follows
            )
            name = f"{stack.root}{index}.{scaling.producer}"
            results[name] = found
            gain = found.loss / found.loss_before if found.loss_before else 1.0
            logger.info("%s alpha %s loss × %.3f", name, found.alpha, gain)
        _collect(layer, tensors, changes)
        trim_heap()
    if not results:
        raise ConfigError(
            "no norm or linear was found in these layers whose output channels could be scaled for those who read them"
        )
    changes.commit()
    return results


def _scalings(run: Pass, names: Sequence[str], search: ScaleSearchConfig) -> tuple[Scaling, ...]:
    """What can be scaled in a layer, found (or what the config says, checked) on the first batch.

    Where that does not reach all linears, because tokens are routed, every batch is tried: what is scaled has been
    found on each batch that reaches its readers.
    """
    reached, found = _scalings_on(run, 0, names, search)
    if search.scaling_layers is not None or len(reached) == len(names):
        return found
    tried = [(reached, found), *(_scalings_on(run, index, names, search) for index in range(1, len(run.batches)))]
    candidates = dict.fromkeys(scaling for _, found in tried for scaling in found)
    return tuple(
        scaling
        for scaling in candidates
        if all(scaling in found for reached, found in tried if not reached.isdisjoint(scaling.readers))
    )


def _scalings_on(
    run: Pass, index: int, names: Sequence[str], search: ScaleSearchConfig
) -> tuple[set[str], tuple[Scaling, ...]]:
    """Linears that one batch reaches, and what can be scaled as far as it tells."""
    if not names:
        return set(), ()

    def forward(changed: Mapping[str, Tensor]) -> Tensor:
        with _collect(run.layer, changed, Exchange()).for_now():
            return run.forward(index)

    groups = shared_inputs(run.layer, names, [partial(run.forward, index)])
    output, hidden = run.forward(index), run.batches[index].hidden
    # what a layer adds to its input is what must not change; one without a residual is measured as a whole
    residual = hidden.to(output) if hidden.shape == output.shape else torch.zeros_like(output)
    found = scalings_of_block(run.layer, groups, forward, residual, _head_dim(run.layer), search.scaling_layers)
    return {name for group in groups for name in group}, found


def _gathered(run: Pass, scalings: Iterable[Scaling], sample: int) -> dict[Scaling, Statistics]:
    """Statistics of the inputs that readers share; the batches go on to the next layer."""
    statistics: dict[Scaling, Statistics] = {}
    mask: Tensor | None = None

    def note(scaling: Scaling, x: Tensor) -> None:
        if scaling not in statistics:
            statistics[scaling] = Statistics.empty(x.shape[-1], x.device, sample)
        counts = mask is not None and x.shape[:-1].numel() == mask.numel()
        statistics[scaling].add(x, mask.reshape(x.shape[:-1]).to(x.device) if counts and mask is not None else None)

    with removed_at_the_end() as hooks:
        for scaling in scalings:
            reader = linear_of(run.layer, scaling.readers[0])
            hooks.append(reader.register_forward_pre_hook(lambda _module, x, scaling=scaling: note(scaling, x[0])))
        for index, batch in enumerate(run.batches):
            mask = batch.mask
            run.emit(index, run.forward(index))
    for scaling, found in statistics.items():
        found.finish(scaling.readers[0])
    return statistics


def _scaled(
    layer: nn.Module,
    tensors: dict[str, Tensor],
    scaling: Scaling,
    readers: Sequence[str],
    statistics: Statistics,
    quantization: QuantizationConfig,
    search: ScaleSearchConfig,
    gptq_follows: bool,
) -> ScaleSearch:
    """Search one scale and fold it into `tensors`, the layer's parameters by their names, in their own dtype."""
    weights = [tensors[f"{name}.weight"] for name in readers]
    producer = tensors[f"{scaling.producer}.weight"]
    rows, spec = producer.shape[0], quantization.weight
    assert spec is not None
    heads = _head_dim(layer)
    channels = folding.channel_map(weights[0].shape[1], rows, heads).to(producer.device)

    def per_row(scale: Tensor) -> Tensor:
        return folding.per_row(scale.double(), channels, rows)  # float64, so that what divides is what multiplies

    def stored(scale: Tensor) -> Tensor:
        return folding.fold_into_producer(tensors, scaling, per_row(scale), heads)[1].float()

    found = search_scales(
        [weight.float() for weight in weights],
        [spec] * len(weights),
        statistics,
        search,
        dtype=stored_dtype(weights[0].dtype),
        input_spec=quantization.input_tensors,
        tie=channels if rows != channels.numel() else None,
        power_of_two=producer.ndim > 1 and producer.dtype.itemsize < 4,
        compensated=gptq_follows,
        stored=stored,
    )
    if found.alpha is None:
        return found
    changed, columns = folding.fold(tensors, scaling, per_row(found.scale), heads)
    tensors |= {name: tensor for name, tensor in changed.items() if name in tensors}
    return replace(found, scale=columns.float())


def _resolved(
    spec: QuantizationConfig | QuantizationSpec | SequentialSmoothQuantConfig | str, config: ScaleSearchConfig | None
) -> tuple[QuantizationConfig, ScaleSearchConfig]:
    """How linears will be quantized, and the search."""
    if isinstance(spec, SequentialSmoothQuantConfig):
        if config is not None:
            raise ConfigError("SequentialSmoothQuantConfig holds the method's options; leave config out")
        return spec.quantization, spec.algorithm
    if isinstance(spec, QuantizationSpec):
        spec = QuantizationConfig(weight=spec)
    chosen = scheme_config(spec) if isinstance(spec, str) else spec
    if not isinstance(chosen, QuantizationConfig) or chosen.weight is None:
        raise ConfigError(
            "spec says how weights will be quantized: a QuantizationConfig with weight, a QuantizationSpec, a "
            f"scheme's name or a SequentialSmoothQuantConfig, not {spec!r}"
        )
    if config is None:
        return chosen, AWQConfig() if chosen.input_tensors is None else SmoothQuantConfig()
    if not isinstance(config, AWQConfig | SmoothQuantConfig):
        raise ConfigError(f"config is an AWQConfig or SmoothQuantConfig, not {type(config).__name__}")
    if isinstance(config, AWQConfig) and config.clip:
        raise ConfigError(
            "clip=True cuts the weights off, so the layers would not compute the same; leave it out here"
        )
    return chosen, config


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


def _collect(layer: nn.Module, tensors: Mapping[str, Tensor], changes: Exchange) -> Exchange:
    """Add to `changes` what gives a layer's parameters other values: `tensors` by their names."""
    for name, parameter in layer.named_parameters():
        if name in tensors and tensors[name].data_ptr() != parameter.data_ptr():
            changes.data(parameter, tensors[name])
    return changes

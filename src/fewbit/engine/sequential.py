"""Quantizes any stack of layers in memory, one after another, from recorded inputs: decoder layers, a ViT's encoder …

Every layer is run by `models/forward_manager.py`, in a staged forward (staged.py): linears that share an input are
quantized together, those behind them see what the quantized ones give, and so does the next layer. Linears, and which
of them share an input, are found by looking on while recorded inputs pass the layer.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Annotated, Literal

from pydantic import Field
from torch import nn

from fewbit import process
from fewbit.config.algorithms import CodeConfig, GPTQConfig, RTNConfig
from fewbit.config.schemes import scheme_config
from fewbit.config.spec import QuantizationConfig, QuantizationSpec
from fewbit.config.validation import config_class
from fewbit.engine.layer_stack import Inputs, Pass, computing, open_stack, stored_dtype
from fewbit.engine.stage_quantizer import LinearResult, Member, quantize_stage
from fewbit.engine.staged import StagedForward, Strategy
from fewbit.engine.stages import Stage
from fewbit.errors import ConfigError
from fewbit.models.forward_manager import LayerForwardManager, forward_manager
from fewbit.models.memory import trim_heap
from fewbit.models.probe import shared_inputs
from fewbit.nn.exchange import Exchange
from fewbit.nn.linear import linear_of
from fewbit.nn.words import weight_spec

logger = logging.getLogger("fewbit")


@config_class
class SequentialGPTQConfig:
    """GPTQ in one object: bits, granularity and the method's options, for `run_gptq_for_sequential_layers`."""

    bits: Annotated[int, Field(ge=2, le=8)] = 4
    group_size: Annotated[int, Field(ge=-1)] | None = 64
    """Neighbours along a row that share a scale; per-block only. −1 is an output channel."""
    method: Literal["per-tensor", "per-channel", "per-token", "per-block"] = "per-block"
    """What shares a scale: the weight, an output channel (by either name), or `group_size` neighbours along one."""
    damp: Annotated[float, Field(gt=0, lt=1)] = 0.01
    """Added to H's diagonal, as a share of its mean."""
    blocksize: Annotated[int, Field(gt=0)] = 128
    """Columns per lazy update: speed only."""

    def __post_init__(self) -> None:
        _ = self.spec  # what contradicts itself is refused now

    @property
    def spec(self) -> QuantizationSpec:
        """How the weights are quantized: symmetric integers."""
        return weight_spec(self.bits, self.method, self.group_size if self.method == "per-block" else None)

    @property
    def algorithm(self) -> GPTQConfig:
        """The method's options."""
        return GPTQConfig(damping=self.damp, block_size=self.blocksize)


@process.neutral()
def run_gptq_for_sequential_layers(
    layers: Iterable[nn.Module],
    inputs: Inputs,
    spec: QuantizationSpec | QuantizationConfig | SequentialGPTQConfig | str,
    config: CodeConfig | None = None,
    *,
    exclude: Sequence[str] = (),
    prefix: str = "",
    strategy: Strategy = "staged",
    forward: LayerForwardManager = forward_manager,
) -> dict[str, LinearResult]:
    """Quantize the linears of `layers` in place: the output of each layer is the input of the next.

    Args:
        layers: modules in the order of execution, with weights of any float dtype. Afterwards their linears hold
            dequantized weights in the same dtype, in the same parameters. All layers change at once, at the end, so
            that they are as they were if anything is raised; until then old and new weights are in memory.
        inputs: what goes into the first layer; see `Inputs`. They are not changed.
        spec: how weights are quantized: a spec, the name of a weight-only scheme, or a SequentialGPTQConfig, which
            has the options of the method, too.
        config: the method and its options; GPTQ by default.
        exclude: names or wildcards of linears that stay as they are, such as routers ("*.gate"). Other matrices stay,
            too, with a warning; stacks of them (experts in one tensor) have to be named here.
        prefix: put before the names of the result, which are INDEX.LINEAR otherwise ("model.layers" makes
            "model.layers.0.self_attn.q_proj").
        strategy: "staged" holds the forwards of all batches in memory, "replay" that of one: same result.
        forward: how layers are run.

    Returns a LinearResult by name for every quantized linear: the QuantTensor, and what it cost.
    Raises ConfigError for what cannot be honoured, before anything is changed.
    """
    weights, algorithm = _resolved(spec, config)
    stack = open_stack(layers, inputs, weights, exclude, prefix)
    results: dict[str, LinearResult] = {}
    changes = Exchange()
    for layer, names in zip(stack.layers, stack.linears, strict=True):
        results |= _quantize_layer(Pass(layer, stack.batches, forward), names, weights, algorithm, strategy, changes)
        trim_heap()
    changes.commit()
    return results


def _quantize_layer(
    run: Pass,
    names: Mapping[str, str],
    spec: QuantizationSpec,
    algorithm: CodeConfig,
    strategy: Strategy,
    changes: Exchange,
) -> dict[str, LinearResult]:
    """One layer's linears, given as {name inside the layer: full name}; the batches go on to the next layer. The new
    weights go into `changes`."""
    linears = {name: linear_of(run.layer, name) for name in names}
    dtypes = {name: linear.weight.dtype for name, linear in linears.items()}
    results: dict[str, LinearResult] = {}

    def decide(stage: Stage) -> None:
        members = [
            Member(name, linear.weight.detach().float(), spec, stored_dtype(dtypes[name]))
            for name, linear in stage.members.items()
        ]
        for name, result in quantize_stage(members, stage.statistics, algorithm).items():
            weight = linears[name].weight
            linears[name].weight = nn.Parameter(result.weight.dequantize(weight.dtype), requires_grad=False)
            results[names[name]] = result
            logger.info("%s loss %.4e tokens %d seconds %.2f", names[name], result.loss, result.tokens, result.seconds)
            if result.fallback is not None:
                logger.warning("%s fell back: %s", names[name], result.fallback)

    with computing(run.layer, linears.values(), changes):
        groups = shared_inputs(run.layer, linears, [partial(run.forward, index) for index in range(len(run.batches))])
        reached = {name for group in groups for name in group}
        groups += tuple((name,) for name in linears if name not in reached)  # rounded to nearest, and reported
        reference = run.reference(groups, algorithm) if isinstance(algorithm, GPTQConfig) else None
        stages = [Stage(order, {name: linears[name] for name in group}, decide) for order, group in enumerate(groups)]
        masks = [batch.mask for batch in run.batches]
        StagedForward(stages, masks, run.forward, reference).run(run.emit, strategy)
    return results


def _resolved(
    spec: QuantizationSpec | QuantizationConfig | SequentialGPTQConfig | str, config: CodeConfig | None
) -> tuple[QuantizationSpec, CodeConfig]:
    """The spec of weights and the method's options."""
    if isinstance(spec, SequentialGPTQConfig):
        if config is not None:
            raise ConfigError("SequentialGPTQConfig holds the method's options; leave config out")
        return spec.spec, spec.algorithm
    if config is not None and not isinstance(config, GPTQConfig | RTNConfig):
        raise ConfigError(f"config is a GPTQConfig or RTNConfig, not {type(config).__name__}")
    algorithm = config or GPTQConfig()
    if isinstance(spec, QuantizationSpec):
        return QuantizationConfig(weight=spec).weight or spec, algorithm  # says what a weight's spec cannot be
    name = spec if isinstance(spec, str) else "the config"
    chosen = scheme_config(spec) if isinstance(spec, str) else spec
    if isinstance(chosen, GPTQConfig | RTNConfig):
        raise ConfigError(
            f"{type(chosen).__name__} says nothing of bits; give a spec before it, or a SequentialGPTQConfig for both"
        )
    if not isinstance(chosen, QuantizationConfig):
        raise ConfigError(
            f"spec is a QuantizationSpec, a scheme's name or a SequentialGPTQConfig, not {type(spec).__name__}"
        )
    if chosen.weight is None or any((chosen.input_tensors, chosen.output_tensors, chosen.bias)):
        raise ConfigError(
            f"{name} does not quantize weights alone, which is all that can be done in place; give a QuantizationSpec "
            "for the weights"
        )
    return chosen.weight, algorithm

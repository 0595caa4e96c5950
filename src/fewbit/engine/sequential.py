"""Quantizes any stack of layers in memory, one after another, from recorded inputs: decoder layers, a ViT's encoder …

Every layer is run by `models/forward_manager.py`, in a staged forward (staged.py): linears that share an input are
quantized together, those behind them see what the quantized ones give, and so does the next layer. Linears, and which
of them share an input, are found by looking on while recorded inputs pass the layer.
"""

from collections.abc import Iterable, Sequence
from functools import partial
from typing import Annotated, Literal

from pydantic import Field
from torch import nn

from fewbit import process
from fewbit.calibration.passage import spread
from fewbit.checkpoint.names import weight_of
from fewbit.config.algorithms import CodeConfig, GPTQConfig
from fewbit.config.spec import QuantizationConfig, QuantizationSpec
from fewbit.config.validation import config_class
from fewbit.engine.block_quantizer import BlockQuantizer, Targets
from fewbit.engine.given_layers import stack_of, understood
from fewbit.engine.layer_stack import Inputs, pass_through_layers
from fewbit.engine.stage_quantizer import LinearResult
from fewbit.engine.staged import Strategy
from fewbit.errors import ConfigError
from fewbit.models.forward_manager import LayerForwardManager, forward_manager
from fewbit.models.memory import trim_heap
from fewbit.nn.words import weight_spec


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
        _ = self.quantization  # what contradicts itself is refused now

    @property
    def quantization(self) -> QuantizationConfig:
        """How the weights are quantized: symmetric integers."""
        size = self.group_size if self.method == "per-block" else None
        return QuantizationConfig(weight=weight_spec(self.bits, self.method, size))

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
    chosen, method = understood(spec, config, SequentialGPTQConfig, CodeConfig)
    weights, algorithm = chosen.weight, method or GPTQConfig()
    if weights is None or chosen != QuantizationConfig(weight=weights):
        name = spec if isinstance(spec, str) else "the config"
        raise ConfigError(f"{name} does not quantize weights alone, which is all that can be done in place")
    stack = stack_of(layers, weights, exclude, prefix, forward)
    passage = pass_through_layers(stack, inputs, partial(spread, algorithm.needs.reference))
    configs = {name: chosen for names in stack.linears for name in names}
    quantizer = BlockQuantizer(stack, Targets(configs), algorithm)
    results: dict[str, LinearResult] = {}
    for index in range(len(stack)):
        work = quantizer.quantize(index, passage, strategy)
        stack.change(index, {weight_of(name): result.weight.dequantize() for name, result in work.results.items()})
        results |= work.results
        trim_heap()
    stack.commit()
    return results

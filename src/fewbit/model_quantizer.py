"""`ModelQuantizer(config).quantize_model(model, dataloader)`: a model in memory, quantized in place.

The name is AMD Quark's. A transformers model goes through the same walk as a checkpoint and gets packed linears. Any
other module gets round-to-nearest linears and convolutions, with static activations calibrated on the data.
"""

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from fewbit import process, ptq
from fewbit.calibration.tokens import token_batch
from fewbit.checkpoint.names import bias_of, weight_of
from fewbit.checkpoint.native import NativeCheckpoint
from fewbit.config.algorithms import RTNConfig
from fewbit.config.matching import resolve
from fewbit.config.recipe import Config
from fewbit.config.run_options import RunOptions
from fewbit.contents import LINEAR_SLOTS
from fewbit.errors import CalibrationError, ConfigError
from fewbit.models.untouched import sentence
from fewbit.nn import attention, in_memory
from fewbit.nn.attach import attach
from fewbit.nn.exchange import Exchange, carry_over
from fewbit.nn.fake_quant import FakeQuant, FakeQuantLinear
from fewbit.nn.linear import Linear
from fewbit.nn.quant_linear import QuantLinear
from fewbit.nn.stepped import Stepped
from fewbit.nn.steps import QUANTIZE
from fewbit.runs.quantize import quantize_model
from fewbit.scratch import temporary_directory

logger = logging.getLogger("fewbit")


@dataclass(frozen=True)
class ModelQuantizer:
    """Quantizes models as a Config says."""

    config: Config

    def __post_init__(self) -> None:
        if not isinstance(self.config, Config):
            raise ConfigError(
                f"a ModelQuantizer takes a Config, not {type(self.config).__name__}; Config.from_dict makes one"
            )

    def quantize_model(
        self, model: nn.Module, dataloader: Iterable[Any] | None = None, output: str | Path | None = None
    ) -> nn.Module:
        """Quantize `model` in place and return it.

        Args:
            dataloader: calibration batches: token ids [batch, tokens], {"input_ids": …, "attention_mask": …}, or for
                other modules whatever they are called with (a tensor, a tuple, a dict of arguments). None is enough
                for round-to-nearest with dynamic activations or none.
            output: where the run of a transformers model is kept, e.g. to export it: `Run(output).export(…)`.

        What stays in full precision beside linears and convolutions that the config leaves out is logged as a
        warning. Raises FewbitError for a config, a model or data that cannot be used; whatever is raised, Ctrl-C
        included, leaves the model as it was.
        """
        inside = in_memory.unwrapped(model)
        if isinstance(inside, PreTrainedModel) and inside.get_output_embeddings() is not None:
            self._by_walk(inside, dataloader, output)
        elif output is not None:
            raise ConfigError(
                f"{type(inside).__name__} is no language model of transformers, so no run is written of it; leave "
                "output out and keep its state_dict"
            )
        else:
            self._by_replacement(inside, dataloader)
        return model

    @staticmethod
    def freeze(model: nn.Module) -> nn.Module:
        """Quark's last step: weights are packed already after `quantize_model`, or are packed now."""
        return ptq.freeze(model) if any(isinstance(module, FakeQuant) for module in model.modules()) else model

    def _by_walk(self, model: PreTrainedModel, dataloader: Iterable[Any] | None, output: str | Path | None) -> None:
        _refuse_shared(model)
        if self.config.attention is not None:  # an error now, not after the work
            attention.check(model, self.config.attention)
        searching = [found.name for found in self.config.algo_config if found.needs.moment]
        if dataloader is None and searching:
            raise ConfigError(
                f"{searching[0]} needs calibration data: give a dataloader, or algo_config=None to round to nearest"
            )
        data: Any = "none" if dataloader is None else [_ids_and_mask(item) for item in dataloader]
        if data == []:
            raise CalibrationError("the dataloader gave no batch; calibration needs at least one")
        with temporary_directory("model-quantizer") as scratch:
            kept = scratch / "run" if output is None else output
            directory = quantize_model(model, self.config, kept, calibration=data, options=RunOptions(progress=False))
            install(model, NativeCheckpoint(directory))

    def _by_replacement(self, model: nn.Module, dataloader: Iterable[Any] | None) -> None:
        config, what = self.config, f"{type(model).__name__} is no language model of transformers"
        if config.algo_config != (RTNConfig(),):
            raise ConfigError(
                f"{what}: only round to nearest works here (algo_config=RTNConfig()); GPTQ and smoothing of any stack "
                "of layers: run_gptq_for_sequential_layers"
            )
        if config.attention is not None:
            raise ConfigError(f"{what}: its attention cannot be quantized")
        modules = {name: type(module).__name__ for name, module in ptq.quantizable(model).items()}
        configs = {name: match.config for name, match in resolve(config, modules).items() if match.config is not None}
        if not configs:
            raise ConfigError("the recipe quantizes nothing: every linear and convolution is excluded")
        needs_data = any(found.needs_data for found in configs.values())
        if needs_data and dataloader is None:
            raise CalibrationError("static activation scales need calibration data; give a dataloader")
        with process.neutral():
            left = ptq.left_alone(model, modules)
            _, changes = ptq.replacing(model, configs)
        with changes.undone_on_error():  # the user may try again with other data
            if needs_data and dataloader is not None:
                _calibrate(model, dataloader)
        if left:  # nothing is left alone in silence
            logger.warning(sentence(left))


@process.neutral()
def install(model: PreTrainedModel, run: NativeCheckpoint) -> None:
    """Give a model in memory the weights and quantizers of a run of it, in place: all of them at once."""
    activations, steps = run.activations(), run.steps()
    state = model.state_dict(keep_vars=True)
    changes, values = Exchange(), {}
    for name in sorted(run.info().keys() - run.quantized.keys() & state.keys()):
        value = run.read([name])[name].to(state[name])
        if not torch.equal(value, state[name]):
            values[name] = value
            changes.data(state[name], value)
    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    made: dict[str, Stepped] = {}
    for name, linear in linears.items():
        flows = (activations.get(f"{name}.{slot}") for slot in LINEAR_SLOTS)
        inputs, outputs = (None if known is None else known.spec for known in flows)
        if weight_of(name) in run.quantized:
            bias = values.get(bias_of(name), linear.bias)
            made[name] = QuantLinear(run.read_quantized(weight_of(name)), bias)
        elif inputs or outputs:
            made[name] = FakeQuantLinear.from_module(linear, input_tensors=inputs, output_tensors=outputs)
        elif any(step.kind != QUANTIZE for step in steps.get(name, ())):
            made[name] = Linear.from_linear(linear)
    attach(model, activations, steps, linears=made, changes=changes)
    for name, new in made.items():
        carry_over(linears[name], new.to(linears[name].weight.device))
    changes.replace(model, {linears[name]: new for name, new in made.items()})
    changes.commit()


def _calibrate(model: nn.Module, dataloader: Iterable[Any]) -> None:
    """Static scales from the data. The model's mode is put back; it is called on the devices it may count on."""
    mode = Exchange()
    for module in model.modules():
        mode.item(vars(module), "training", False)
    with mode.for_now(), ptq.calibrate(model):
        for item in dataloader:
            with process.neutral(default_device=False):
                if isinstance(item, Mapping):
                    model(**item)
                else:
                    model(*item) if isinstance(item, list | tuple) else model(item)


def _refuse_shared(model: nn.Module) -> None:
    """ConfigError for modules that are used in two places: a run quantizes each place for what it sees there."""
    names: dict[nn.Module, str] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        first = names.setdefault(module, name)
        if first != name and any(isinstance(child, nn.Linear) for child in module.modules()):
            raise ConfigError(
                f"{first} and {name} are one {type(module).__name__}, which cannot be quantized for two inputs; give "
                "them copies (copy.deepcopy), or use fewbit.quantize_, which rounds it once"
            )


@process.neutral()
def _ids_and_mask(item: Any) -> dict[str, Tensor]:
    """A batch as the walk takes it; whatever else a dataloader gives (labels) is left out."""
    batch = token_batch(item)
    return {name: batch[name] for name in ("input_ids", "attention_mask") if name in batch}

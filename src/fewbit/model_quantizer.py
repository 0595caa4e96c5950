"""`ModelQuantizer(config).quantize_model(model, dataloader)`: a model in memory, quantized in place.

The name is AMD Quark's. A transformers model goes through the same walk as a checkpoint (any algorithm, block by
block) and gets its linears replaced by packed ones that run. Any other module gets round-to-nearest linears and
convolutions, with static activations calibrated on the data.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from fewbit import ptq
from fewbit.calibration.tokens import token_batch
from fewbit.checkpoint.native import NativeCheckpoint
from fewbit.config.algorithms import RTNConfig
from fewbit.config.matching import resolve
from fewbit.config.recipe import Config
from fewbit.errors import CalibrationError, ConfigError
from fewbit.nn import attention
from fewbit.nn.activation import ActivationQuantizer
from fewbit.nn.attach import SLOTS, attention_config
from fewbit.nn.fake_quant import FakeQuant, FakeQuantLinear
from fewbit.nn.quant_linear import QuantLinear
from fewbit.pipeline.quantize import quantize_model


@dataclass(frozen=True)
class ModelQuantizer:
    """Quantizes models as a Config says."""

    config: Config

    def quantize_model(
        self, model: nn.Module, dataloader: Iterable[Any] | None = None, output: str | Path | None = None
    ) -> nn.Module:
        """Quantize `model` in place and return it.

        Args:
            dataloader: calibration batches: token ids [batch, tokens], {"input_ids": …, "attention_mask": …}, or for
                other modules whatever they are called with (a tensor, a tuple, a dict of arguments). None is enough
                for round-to-nearest with dynamic activations or none.
            output: where the run of a transformers model is kept, e.g. to export it: `Run(output).export(…)`.

        Raises FewbitError for a config or data that cannot be used.
        """
        if isinstance(model, PreTrainedModel) and model.get_output_embeddings() is not None:
            self._by_walk(model, dataloader, output)
        elif output is not None:
            raise ConfigError(
                f"{type(model).__name__} is no language model of transformers, so no run is written of it; leave "
                "output out and keep its state_dict"
            )
        else:
            self._by_replacement(model, dataloader)
        return model

    @staticmethod
    def freeze(model: nn.Module) -> nn.Module:
        """Quark's last step: weights are packed already after `quantize_model`, or are packed now."""
        return ptq.freeze(model) if any(isinstance(module, FakeQuant) for module in model.modules()) else model

    def _by_walk(self, model: PreTrainedModel, dataloader: Iterable[Any] | None, output: str | Path | None) -> None:
        if self.config.attention is not None:  # an error now, not after the work
            attention.attach(model, self.config.attention)
            attention.detach(model)
        data: Any = "none" if dataloader is None else [_ids_and_mask(item) for item in dataloader]
        if data == []:
            raise CalibrationError("the dataloader gave no batch; calibration needs at least one")
        with tempfile.TemporaryDirectory(prefix="fewbit-") as scratch:
            kept = Path(scratch) / "run" if output is None else output
            directory = quantize_model(model, self.config, kept, calibration=data, progress=False)
            install(model, NativeCheckpoint(directory))

    def _by_replacement(self, model: nn.Module, dataloader: Iterable[Any] | None) -> None:
        config = self.config
        if config.algo_config != (RTNConfig(),):
            raise ConfigError(
                f"{type(model).__name__} is no language model of transformers: only round to nearest works here "
                "(algo_config=RTNConfig()); GPTQ and smoothing of any stack of layers: run_gptq_for_sequential_layers"
            )
        if config.attention is not None:
            raise ConfigError(
                f"{type(model).__name__} is no language model of transformers: its attention cannot be quantized"
            )
        modules = {name: type(module).__name__ for name, module in ptq.quantizable(model).items()}
        if "" in modules:
            raise ConfigError(f"the model is itself a {modules['']}: use FakeQuantLinear.from_module(model, …)")
        configs = {name: match.config for name, match in resolve(config, modules).items() if match.config is not None}
        if not configs:
            raise ConfigError("the recipe quantizes nothing: every linear and convolution is excluded")
        needs_data = any(found.needs_data for found in configs.values())
        if needs_data and dataloader is None:
            raise CalibrationError("static activation scales need calibration data; give a dataloader")
        before = {name: model.get_submodule(name) for name in configs}
        ptq.replace_(model, configs)
        if not needs_data or dataloader is None:
            return
        training = {module: module.training for module in model.modules()}
        try:
            with ptq.calibrate(model.eval()), torch.no_grad():
                for item in dataloader:
                    _call(model, item)
        except BaseException:  # as it was: the user may try again with other data
            ptq.exchange(model, {id(model.get_submodule(name)): module for name, module in before.items()})
            raise
        finally:
            for module, flag in training.items():
                module.training = flag


def install(model: PreTrainedModel, run: NativeCheckpoint) -> None:
    """Give a model in memory the weights and quantizers of a run of it, in place."""
    activations = run.activations()
    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    changed = run.info().keys() - run.quantized.keys()
    state = model.state_dict()
    with torch.no_grad():
        for name in changed:
            if name in state:
                state[name].copy_(run.read([name])[name])
    for name, linear in linears.items():
        slots = {slot: activations.get(f"{name}.{slot}") for slot in SLOTS}
        weight = f"{name}.weight"
        if weight in run.quantized:
            made: nn.Module = QuantLinear.from_quant_tensor(run.read_quantized(weight), linear.bias)
        elif any(slots.values()):
            specs = {slot: None if known is None else known.spec for slot, known in slots.items()}
            made = FakeQuantLinear.from_module(linear, input_tensors=specs["input"], output_tensors=specs["output"])
        else:
            continue
        for slot, known in slots.items():
            if known is not None:
                setattr(made, f"{slot}_quantizer", ActivationQuantizer(known.spec, known, persistent=True))
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, made.to(linear.weight.device).train(model.training))
    inside = {name: known for name, known in activations.items() if name.rpartition(".")[2] not in SLOTS}
    if (wanted := attention_config(inside)) is not None:
        attention.attach(model, wanted, inside, persistent=True)


def _ids_and_mask(item: Any) -> dict[str, Tensor]:
    """A batch as the walk takes it; whatever else a dataloader gives (labels) is left out."""
    batch = token_batch(item)
    return {name: batch[name] for name in ("input_ids", "attention_mask") if name in batch}


def _call(model: nn.Module, item: Any) -> None:
    if isinstance(item, Mapping):
        model(**item)
    elif isinstance(item, list | tuple):
        model(*item)
    else:
        model(item)

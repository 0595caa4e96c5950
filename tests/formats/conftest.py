"""Fixtures: finished runs of a tiny llama in every format, and what they should compute."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from native_runs import EVERY, SCHEMES, write_run
from transformers import AutoModelForCausalLM

from fewbit.checkpoint.native import NativeCheckpoint
from fewbit.config.spec import QuantizationSpec
from fewbit.nn.activation import ActivationQuantizer
from fewbit.nn.attention import HeadsQuantizer


@pytest.fixture(scope="session")
def native(tmp_path_factory, checkpoint) -> Callable[..., Path]:
    """native(name of EVERY, dtype, attention={slot: spec}): directory of a run, made once; copy before changing."""
    made: dict[str, Path] = {}

    def make(name: str, dtype: torch.dtype = torch.float32, attention: Mapping[str, QuantizationSpec] | None = None):
        key = repr((name, dtype, attention))
        if key not in made:
            schemes = {linear: SCHEMES[scheme][1] for linear, scheme in EVERY[name].items()}
            made[key] = write_run(
                tmp_path_factory.mktemp("native") / "run", checkpoint("llama", dtype), schemes, attention
            )
        return made[key]

    return make


@pytest.fixture(scope="session")
def emulated(dequantized) -> Callable[..., AutoModelForCausalLM]:
    """emulated(run, dtype): a transformers model with the run's weights, whose activations fewbit fake-quantizes."""

    def load(run: Path, dtype: torch.dtype = torch.float32):
        model = dequantized(run, dtype)
        for name, activation in NativeCheckpoint(run).activations().items():
            module, _, slot = name.rpartition(".")
            quantizer = ActivationQuantizer(activation.spec, activation)
            owner = model.get_submodule(module)
            if slot == "input":
                owner.register_forward_pre_hook(lambda _, inputs, quantize=quantizer: (quantize(inputs[0]),))
            else:
                setattr(owner, f"fake_{slot}", HeadsQuantizer(activation.spec, activation))
                model.config._attn_implementation = "fewbit_fake"
        return model

    return load

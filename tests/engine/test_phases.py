"""Methods of one's own at every level: they run in their order, are given what they ask for, and count."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

import pytest
import torch

import fewbit
from fewbit import algorithms
from fewbit.algorithms.rtn import rtn
from fewbit.checkpoint.native import NativeCheckpoint, block_file
from fewbit.checkpoint.source import SafetensorsSource
from fewbit.config.algorithms import ALGORITHMS, AlgorithmConfig, CodeConfig, Needs, algorithm_configs
from fewbit.config.recipe import Config
from fewbit.config.validation import config_class
from fewbit.engine.phases import BLOCK_PHASES, MODEL_PHASES
from fewbit.models.blockwise import BlockwiseModel

IDS = torch.randint(1, 300, (6, 24), generator=torch.Generator().manual_seed(0))


@config_class
class HalvedConfig(AlgorithmConfig):
    """Every matrix of the blocks is halved before anything else."""

    name: str = "halved"
    level: ClassVar[str] = "model"


@config_class
class PlainConfig(CodeConfig):
    """Codes without anything."""

    name: str = "plain"


@config_class
class TunedConfig(AlgorithmConfig):
    """The scales of a block's last linear are learned: a few steps towards the output in full precision."""

    name: str = "tuned"
    level: ClassVar[str] = "block"
    steps: int = 5

    @property
    def needs(self) -> Needs:
        return Needs(moment=True, reference=0.5, gradients=True)


class Halved:
    def __init__(self, source):
        self._source = source

    def __getattr__(self, name):
        return getattr(self._source, name)

    def read(self, names, dtype=None):
        read = self._source.read(names, dtype)
        return {name: x / 2 if x.ndim == 2 and ".layers." in name else x for name, x in read.items()}


def tuned(done, options):
    """One factor for the whole of down_proj, by gradient descent."""
    name = f"{done.work.prefix}mlp.down_proj"
    linear, result = done.block.mlp.down_proj, done.work.results[name]
    weight = linear.weight.detach()
    factor = torch.ones((), requires_grad=True)
    inputs = []
    hook = linear.register_forward_pre_hook(lambda _, args: inputs.append(args[0].detach()))
    outputs = [done.forward(batch).detach() for batch in done.reference]
    hook.remove()
    losses = []
    for _ in range(options.steps):
        loss = sum(
            (out + (factor - 1) * (x @ weight.T) - done.target(batch)).square().mean()
            for out, x, batch in zip(outputs, inputs, done.reference, strict=True)
        )
        (gradient,) = torch.autograd.grad(loss, factor)
        losses.append(float(loss.detach()))
        factor = (factor - 0.1 * gradient.sign() * 2.0**-6).detach().requires_grad_()
    LOSSES.append(losses)
    scaled = replace(
        result.weight, scale=(result.weight.scale.float() * factor.detach()).to(result.weight.scale.dtype)
    )
    done.work.results[name] = replace(result, weight=scaled)
    linear.weight = torch.nn.Parameter(scaled.dequantize(), requires_grad=False)


LOSSES: list[list[float]] = []


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    LOSSES.clear()
    for config in (HalvedConfig, PlainConfig, TunedConfig):
        monkeypatch.setitem(ALGORITHMS, config.name, config)
    monkeypatch.setitem(
        MODEL_PHASES, "halved", lambda model, options: BlockwiseModel(model.skeleton, Halved(model.source))
    )
    monkeypatch.setitem(BLOCK_PHASES, "tuned", tuned)
    monkeypatch.setitem(
        algorithms.CODE_FINDERS,
        "plain",
        lambda weight, statistics, spec, scale, options: rtn(weight, None, spec, scale),
    )


def quantized(model, output, algorithm, **options):
    recipe = {"scheme": "W3A16", "group_size": 32, "algorithm": algorithm}
    given = {"calibration": [IDS[:3], IDS[3:]], "progress": False, "device": "cpu"} | options
    return fewbit.quantize(model, output=output, config=recipe, **given).directory


def test_levels_follow_each_other_whatever_the_order():
    found = [config.name for config in algorithm_configs("tuned+plain+smoothquant+awq+halved")]
    assert found == ["halved", "smoothquant", "awq", "plain", "tuned"]
    assert [config.name for config in algorithm_configs("tuned:steps=2")] == ["rtn", "tuned"]
    recipe = Config.from_dict({"scheme": "W4A16", "algorithm": "halved+gptq+tuned:steps=3"})
    assert Config.from_dict(recipe.to_dict()) == recipe
    assert recipe.at("block") == (TunedConfig(steps=3),)


def test_a_phase_on_the_model_comes_before_all_else(checkpoint, tmp_path):
    plain = NativeCheckpoint(quantized(checkpoint("llama"), tmp_path / "plain", "rtn", calibration="none"))
    halved = NativeCheckpoint(quantized(checkpoint("llama"), tmp_path / "halved", "halved+rtn", calibration="none"))
    for name in plain.quantized:
        torch.testing.assert_close(halved.read([name])[name], plain.read([name])[name] / 2)


def test_a_phase_on_a_block_is_given_what_it_needs_and_the_next_block_sees_it(checkpoint, tmp_path):
    model = checkpoint("llama")
    run = quantized(model, tmp_path / "run", "plain+tuned")
    assert len(LOSSES) == 2
    assert all(losses[-1] < losses[0] for losses in LOSSES)
    before = quantized(model, tmp_path / "before", "plain")
    assert not torch.equal(*(NativeCheckpoint(d).read_quantized(DOWN).scale for d in (run, before)))
    first = fewbit.evaluate(run, [IDS], against=model).kl_mean
    assert first < 1.05 * fewbit.evaluate(before, [IDS], against=model).kl_mean


DOWN = "model.layers.0.mlp.down_proj.weight"


def test_a_run_with_a_phase_on_blocks_is_resumed_to_the_same_bytes(checkpoint, tmp_path):
    model = checkpoint("llama")
    whole = quantized(model, tmp_path / "whole", "gptq:drift=0.5+tuned")
    again = quantized(model, tmp_path / "again", "gptq:drift=0.5+tuned")
    (again / "report.json").unlink()
    block_file(again, 1).unlink()
    quantized(model, again, "gptq:drift=0.5+tuned", resume=True)
    assert block_file(again, 1).read_bytes() == block_file(whole, 1).read_bytes()


def test_searches_for_channel_scales_follow_each_other(checkpoint, tmp_path):
    model, recipe = checkpoint("llama"), {"scheme": "W8A8", "algorithm": "smoothquant:alpha=0.5+awq:alpha=0.4+gptq"}
    run = fewbit.quantize(
        model, output=tmp_path / "run", config=recipe, calibration=[IDS], progress=False, device="cpu"
    )
    assert fewbit.evaluate(run, [IDS], against=model).kl_mean < 1e-3, "folded twice, the model is what it was"
    alphas = {row["name"]: row.get("scaling") for row in run.report["linears"]}
    assert alphas["model.layers.1.self_attn.q_proj"] == [0.5, 0.4]
    name = "model.layers.1.input_layernorm.weight"
    before, after = SafetensorsSource(model).read([name])[name], NativeCheckpoint(run.directory).read([name])[name]
    (step, *_) = NativeCheckpoint(run.directory).steps()["model.layers.1.self_attn.q_proj"]
    torch.testing.assert_close(step.tensors["smoothing"], before / after, rtol=1e-5, atol=0.0)

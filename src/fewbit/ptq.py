"""Very easy quantization of any model with linears and convolutions: quantize, calibrate, freeze.

    report = fewbit.quantize_(model, weights="int4", activations="int8", exclude="lm_head")
    with fewbit.calibrate(model):           # only if activations are static
        model(**batch)
    fewbit.freeze(model)                    # pack the weights
    torch.save(model.state_dict(), …)       # loads into a model after the same quantize_ and freeze

Weights are rounded to nearest, each on the grid with the least squared error; for GPTQ, scale searches and models
larger than memory see `fewbit.quantize`. Modules are exchanged in place for those of nn/.
"""

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from fewbit import process
from fewbit.calibration.observers import MovingAverageObserver, Observer, make_observer
from fewbit.config.matching import matching
from fewbit.config.spec import QuantizationConfig, QuantizationSpec
from fewbit.errors import CalibrationError, ConfigError, nearest
from fewbit.models.untouched import Untouched, untouched
from fewbit.nn import in_memory
from fewbit.nn.activation import ActivationQuantizer
from fewbit.nn.exchange import Exchange, carry_over
from fewbit.nn.fake_quant import FakeQuant, FakeQuantConv1d, FakeQuantConv2d, FakeQuantLinear
from fewbit.nn.in_memory import check_plain
from fewbit.nn.linear import Linear
from fewbit.nn.quant_linear import QuantLinear
from fewbit.nn.words import named_input, named_weight

Precision = str | torch.dtype | QuantizationSpec | None
ModuleFilter = str | Sequence[str] | Callable[[nn.Module, str], bool]
_FAKE: dict[type[nn.Module], type[Any]] = {
    nn.Linear: FakeQuantLinear,
    Linear: FakeQuantLinear,
    nn.Conv1d: FakeQuantConv1d,
    nn.Conv2d: FakeQuantConv2d,
}


@dataclass(frozen=True)
class PTQRow:
    """What was done to one module."""

    name: str
    kind: str
    weight: str  # its spec in words; "" if it stays as it is
    activations: str
    bits_per_weight: float  # once frozen (linears; a convolution's weight is not packed)
    error: float  # ‖Ŵ − W‖² / ‖W‖²


@dataclass(frozen=True)
class PTQReport:
    """What `quantize_` did; prints as a table."""

    rows: tuple[PTQRow, ...]
    excluded: tuple[str, ...] = ()
    """Linears and convolutions that a pattern left out."""
    skipped: dict[str, str] = field(default_factory=dict)
    """Other modules with matrices, embeddings aside: what they are, and their share of the parameters. They stay."""

    def __str__(self) -> str:
        width = max(len(row.name) for row in self.rows)
        lines = [
            f"{row.name:{width}}  {row.weight or '-':28}  {row.activations or '-':24}  "
            f"{row.bits_per_weight:6.3f} bits  error {row.error:.2e}"
            for row in self.rows
        ]
        lines += [f"{name:{width}}  excluded" for name in self.excluded]
        lines += [f"{name:{width}}  skipped: {reason}" for name, reason in self.skipped.items()]
        return "\n".join(lines)


@process.neutral()
def quantize_(
    model: nn.Module,
    weights: Precision = "int8",
    activations: Precision = None,
    exclude: ModuleFilter | None = (),
    modules: ModuleFilter | None = "*",
) -> PTQReport:
    """Fake-quantize the linears and convolutions of `model`, in place.

    Args:
        weights: "int8", "int4", "int2", "uint4" (affine), "fp8" …, a QuantizationSpec, or None. By name, 8 bits have
            a scale per output channel; fewer bits one for 128 neighbours (or 64, 32, a channel, if that does not fit).
        activations: "int8", "fp8" …: inputs, one static scale per tensor, found by `calibrate`. A QuantizationSpec
            says anything else, e.g. is_dynamic=True with per_token, which needs no calibration.
        exclude: names, wildcards or "re:" patterns of modules that stay as they are, e.g. "lm_head"; or as below.
        modules: patterns, a class, or a function (module, name) that says which modules to quantize; others stay.

    Returns a report with a row for each quantized module, and what else there is. ConfigError if a pattern matches
    nothing, a spec does not fit a module, a module has something that would be lost (a forward of its own …), or
    nothing would be quantized; the model is unchanged then. Hooks go along.
    """
    if weights is None and activations is None:
        raise ConfigError("nothing to quantize: name weights, activations or both")
    model = in_memory.unwrapped(model)
    found = quantizable(model)
    left_out = _matching(() if exclude is None else exclude, found, "exclude")
    chosen = _matching("*" if modules is None else modules, found, "modules")
    excluded = tuple(name for name in found if name in left_out or name not in chosen)
    included = [name for name in found if name not in excluded]
    if not included:
        raise ConfigError(f"exclude leaves nothing to quantize of {len(found)} linears and convolutions")
    made, changes = replacing(model, {name: _config(found[name], weights, activations) for name in included})
    rows = tuple(_row(name, found[name], fake) for name, fake in made.items())
    report = PTQReport(rows, excluded, _skipped(model, found))
    changes.commit()
    return report


def quantizable(model: nn.Module) -> dict[str, nn.Module]:
    """The linears and convolutions of a model that can be fake-quantized, by name. ConfigError if there are none, or
    the model is one."""
    found = {name: module for name, module in model.named_modules() if type(module) in _FAKE}
    if "" in found:
        raise ConfigError(f"the model is itself a {type(model).__name__}: use FakeQuantLinear.from_module(model, …)")
    if not found:
        raise ConfigError(f"{type(model).__name__} has no linears or convolutions (or is quantized already)")
    return found


def replacing(model: nn.Module, configs: Mapping[str, QuantizationConfig]) -> tuple[dict[str, FakeQuant], Exchange]:
    """What fake-quantizes the modules of `model` that `configs` names, each by its own config: the new ones by name,
    and what puts them in once it is committed. ConfigError, which names the module, if a config does not fit."""
    found, changes = quantizable(model), Exchange()
    made: dict[str, FakeQuant] = {}
    for name, config in configs.items():
        check_plain(found[name], name)
        try:
            made[name] = _FAKE[type(found[name])].from_module(found[name], config)
        except ConfigError as error:
            raise ConfigError(f"{name}: {error}") from None
    changes.replace(model, {found[name]: fake for name, fake in made.items()})
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoderLayer):  # torch's fused kernel would go past the quantized linears
            changes.item(vars(module), "activation_relu_or_gelu", 0)
    return made, changes


@dataclass
class Calibration:
    """What `calibrate` found."""

    scales: dict[str, float] = field(default_factory=dict)
    """Per activation (MODULE.input …) its largest scale (NVFP4: the global scale)."""
    missed: tuple[str, ...] = ()
    """Activations that no data reached; their modules raise CalibrationError when called."""


@contextmanager
def calibrate(model: nn.Module, momentum: float | None = None) -> Iterator[Calibration]:
    """Find static scales from the data that goes through the model inside the `with`; they are fixed at its end.

    Until then activations pass as they are. Each scale is found as its spec's observer says (minmax by default), for
    every ActivationQuantizer below `model`. An exception inside leaves the quantizers as they were.

    Args:
        momentum: average the batches' ranges instead, each new batch with weight 1 − momentum.

    Yields a Calibration, filled at the end. Activations that no data reached are warned about. CalibrationError if
    there is nothing to calibrate, no data at all, or data without a scale (zeros, NaN), naming the module.
    """
    if momentum is not None and not 0 <= momentum < 1:
        raise ConfigError(f"momentum must be at least 0 and less than 1, not {momentum}")
    quantizers = {
        name.removesuffix("_quantizer"): module
        for name, module in model.named_modules()
        if isinstance(module, ActivationQuantizer) and module.spec.needs_data
    }
    if not quantizers:
        raise CalibrationError("there is nothing to calibrate: no activation of the model has a static scale")
    observing, loading, calibration = Exchange(), Exchange(), Calibration()
    with process.neutral():
        observers = {name: _observer(quantizer, momentum) for name, quantizer in quantizers.items()}
    for name, observer in observers.items():
        observing.item(vars(quantizers[name]), "observer", observer)
    with observing.for_now():
        yield calibration
    missed = tuple(name for name, observer in observers.items() if observer.low is None)
    if len(missed) == len(observers):
        raise CalibrationError("no data went through the model inside calibrate(model); call the model in the `with`")
    with process.neutral():
        for name, observer in observers.items():
            if name not in missed:
                state = observer.result(name)
                scale = state.global_scale if state.scale is None else float(state.scale.float().max())
                calibration.scales[name] = scale
                quantizers[name].load(state, loading.item)
    loading.commit()
    calibration.missed = missed
    if missed:
        some = ", ".join(missed[:5]) + (" …" if len(missed) > 5 else "")
        warnings.warn(
            f"calibration data did not reach {len(missed)} activations ({some}); calling their modules is an error "
            "until it does",
            stacklevel=3,
        )


@process.neutral()
def freeze(model: nn.Module) -> nn.Module:
    """Make quantized weights final, in place: linears hold packed codes from here on, convolutions their dequantized
    weight. Scales of activations stay. Returns `model`; ConfigError if nothing in it is fake-quantized.
    """
    inside = in_memory.unwrapped(model)
    if isinstance(inside, FakeQuant):
        raise ConfigError(f"the model is itself a {type(inside).__name__}: use QuantLinear.from_module(linear, …)")
    found = {name: module for name, module in inside.named_modules() if isinstance(module, FakeQuant)}
    if not found:
        raise ConfigError(f"{type(model).__name__} has nothing to freeze; call quantize_(model) first")
    for name, module in found.items():
        check_plain(module, name, known=module.slots)
    changes = Exchange()
    changes.replace(inside, {module: _frozen(module) for module in found.values()})
    changes.commit()
    return model


def _matching(patterns: ModuleFilter, modules: Mapping[str, nn.Module], argument: str) -> set[str]:
    """Names that a pattern, function or class covers; ConfigError for a pattern that covers none."""
    if isinstance(patterns, type):
        return {name for name, module in modules.items() if isinstance(module, patterns)}
    if callable(patterns):
        return {name for name, module in modules.items() if patterns(module, name)}
    names: set[str] = set()
    for pattern in (patterns,) if isinstance(patterns, str) else patterns:
        covered = matching(pattern, modules)
        if not covered:
            raise ConfigError(f"{argument}: {pattern!r} matches no linear or convolution{nearest(pattern, modules)}")
        names |= covered
    return names


def _config(module: Any, weights: Precision, activations: Precision) -> QuantizationConfig:
    """The config of one module, given specs or names."""
    if isinstance(weights, str | torch.dtype):
        weights = named_weight(str(weights), module.weight.flatten(1).shape[1])
    if isinstance(activations, str | torch.dtype):
        activations = named_input(str(activations))
    return QuantizationConfig(weight=weights, input_tensors=activations)


def _row(name: str, module: nn.Module, fake: FakeQuant) -> PTQRow:
    weight, spec, inputs = fake.weight.detach(), fake.config.weight, fake.config.input_tensors
    weights, activations = (found.summary if found else "" for found in (spec, inputs))
    bits, error = 8.0 * weight.itemsize, 0.0
    if spec is not None:
        bits = spec.stored_bits((len(weight), weight[0].numel()), weight.dtype) / weight.numel()
        delta = (fake.fake_weight().double() - weight.double()).square().sum()
        error = float(delta / weight.double().square().sum().clamp(min=1e-300))
    return PTQRow(name, type(module).__name__, weights, activations, bits, error)


def _skipped(model: nn.Module, found: Mapping[str, nn.Module]) -> dict[str, str]:
    """Modules with matrices of their own that nothing can be done to: attention of torch, fused experts, Conv3d …"""
    shares: dict[tuple[str, str], float] = {}
    for one in left_alone(model, found):
        module = one.name.rpartition(".")[0] or one.name  # a parameter of the model itself goes by its own name
        shares[module, one.kind] = shares.get((module, one.kind), 0.0) + one.share
    return {
        name: f"{kind} is no linear or convolution that can be exchanged ({share:.1%} of the parameters)"
        for (name, kind), share in shares.items()
    }


def left_alone(model: nn.Module, found: Iterable[str]) -> list[Untouched]:
    """Matrices that stay as they are, in a model whose linears and convolutions are `found`."""
    known = {name for name, module in model.named_modules() if isinstance(module, FakeQuant | QuantLinear)}
    return untouched(model, known.union(found))


def _observer(quantizer: ActivationQuantizer, momentum: float | None) -> Observer:
    if momentum is not None and not quantizer.spec.is_dynamic:
        return MovingAverageObserver(quantizer.spec, quantizer.dtype, 1 - momentum)
    return make_observer(quantizer.spec, quantizer.dtype)


def _frozen(module: FakeQuant) -> nn.Module:
    """A linear with packed codes, a convolution whose weight has its quantized values; a linear whose weight is not
    quantized stays."""
    made: Any
    if not isinstance(module, FakeQuantLinear):
        bias = module.fake_bias()
        made = module.like(module, replace(module.config, weight=None, bias=None))
        made.weight = nn.Parameter(module.fake_weight().clone(), requires_grad=False)
        made.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
    elif (weight := module.quantized_weight()) is None:
        return module
    else:
        made = QuantLinear(weight, module.fake_bias())
        carry_over(module, made)
    made.input_steps, made.output_quantizer = module.input_steps, module.output_quantizer
    return made  # type: ignore[no-any-return]

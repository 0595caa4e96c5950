"""Linears and convolutions that compute with quantized values, held as floats: what a format costs, before packing.

    FakeQuantLinear.from_module(linear, "W4A8-g64")                               a scheme's name
    FakeQuantLinear.from_module(linear, weight=spec, input_tensors=spec)          or specs
    FakeQuantLinear.from_module(linear, w_bits=4, a_bits=8, w_method="per-token") or words (nn/words.py)
    W8A8FakeLinear.from_module(linear), W4A16FakeLinear.from_module(linear, group_size=64)

The float weight, shared with the linear it came from, stays the parameter, so state dicts load as before. Static
activations need calibration: `fewbit.calibrate`, or any callable as `input_quantizer.observer`. Convolutions' weights
[out, in / groups, k …] are quantized as [out, rest], their inputs with channels last: per_token is a scale per pixel.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, ClassVar, Self, Unpack

from torch import Tensor, nn

from fewbit import process
from fewbit.config.schemes import scheme_config, with_group_size
from fewbit.config.spec import QuantizationConfig, QuantizationSpec
from fewbit.errors import ConfigError
from fewbit.nn.activation import ActivationQuantizer
from fewbit.nn.exchange import carry_over
from fewbit.nn.in_memory import check_plain
from fewbit.nn.linear import multiplies, product
from fewbit.nn.quantizer import quantize_matrix, round_matrix
from fewbit.nn.stepped import Stepped
from fewbit.nn.words import METHODS, WORDS, Granularity, linear_config, with_methods
from fewbit.tensor import QuantTensor


class FakeQuant(Stepped):
    """What FakeQuantLinear and the convolutions have in common. `weight` and `bias` come from the other base class."""

    preset: ClassVar[str | None] = None
    """Scheme of a ready-made class."""
    default: ClassVar[QuantizationConfig | None] = None
    """How a module that is made from nothing is quantized, unless words say so."""
    kind: ClassVar[type[nn.Module]]
    """The torch class."""
    sizes: ClassVar[tuple[str, ...]]
    """What its constructor takes, and its modules have; inputs and outputs first."""
    config: QuantizationConfig
    weight: Tensor
    bias: Any  # Tensor or None, which torch declares differently for linears and convolutions
    _known: tuple[object, Tensor] | None
    """The weight's identity and its quantized values."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """A fresh module, with the arguments of its torch class, quantized as its preset and words (nn/words.py) say;
        a FakeQuantLinear has 8 bits and per-token unless told otherwise."""
        words: Any = {name: kwargs.pop(name) for name in WORDS if name in kwargs}
        super().__init__(*args, **kwargs)
        self.set_config(_resolve(self.preset or (None if words else self.default), words))

    @classmethod
    @process.neutral()
    def from_module(
        cls,
        module: nn.Module,
        config: QuantizationConfig | str | int | None = None,
        a_bits: int | str | None = None,
        *,
        w_bits: int | None = None,
        weight: QuantizationSpec | None = None,
        input_tensors: QuantizationSpec | None = None,
        output_tensors: QuantizationSpec | None = None,
        bias: QuantizationSpec | None = None,
        group_size: int | None = None,
        **methods: Unpack[Granularity],
    ) -> Self:
        """The same linear or convolution, fake-quantized. `module` stays as it is and shares its parameters and hooks.

        Args:
            config: a QuantizationConfig or a scheme's name; a preset class has its own unless one is given. (A number
                is w_bits, a method's name w_method; then a_bits may be a_method.)
            w_bits, a_bits: without a config: bits of weight and input, 8 unless given; 16 leave a tensor as it is.
            methods: granularity of weight and input, the config's or per-token unless given; see nn/words.py.
            weight, input_tensors, output_tensors, bias: specs that replace the config's.
            group_size: of the weight; −1 is one scale per output channel.

        ConfigError if nothing is to be quantized, the spec does not fit the weight, or the module has something that
        would be lost (nn/in_memory.py).
        """
        words: dict[str, Any] = {"w_bits": w_bits, "a_bits": a_bits, **methods}
        if isinstance(config, int) or config in METHODS:  # given by position
            _once(words, "w_bits" if isinstance(config, int) else "w_method", config)
            config = None
        if a_bits in METHODS:
            words["a_bits"] = None
            _once(words, "a_method", a_bits)
        specs = {"weight": weight, "input_tensors": input_tensors, "output_tensors": output_tensors, "bias": bias}
        resolved = _resolve(config or cls.preset, {name: value for name, value in words.items() if value is not None})
        resolved = replace(resolved, **{name: spec for name, spec in specs.items() if spec is not None})
        if not resolved.quantizes:
            raise ConfigError("nothing to quantize: name a scheme, bits (w_bits, a_bits), or a spec for a tensor")
        if group_size is not None:
            resolved = with_group_size(resolved, group_size)
        cls._check_kind(module)
        return cls.like(module, resolved)

    @classmethod
    def _check_kind(cls, module: nn.Module) -> None:
        own, kind = type(module), cls.kind
        if not isinstance(module, kind):
            raise ConfigError(f"{cls.__name__} stands for nn.{kind.__name__}, not for {own.__name__}")
        if isinstance(module, FakeQuant):
            return check_plain(module, known=module.slots)
        check_plain(module)
        same = all(getattr(own, name, None) is getattr(kind, name, None) for name in ("forward", "_conv_forward"))
        if not same and not (isinstance(module, nn.Linear) and multiplies(module)):
            raise ConfigError(
                f"{own.__name__} computes in a way of its own, which {cls.__name__} would not; use a plain "
                f"nn.{kind.__name__}, or leave it as it is"
            )

    @classmethod
    def like(cls, module: Any, config: QuantizationConfig) -> Self:
        """One with the parameters and hooks of `module`; finds the quantized weight, so that errors come now."""
        sizes = {name: getattr(module, name) for name in cls.sizes}
        for spec, name in zip((config.input_tensors, config.output_tensors), cls.sizes, strict=False):
            if spec is not None and sizes[name] % (spec.tiling.span or sizes[name]):
                raise ConfigError(f"an activation of {sizes[name]} channels cannot be quantized {spec.summary}")
        made = cls(**sizes, bias=module.bias is not None, device="meta")
        made.weight, made.bias = module.weight, module.bias
        made.set_config(config)
        if isinstance(module, FakeQuant):
            made.input_steps = [*(step for step in module.input_steps if step.exact), *made.input_steps]
        made.fake_weight()
        carry_over(module, made)
        return made

    def set_config(self, config: QuantizationConfig) -> None:
        """Quantize by `config` from now on; what calibration found is forgotten."""
        for field, slot in (("input_tensors", "input_quantizer"), ("output_tensors", "output_quantizer")):
            spec: QuantizationSpec | None = getattr(config, field)
            quantizer = None if spec is None else ActivationQuantizer(spec, dtype=self.weight.dtype, persistent=True)
            self.register_module(slot, quantizer)
        self.config = config
        self._known = None

    def quantized_weight(self) -> QuantTensor | None:
        """The weight as a matrix [out, rest], quantized now; None if the config leaves it."""
        spec = self.config.weight
        return None if spec is None else quantize_matrix(self.weight.flatten(1), spec)

    def fake_weight(self) -> Tensor:
        """What the module multiplies by: the weight's quantized values, same shape and dtype. Found once, and again
        when the weight has changed. (A change through `weight.data` is not seen; call `set_config` after one.)"""
        weight = self.weight.detach()
        if self.config.weight is None:
            return weight
        identity = (weight.data_ptr(), weight.dtype, 0 if weight.is_inference() else weight._version)
        if self._known is None or self._known[0] != identity:
            self._known = (identity, round_matrix(weight.flatten(1), self.config.weight).view_as(weight))
        return self._known[1]

    def fake_bias(self) -> Tensor | None:
        """The bias, quantized as one row [1, out] if the config says so."""
        bias: Tensor | None = None if self.bias is None else self.bias.detach()
        if bias is None or self.config.bias is None:
            return bias
        return round_matrix(bias.unsqueeze(0), self.config.bias, "the bias").squeeze(0)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Self:
        self._known = None  # `.to(…)` moves the weight; its quantized values are found again where it is then
        return super()._apply(fn, recurse)  # type: ignore[no-untyped-call, no-any-return]

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_known": None}  # found again by whoever loads it

    def extra_repr(self) -> str:
        spec = self.config.weight
        return f"{super().extra_repr()}, weight {'as it is' if spec is None else spec.summary}"


class FakeQuantLinear(FakeQuant, nn.Linear):
    """y = Q_out(Q_in(x) · Q(W)ᵀ + b)."""

    default = linear_config()
    kind = nn.Linear
    sizes = ("in_features", "out_features")

    def __init__(self, in_features: int, out_features: int, bias: bool = True, *words: Any, **kwargs: Any) -> None:
        """A fresh linear. Words may follow `bias` by position, in their order; device and dtype go by name."""
        super().__init__(in_features, out_features, bias, **dict(zip(WORDS, words, strict=False)), **kwargs)

    def multiply(self, seen: Tensor) -> Tensor:
        return product(seen, self.fake_weight().to(seen.dtype), self.fake_bias())


class FakeQuantConv(FakeQuant):
    """A fake-quantized convolution."""

    sizes = (
        "in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups", "padding_mode",
    )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        """x [batch, channels, …] or [channels, …]."""
        channels = 1 - self.weight.ndim  # the axis before the spatial ones, of which the weight has all but two
        if self.input_steps:
            x = self.seen(x.movedim(channels, -1)).movedim(-1, channels)
        out = self.multiply(x)
        if self.output_quantizer is not None:
            out = self.output_quantizer(out.movedim(channels, -1)).movedim(-1, channels)
        return out

    def multiply(self, seen: Tensor) -> Tensor:
        bias = None if (found := self.fake_bias()) is None else found.to(seen.dtype)
        return self._conv_forward(seen, self.fake_weight().to(seen.dtype), bias)  # type: ignore[no-any-return, operator]


class FakeQuantConv1d(FakeQuantConv, nn.Conv1d):
    kind = nn.Conv1d


class FakeQuantConv2d(FakeQuantConv, nn.Conv2d):
    kind = nn.Conv2d


def _once(words: dict[str, Any], name: str, value: object) -> None:
    """A word that was given by position; ConfigError if it is given by name, too."""
    if words.get(name) is not None:
        raise ConfigError(f"{name} is given twice: {value} and {words[name]}")
    words[name] = value


def _resolve(config: QuantizationConfig | str | None, words: Any) -> QuantizationConfig:
    """What a scheme and words say together."""
    if config is None:
        return linear_config(**words) if words else QuantizationConfig()
    if bits := [name for name in words if name in WORDS[:2]]:
        raise ConfigError(f"{bits[0]} contradicts {config}, which has its own bits; give one of them")
    return with_methods(scheme_config(config) if isinstance(config, str) else config, **words)


def _preset(name: str, scheme: str) -> type[FakeQuantLinear]:
    """A FakeQuantLinear whose config is a scheme's unless another is given."""
    fields = {"preset": scheme, "__doc__": f"FakeQuantLinear of scheme {scheme}.", "__module__": __name__}
    return type(name, (FakeQuantLinear,), fields)


W8A8FakeLinear = _preset("W8A8FakeLinear", "W8A8")
W8A8StaticFakeLinear = _preset("W8A8StaticFakeLinear", "W8A8_STATIC")
W4A16FakeLinear = _preset("W4A16FakeLinear", "W4A16")
W4A8FakeLinear = _preset("W4A8FakeLinear", "W4A8")
W4A4FakeLinear = _preset("W4A4FakeLinear", "W4A4")
FP8FakeLinear = _preset("FP8FakeLinear", "FP8_DYNAMIC")

"""Specs in compressed-tensors' words and back: the QuantizationArgs of one tensor, and the layout of a weight.

Engines fail on keys they do not know, so as few as possible are written. What the format has no words for is refused
with a ConfigError that says why; `config.py` adds whose it is.

    strategy       tensor, channel, group, block (weights); tensor, token, group (activations); attn_head (KV cache)
    tensor_group   NVFP4: groups of 16 with e4m3 scales and one more scale for the tensor. Of activations only that
                   one is calibrated, the groups' scales are dynamic: "dynamic": "local"
"""

from typing import Any

from fewbit.config.spec import QuantizationSpec
from fewbit.errors import CheckpointError, ConfigError
from fewbit.formats.compressed_tensors.layouts import LAYOUTS, Layout

Args = dict[str, Any]
FLOAT_BITS = {8: "e4m3", 6: "e2m3", 4: "e2m1"}
GROUP_OF_BYTE_SCALES = {"e4m3": 16, "e8m0": 32}
SCALE_DTYPES = {"e4m3": "torch.float8_e4m3fn", "e8m0": "torch.uint8"}
STRATEGIES = {
    "per_tensor": "tensor", "per_channel": "channel", "per_token": "token", "per_group": "group", "per_block": "block",
}  # fmt: skip
TRANSPOSED = [("per_channel", 1), ("per_channel", -1), ("per_group", 0), ("per_group", -2)]
MX_LAYOUTS = {"e4m3": "mxfp8-quantized", "e2m3": "mxfp6-pack-quantized", "e2m1": "mxfp4-pack-quantized"}


def layout_for(weight: QuantizationSpec, activation: QuantizationSpec | None) -> Layout:
    """The layout of a weight that meets inputs quantized by `activation`. ConfigError if there is none.

    8-bit integers for integer inputs are stored unpacked, as kernels read them; all other integers are packed.
    """
    if weight.format.is_cast:
        raise ConfigError(f"a cast to {weight.dtype} and no quantized weight; exclude the module instead")
    if weight.scale_type in ("e8m0", "e4m3"):
        return LAYOUTS[_byte_scaled(weight)]
    _check_float_scale(weight)
    if weight.format.is_integer:
        if weight.qscheme == "per_block":
            raise ConfigError("integers with scales per block; use per_channel or per_group, blocks are for fp8_e4m3")
        if weight.bits == 8 and activation is not None and activation.format.is_integer:
            return LAYOUTS["int-quantized"]
        if weight.qscheme == "per_tensor":
            raise ConfigError(
                "one scale for the whole tensor; packed integers have scales per channel or per group, use per_channel"
            )
        return LAYOUTS["pack-quantized"]
    if weight.dtype != "e4m3":
        needed = {"e2m1": "scale_type e4m3 (NVFP4) or e8m0 (MXFP4)", "e2m3": "scale_type e8m0 (MXFP6)"}
        raise ConfigError(f"{weight.dtype} with float scales; {needed.get(weight.dtype, 'use fp8_e4m3')}")
    return LAYOUTS["naive-quantized" if activation is None else "float-quantized"]


def weight_args(spec: QuantizationSpec) -> Args:
    """The `weights` entry of a spec that has a layout."""
    if (spec.qscheme, spec.ch_axis) in TRANSPOSED:
        raise ConfigError(
            f"{spec.qscheme} with ch_axis {spec.ch_axis}; scales belong to rows or to groups along a row"
        )
    return _args(spec)


def activation_args(spec: QuantizationSpec) -> Args:
    """The `input_activations` entry of a spec. ConfigError for what engines would do otherwise than the spec says."""
    _check_activation(spec)
    if spec.scale_type in SCALE_DTYPES:
        _byte_scaled(spec)
        if not spec.is_dynamic:
            raise ConfigError(f"static scales of type {spec.scale_type}; use is_dynamic=True")
    elif spec.qscheme not in ("per_tensor", "per_token", "per_group") or spec.ch_axis in (0, -2):
        raise ConfigError(f"activations with {spec.qscheme}; engines know per_tensor, per_token and per_group")
    return _args(spec) | ({"dynamic": "local"} if spec.scale_type == "e4m3" else {})


def attention_args(spec: QuantizationSpec) -> Args:
    """The entry of a key, value or query: one static scale for the tensor or for each head."""
    _check_activation(spec)
    if spec.is_dynamic:
        raise ConfigError(
            "a dynamic KV cache; engines know static scales, per_tensor or per_channel (a scale per head)"
        )
    if spec.scale_type in SCALE_DTYPES or spec.qscheme not in ("per_tensor", "per_channel"):
        raise ConfigError(
            f"a KV cache with {spec.qscheme} {spec.scale_type} scales; engines know per_tensor and per_channel floats"
        )
    return _args(spec) | ({"strategy": "attn_head"} if spec.qscheme == "per_channel" else {})


def weight_spec(args: Args) -> QuantizationSpec:
    """The spec of a `weights` entry. CheckpointError for one that fewbit has no spec for."""
    return _spec(args, {"tensor": "per_tensor", "channel": "per_channel", "block": "per_block"})


def activation_spec(args: Args) -> QuantizationSpec:
    """The spec of an `input_activations` entry, or of the entry of a KV cache."""
    return _spec(args, {"tensor": "per_tensor", "token": "per_token", "attn_head": "per_channel"}, observer="minmax")


def _spec(args: Args, strategies: dict[str, str], **fields: Any) -> QuantizationSpec:
    bits, is_float, symmetric = int(args.get("num_bits", 8)), args.get("type") == "float", args.get("symmetric", True)
    size, blocks, dynamic = args.get("group_size"), args.get("block_structure"), args.get("dynamic", False)
    strategy = args.get("strategy") or ("group" if (size or -1) > 0 else "tensor" if size is None else "channel")
    fields |= {"symmetric": bool(symmetric), "is_dynamic": dynamic is not False}
    fields["dtype"] = FLOAT_BITS.get(bits) if is_float else f"int{bits}" if symmetric else f"uint{bits}"
    if strategy in ("group", "tensor_group"):
        fields |= {"qscheme": "per_group", "group_size": size}
        byte_scaled = args.get("scale_dtype") == SCALE_DTYPES["e8m0"] or (is_float and bits < 8)
        if strategy == "tensor_group" or byte_scaled:
            fields["scale_type"] = "e4m3" if strategy == "tensor_group" else "e8m0"
    else:
        fields["qscheme"] = strategies.get(strategy)
        if strategy == "attn_head":
            fields["ch_axis"] = 1  # heads are columns, see nn/attention.py
        if strategy == "block":
            fields["block_size"] = tuple(blocks or ())
    try:
        return QuantizationSpec(**fields)
    except ConfigError as error:
        raise CheckpointError(
            f"its config has quantization arguments that fewbit does not know: {args} ({error})"
        ) from None


def _args(spec: QuantizationSpec) -> Args:
    """Number and scales. Which of the floats of 8 bits (e4m3) or 6 (e2m3) is meant goes without saying."""
    if not spec.format.is_integer and FLOAT_BITS.get(spec.bits) != spec.dtype:
        raise ConfigError(f"{spec.dtype} has no name in this format; floats are fp8_e4m3, fp6_e2m3 and fp4")
    kind = "int" if spec.format.is_integer else "float"
    args: Args = {"num_bits": spec.bits, "type": kind, "symmetric": spec.symmetric, "dynamic": spec.is_dynamic}
    args["strategy"] = STRATEGIES[spec.qscheme] if spec.scale_type != "e4m3" else "tensor_group"
    args |= {"group_size": spec.group_size, "scale_dtype": SCALE_DTYPES.get(spec.scale_type)}
    args["block_structure"] = None if spec.block_size is None else list(spec.block_size)
    return {name: value for name, value in args.items() if value is not None}


def _byte_scaled(spec: QuantizationSpec) -> str:
    """Layout of a spec whose scales are bytes; ConfigError for all but NVFP4 and OCP's MXFP8, 6 and 4."""
    size = GROUP_OF_BYTE_SCALES[spec.scale_type]
    along_rows = spec.qscheme == "per_group" and spec.ch_axis in (None, 1, -1)
    if not along_rows or spec.group_size != size:
        raise ConfigError(
            f"{spec.scale_type} scales, but not of groups of {size} along a row; use per_group, group_size {size}"
        )
    if spec.scale_type == "e4m3":
        if spec.dtype != "e2m1":
            raise ConfigError(f"{spec.dtype} with e4m3 scales; NVFP4 is dtype fp4")
        return "nvfp4-pack-quantized"
    if spec.dtype not in MX_LAYOUTS:
        raise ConfigError(f"{spec.dtype} with e8m0 scales; the format knows fp8_e4m3, fp6_e2m3 and fp4 (MXFP8, 6, 4)")
    return MX_LAYOUTS[spec.dtype]


def _check_float_scale(spec: QuantizationSpec) -> None:
    if spec.stored_as.own_dtype is not None:
        raise ConfigError(f"{spec.scale_type} scales, which the format cannot hold")
    if spec.scale_dtype != "checkpoint":
        raise ConfigError(
            f"scales in {spec.scale_dtype}; engines load scales in the model's dtype, so use scale_dtype: checkpoint"
        )


def _check_activation(spec: QuantizationSpec) -> None:
    """What engines cannot be told: they round half to even and take a dynamic scale from the largest magnitude."""
    if spec.format.is_cast:
        raise ConfigError(f"activations cast to {spec.dtype}, which the format cannot say; leave them out")
    if spec.residual or spec.first_stage is not None:
        raise ConfigError("activations quantized twice (residual or first_stage), which the format cannot say")
    if spec.round_method != "half_even":
        raise ConfigError(f"activations with round_method {spec.round_method}; engines round half_even")
    if not spec.is_dynamic:
        if spec.scale_type not in SCALE_DTYPES:
            _check_float_scale(spec)
        return
    if spec.observer != "minmax" or spec.clip_ratio != 1.0:
        what = f"observer {spec.observer}" if spec.observer != "minmax" else f"clip_ratio {spec.clip_ratio}"
        raise ConfigError(f"dynamic activations with {what}; engines scale them by minmax without clipping")
    if spec.scale_type not in ("float", *SCALE_DTYPES):
        raise ConfigError(f"dynamic activations with {spec.scale_type} scales; engines compute them as floats")
    if spec.scale_type == "e8m0" and spec.exponent_mode != "even":
        raise ConfigError(f"dynamic activations with exponent_mode {spec.exponent_mode}; engines use even")

"""Channel scales, folded into the tensors around them: pure functions.

Consumers of channels x compute the same from x / s with their columns multiplied by s, and x / s costs nothing where
the producer of x can be divided instead: a norm's weight and bias, a linear's rows and bias. Nothing here changes what
the block computes, not even by the rounding of the checkpoint's dtype:

    norm       w/s is rounded to its dtype first, and the scale that is taken is the ratio of what was stored to what
               is stored. It differs a little from the one that was wanted, and the consumers are given that one.
    linear     each row is rescaled only if that is exact, which powers of two are (short of the ends of the range);
               the other rows keep 1. Of a quantized linear only the scales change.

    consumers  a channel is scaled only if each consumer's column stays in the range of its dtype, and keeps 1 else.

So every function that folds into a producer returns the scale that was taken, which is the one that the consumers'
columns are to be multiplied by.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TypeVar

import torch
from torch import Tensor

from fewbit.checkpoint.names import bias_of, weight_of
from fewbit.models.architecture import Scaling
from fewbit.tensor import QuantTensor

P = TypeVar("P", Tensor, QuantTensor)


def fold_into_norm(
    weight: Tensor, bias: Tensor | None, scale: Tensor, offset: bool = False
) -> tuple[Tensor, Tensor | None, Tensor]:
    """A norm whose output is divided by `scale` [channels], in the dtype of its tensors, and the scale taken.

    `offset`: the norm multiplies by (1 + weight). Channels whose divided weight could not be stored keep 1, and so do
    those that are always 0 and those whose bias would leave the range of its dtype. The bias is divided by the scale
    taken; in 16 bits that rounds, unless it is a power of two.
    """
    one = 1.0 if offset else 0.0
    factor = weight.double() + one
    folded = (factor / scale.double() - one).to(weight.dtype)
    ratio = norm_scale(weight, folded, offset)
    possible = (ratio > 0) & torch.isfinite(ratio)
    if bias is not None:
        possible &= _in_range((bias.double() / ratio).abs(), bias.dtype)
    taken = torch.where(possible, ratio, 1.0).to(scale.dtype)
    folded = torch.where(possible, folded, weight)
    return folded, None if bias is None else _divided(bias, taken), taken


def norm_scale(weight: Tensor, folded: Tensor, offset: bool = False) -> Tensor:
    """The scale [channels] float64 that lies between a norm's weight and the one it was folded to."""
    one = 1.0 if offset else 0.0
    return (weight.double() + one) / (folded.double() + one)


def fold_into_linear_rows(weight: Tensor, bias: Tensor | None, scale: Tensor) -> tuple[Tensor, Tensor | None, Tensor]:
    """A linear [out, in] whose output is divided by `scale` [out], in the dtype of its tensors, and the scale taken.

    In 16 bits, rows for which that is not exact keep 1.
    """
    divided = (weight.double() / scale.double().unsqueeze(1)).to(weight.dtype)
    possible = _exact(divided, weight, scale.unsqueeze(1)).all(1)
    if bias is not None:
        possible &= _exact(_divided(bias, scale), bias, scale)
    taken = torch.where(possible, scale, torch.ones_like(scale))
    folded = torch.where(possible.unsqueeze(1), divided, weight)
    return folded, None if bias is None else _divided(bias, taken), taken


def fold_into_quantized_rows(
    weight: QuantTensor, bias: Tensor | None, scale: Tensor
) -> tuple[QuantTensor, Tensor | None, Tensor]:
    """The same for a quantized linear: its codes stay, its scales are divided. Rows that cannot be keep 1."""
    possible = rescalable_rows(weight, scale.reciprocal())
    if bias is not None:
        possible &= _exact(_divided(bias, scale), bias, scale)
        possible = _whole_tiles(weight, possible)
    taken = torch.where(possible, scale, torch.ones_like(scale))
    return rescale_rows(weight, taken.reciprocal()), None if bias is None else _divided(bias, taken), taken


def fold_into(
    producer: P, bias: Tensor | None, scale: Tensor, offset: bool = False
) -> tuple[P, Tensor | None, Tensor]:
    """Whoever makes the channels, divided by `scale` [rows]: a norm, a linear, or a quantized linear."""
    if isinstance(producer, QuantTensor):
        return fold_into_quantized_rows(producer, bias, scale)
    if producer.ndim == 1:
        return fold_into_norm(producer, bias, scale, offset)
    return fold_into_linear_rows(producer, bias, scale)


def rescale_rows(weight: QuantTensor, factor: Tensor) -> QuantTensor:
    """Rows multiplied by `factor` [out] exactly: another scale (for casts: other elements), the same codes.

    ValueError if a row cannot be: `rescalable_rows` tells which ones.
    """
    possible = rescalable_rows(weight, factor)
    if not bool(possible.all()):
        row = int((~possible).nonzero()[0])
        raise ValueError(
            f"row {row} times {float(factor[row])} has no exact scale of type {weight.spec.scale_type} "
            f"({weight.scale.dtype}); leave such rows as they are"
        )
    if weight.spec.format.is_cast:
        codes = (weight.codes.double() * factor.double().unsqueeze(1)).to(weight.codes.dtype)
        return replace(weight, codes=codes)
    return replace(weight, scale=_rescaled(weight, factor))


def rescalable_rows(weight: QuantTensor, factor: Tensor) -> Tensor:
    """Which rows [out] of a quantized weight can be multiplied by `factor` [out] exactly.

    A row can if its stored scales times the factor are stored without rounding. Rows that share a scale need the same
    factor.
    """
    if weight.spec.format.is_cast:
        product = weight.codes.double() * factor.double().unsqueeze(1)
        return (product.to(weight.codes.dtype).double() == product).all(1)
    by_tile = factor.view(weight.scale.shape[0], -1)
    alike = (by_tile == by_tile[:, :1]).all(1)
    wanted = weight.scale_value.double() * by_tile[:, :1].double()
    rescaled = weight.scale_format.value(_rescaled(weight, factor))
    exact = (rescaled.double() == wanted).all(1) & (wanted != 0).all(1)
    return (alike & exact).repeat_interleave(by_tile.shape[1])


def scale_columns(weight: Tensor, scale: Tensor) -> Tensor:
    """A consumer [..., in] whose columns are multiplied by `scale` [in], in its dtype.

    This is for consumers that stay as they are: routers, gates, excluded linears. In 16 bits it rounds unless the
    scale is a power of two.
    """
    return (weight.double() * scale.double()).to(weight.dtype)


def channel_map(channels: int, rows: int, head_dim: int) -> Tensor:
    """Which of a producer's `rows` makes each of the consumers' `channels`: [channels] int64.

    One to one where there are as many; values of attention with fewer heads than queries have are read by several
    neighbouring heads. ValueError if the numbers do not fit.
    """
    if channels == rows:
        return torch.arange(channels)
    if channels % rows or rows % head_dim:
        raise ValueError(f"{rows} channels in heads of {head_dim} cannot make {channels} channels")
    heads = torch.arange(rows).view(-1, head_dim)
    return heads.repeat_interleave(channels // rows, 0).flatten()


def per_row(scale: Tensor, channels: Tensor, rows: int) -> Tensor:
    """Inverse of indexing by a channel map: scale [channels], alike where one row makes several → [rows]."""
    by_row = scale.new_ones(rows)
    by_row[channels] = scale
    return by_row


def fold(
    tensors: Mapping[str, Tensor], scaling: Scaling, scale: Tensor, head_dim: int
) -> tuple[dict[str, Tensor], Tensor]:
    """A block's tensors that change when the producer of `scaling` is divided and its consumers are multiplied.

    `tensors` by their names inside the block, unquantized; `scale` [channels of the producer]. Returns the changed
    tensors and the scale that the consumers' columns were multiplied by [channels of the consumers].
    """
    changed, columns = fold_into_producer(tensors, scaling, scale, head_dim)
    return changed | {consumer: scale_columns(tensors[consumer], columns) for consumer in _consumers(scaling)}, columns


def fold_into_producer(
    tensors: Mapping[str, Tensor], scaling: Scaling, scale: Tensor, head_dim: int
) -> tuple[dict[str, Tensor], Tensor]:
    """`fold` but for the consumers: the producer's tensors, and what their columns are to be multiplied by."""
    name = scaling.producer
    weight, bias = tensors[weight_of(name)], tensors.get(bias_of(name))
    consumers = [tensors[consumer] for consumer in _consumers(scaling)]
    channels = channel_map(consumers[0].shape[-1], scale.numel(), head_dim).to(scale.device)
    scale = where_scalable(consumers, scale, channels)
    folded, folded_bias, taken = fold_into(weight, bias, scale, scaling.offset)
    changed = {weight_of(name): folded}
    if folded_bias is not None:
        changed[bias_of(name)] = folded_bias
    return changed, taken[channels]


def _consumers(scaling: Scaling) -> list[str]:
    return [weight_of(consumer) for consumer in scaling.consumers] + list(scaling.others)


def where_scalable(consumers: Sequence[Tensor], scale: Tensor, channels: Tensor) -> Tensor:
    """A producer's scale [rows], but 1 where columns of consumers [..., in] would leave the range of their dtype.

    `channels` [in]: the row that makes each column. A column is as good as its largest element.
    """
    possible = torch.ones_like(channels, dtype=torch.bool)
    columns = scale[channels]
    for weight in consumers:
        largest = weight.abs().flatten(0, -2).amax(0).double() * columns.double()
        possible &= _in_range(largest, weight.dtype)
    rows = torch.ones_like(scale, dtype=torch.bool)
    rows[channels[~possible]] = False
    return torch.where(rows, scale, torch.ones_like(scale))


def _divided(bias: Tensor, scale: Tensor) -> Tensor:
    return (bias.double() / scale.double()).to(bias.dtype)


def _in_range(largest: Tensor, dtype: torch.dtype) -> Tensor:
    """Where values of these magnitudes (float64) are zero or normal numbers of a dtype."""
    limits = torch.finfo(dtype)
    return (largest == 0) | ((largest >= limits.smallest_normal) & (largest <= limits.max))


def _exact(divided: Tensor, whole: Tensor, scale: Tensor) -> Tensor:
    """Where division by `scale` lost nothing; dtypes of 32 bits and more are taken to be exact enough."""
    if whole.dtype.itemsize >= 4:
        return torch.isfinite(divided)
    return divided.double() * scale.double() == whole.double()


def _rescaled(weight: QuantTensor, factor: Tensor) -> Tensor:
    """Stored scales times the factor of their tile's first row, rounded as they are stored."""
    by_tile = factor.view(weight.scale.shape[0], -1)[:, :1]
    return weight.scale_format.store(weight.scale_value * by_tile.float())


def _whole_tiles(weight: QuantTensor, rows: Tensor) -> Tensor:
    """Rows that may be rescaled together with all those that share their scales."""
    by_tile = rows.view(weight.scale.shape[0], -1)
    return by_tile.all(1).repeat_interleave(by_tile.shape[1])

"""Bit packing for any width from 1 to 8: a little-endian bit stream in 32-bit words.

Element i of a row sits at bits [i·b, i·b + b) of the row's stream, low bits first, crossing word edges; the last
word is padded with zeros. This is the layout of compressed-tensors' pack-quantized and, along the other axis, of GPTQ.
"""

from math import ceil

import torch
from torch import Tensor

WORD_BITS = 32
LANES = 32  # 32 codes of b bits fill exactly b words, so the pattern of shifts repeats


def packed_length(length: int, bits: int) -> int:
    """Number of 32-bit words that hold `length` codes of `bits` bits; ValueError if such codes cannot be packed."""
    if not 1 <= bits <= 8:
        raise ValueError(f"codes of 1 to 8 bits can be packed, not {bits}")
    return ceil(length * bits / WORD_BITS)


def pack(codes: Tensor, bits: int) -> Tensor:
    """Unsigned codes [..., n] (any integer dtype, 0 ≤ code < 2^bits) → int32 words [..., ceil(n·bits/32)]."""
    words_in_row = packed_length(codes.shape[-1], bits)
    if codes.numel() and (int(codes.min()) < 0 or int(codes.max()) >= 2**bits):
        raise ValueError(f"codes must lie in [0, {2**bits}) to be packed in {bits} bits")
    if bits in (1, 2, 4, 8):
        return _pack_evenly(codes.to(torch.uint8), bits)[..., :words_in_row].contiguous()
    lanes = torch.nn.functional.pad(codes, (0, -codes.shape[-1] % LANES)).unflatten(-1, (-1, LANES))  # [..., n/32, 32]
    words = torch.zeros(*lanes.shape[:-1], bits, dtype=torch.int32, device=codes.device)
    for lane in range(LANES):  # 32 vectorized steps whatever the size of the tensor
        word, shift = divmod(lane * bits, WORD_BITS)
        value = lanes[..., lane].to(torch.int32)
        words[..., word] |= value << shift  # bits shifted past the top fall off, as they should
        if shift + bits > WORD_BITS:
            words[..., word + 1] |= value >> (WORD_BITS - shift)
    return words.flatten(-2)[..., :words_in_row].contiguous()


def _pack_evenly(codes: Tensor, bits: int) -> Tensor:
    """`pack` of uint8 codes whose width divides a byte: neighbours become one number of twice the width."""
    padded = torch.nn.functional.pad(codes, (0, -codes.shape[-1] % LANES)).contiguous()
    words = padded.shape[-1] * bits // WORD_BITS
    codes = padded.view(-1)  # of one row the strides may be anything, and views of other widths mind them
    while bits < 8:
        pairs = codes.view(torch.int16)  # little-endian: the first one is the low byte
        codes = (pairs | (pairs >> (8 - bits))).to(torch.uint8)
        bits *= 2
    return codes.view(torch.int32).view(*padded.shape[:-1], words)


def unpack(words: Tensor, bits: int, length: int) -> Tensor:
    """Inverse of `pack`: int32 words [..., ceil(n·bits/32)] → uint8 codes [..., n]."""
    if words.shape[-1] != (needed := packed_length(length, bits)):
        raise ValueError(f"{length} codes of {bits} bits need {needed} words, not {words.shape[-1]}")
    groups = torch.nn.functional.pad(words, (0, -words.shape[-1] % bits)).unflatten(-1, (-1, bits))  # [..., n/32, b]
    codes = torch.empty(*groups.shape[:-1], LANES, dtype=torch.uint8, device=words.device)
    mask = 2**bits - 1
    for lane in range(LANES):
        word, shift = divmod(lane * bits, WORD_BITS)
        # int32 >> drags the sign bit along; where the code ends at bit 31 or before, the mask removes it
        value = groups[..., word] >> shift
        if shift + bits > WORD_BITS:
            low = WORD_BITS - shift
            value = (value & (2**low - 1)) | (groups[..., word + 1] << low)
        codes[..., lane] = (value & mask).to(torch.uint8)
    return codes.flatten(-2)[..., :length].contiguous()

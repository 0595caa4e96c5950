"""Writing safetensors: same tensors and metadata, same bytes, and their digest while they are in the cache.

safetensors' own writer puts metadata in an order that changes from run to run, and gives files that only their owner
can read. The format is a header's length (8 bytes, little-endian), the header (JSON, padded with spaces to 8 bytes),
the tensors' bytes; larger elements first, so that every tensor is aligned.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from fewbit.files import replacing

DTYPES = {
    torch.uint64: "U64", torch.int64: "I64", torch.float64: "F64", torch.complex64: "C64",
    torch.float32: "F32", torch.uint32: "U32", torch.int32: "I32",
    torch.bfloat16: "BF16", torch.float16: "F16", torch.uint16: "U16", torch.int16: "I16",
    torch.float8_e8m0fnu: "F8_E8M0", torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2",
    torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
"""In the order in which safetensors stores them."""
_ORDER = {dtype: position for position, dtype in enumerate(DTYPES)}
_PIECE = 2**20  # bytes that are hashed while they are in the cache


def write_tensors(file: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> str:
    """Write `tensors` into `file`; returns the file's digest. TypeError for a dtype that it cannot hold."""
    for name, tensor in tensors.items():
        if tensor.dtype not in DTYPES:
            raise TypeError(f"safetensors cannot hold {name!r}: it has the dtype {tensor.dtype}")
    names = sorted(tensors, key=lambda name: (_ORDER[tensors[name].dtype], name))
    header: dict[str, object] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    end = 0
    for name in names:
        tensor = tensors[name]
        start, end = end, end + tensor.nbytes
        header[name] = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    digest = hashlib.sha256()
    with file.open("wb") as opened:
        for data in (len(text).to_bytes(8, "little"), text):
            digest.update(data)
            opened.write(data)
        for name in names:
            stored = tensors[name].detach().cpu().contiguous().reshape(-1).view(torch.uint8)
            stored_bytes = memoryview(stored.numpy().data)
            for start in range(0, len(stored_bytes), _PIECE):
                piece = stored_bytes[start : start + _PIECE]
                digest.update(piece)
                opened.write(piece)
    return f"{digest.hexdigest()}:{8 + len(text) + end}"


def write_safetensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    """The same, atomically."""
    with replacing(path) as beside:
        return write_tensors(beside, tensors, metadata)


def file_digest(file: Path) -> str:
    """SHA-256 and length of a file."""
    with file.open("rb") as opened:
        return f"{hashlib.file_digest(opened, 'sha256').hexdigest()}:{file.stat().st_size}"


def has_digest(file: Path, digest: str) -> bool:
    """Whether a file has this digest. A file of another length, which may be endless, is not read."""
    return file.is_file() and str(file.stat().st_size) == digest.rpartition(":")[2] and file_digest(file) == digest

"""Safetensors shards with an index, as transformers and engines read them, written one at a time; and their proof."""

import math
from collections.abc import Iterable, Mapping
from pathlib import Path

from safetensors import safe_open
from torch import Tensor

from fewbit.checkpoint.source import INDEX_FILE, read_header
from fewbit.errors import VerificationError
from fewbit.files import read_json_object, write_json
from fewbit.formats.beside import difference
from fewbit.safetensors_file import write_safetensors

METADATA = {"format": "pt"}
"""Of a shard; transformers opens no other."""


def shard_names(count: int) -> list[str]:
    """Files of the weights in so many shards."""
    return [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]


def write_shards(directory: Path, shards: Iterable[Mapping[str, Tensor]], count: int) -> None:
    """Write `count` shards, each taken from `shards` when it is its turn, and the index of their tensors."""
    weight_map: dict[str, str] = {}
    total = 0
    for shard, tensors in zip(shard_names(count), shards, strict=True):
        write_safetensors(directory / shard, tensors, METADATA)
        weight_map |= dict.fromkeys(tensors, shard)
        total += sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    write_json(directory / INDEX_FILE, _index(weight_map, total))


def check_shards(directory: Path, count: int) -> None:
    """VerificationError unless the index says of every tensor where it is, once, and every reader takes the shards."""
    weight_map: dict[str, str] = {}
    total = 0
    for shard in shard_names(count):
        for name, info in read_header(directory / shard).items():
            if name in weight_map:
                raise VerificationError(f"{directory}: tensor {name!r} is in {weight_map[name]} and in {shard}")
            weight_map[name] = shard
            total += math.prod(info.shape) * info.dtype.itemsize
        with safe_open(directory / shard, framework="pt") as opened:
            if opened.metadata() != METADATA:
                raise VerificationError(f"{directory / shard}: metadata are {opened.metadata()}, not {METADATA}")
    if fault := difference(read_json_object(directory / INDEX_FILE), _index(weight_map, total)):
        fault = fault.replace("in the run", "in them")
        raise VerificationError(f"{directory / INDEX_FILE} does not fit the shards: {fault}")


def _index(weight_map: Mapping[str, str], total: int) -> dict[str, object]:
    return {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}

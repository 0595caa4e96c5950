"""Proof that a compressed-tensors export is right: the format's own library decodes it, and all must equal the run.

Of every weight: the config group that the library picks for it, each stored tensor, the codes (decoded with all scales
set to one) and the weight. Of every activation its tensors; what the config says of attention is compared with all
else that lies beside the weights, before all that. Then all other tensors, that none is left over, that linears which
stay as they are are ignored, and that fused linears share their scales.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fewbit.checkpoint.configuration import quantization_of, read_config
from fewbit.checkpoint.native import NativeCheckpoint
from fewbit.checkpoint.source import INDEX_FILE, SafetensorsSource
from fewbit.contents import LinearEntry
from fewbit.errors import FewbitError, VerificationError, first_line
from fewbit.formats.beside import check_beside
from fewbit.formats.compressed_tensors.activations import encode_activation
from fewbit.formats.compressed_tensors.config import NAME, group_entry, layout_of, left_alone
from fewbit.formats.compressed_tensors.layouts import Layout
from fewbit.formats.compressed_tensors.scheme import Args
from fewbit.formats.compressed_tensors.write import config_changes, unshared
from fewbit.formats.shards import check_shards, shard_names
from fewbit.formats.verification import Verification, compare, read_origin
from fewbit.tensor import QuantTensor


def verify(directory: Path, checkpoint: NativeCheckpoint) -> Verification:
    """Decode every weight of an export with the library and compare everything with the run."""
    contents, count = checkpoint.contents, len(checkpoint.parts)
    beside = [*shard_names(count), INDEX_FILE]
    check_beside(directory, read_origin(directory), checkpoint.directory, config_changes(contents), beside)
    if fault := unshared(checkpoint):
        raise VerificationError(f"{directory}: {fault}")
    checked = _Export(directory)
    for linear in contents.weights:
        checked.weight(linear, checkpoint.read_quantized(linear.weight_name), checked.scheme(linear))
    for name, activation in checkpoint.activations().items():
        for stored, expected in encode_activation(name, activation).items():
            checked.tensor(stored, expected)
    dense = [name for part in checkpoint.parts for name in part.dense]
    for name in dense:
        checked.tensor(name, checkpoint.read([name])[name])
    checked.nothing_left(left_alone(contents))
    check_shards(directory, count)
    decoder = f"compressed-tensors {checked.library.__version__}"
    return Verification(directory, NAME, len(contents.weights), len(dense), decoder, len(contents.activations))


class _Export:
    """The files of an export, its config as the library reads it, and what has not been looked at yet."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.library = _library()
        self.stored = SafetensorsSource(directory)
        raw = quantization_of(read_config(directory), directory)
        try:
            self.config = self.library.quantization.QuantizationConfig.model_validate(raw)
        except Exception as error:
            raise VerificationError(f"{directory}: the library refuses the config: {first_line(error)}") from None
        self.schemes: dict[str, Any] = {}  # by target; as the library has it, a later group's wins
        for scheme in self.config.config_groups.values():
            self.schemes |= dict.fromkeys(scheme.targets, scheme)
        self.left = set(self.stored.info())

    def scheme(self, linear: LinearEntry) -> Any:
        """The scheme that the library picks for a linear, which must say what its specs say."""
        picked = self.picked(linear.name)
        if picked is None:
            raise VerificationError(f"{self.directory}: by its config {linear.name!r} is not quantized")
        entry = group_entry(linear)
        found = picked.format or self.config.format
        if found != entry["format"]:
            raise VerificationError(f"{linear.name}: the config says {found}, not {entry['format']}")
        for what in ("weights", "input_activations"):
            self.args(f"{linear.name} {what}", getattr(picked, what), entry.get(what))
        return picked

    def picked(self, module: str) -> Any:
        """By the library's own rule: the scheme of the linear `module`, None for one that is ignored."""
        linear = nn.Linear(1, 1, device="meta")
        match_targets = self.library.utils.match.match_targets
        targets, ignored = (match_targets(module, linear, names) for names in (self.schemes, self.config.ignore))
        return self.schemes[targets[0]] if targets and not ignored else None

    def args(self, what: str, found: Any, expected: Args | None) -> None:
        """VerificationError unless the library understands an entry as it does the arguments expected."""
        wanted = None if expected is None else self.library.quantization.QuantizationArgs(**expected).model_dump()
        if (None if found is None else found.model_dump()) != wanted:
            raise VerificationError(f"{what}: the config says {found!r}, the run {expected}")

    def weight(self, linear: LinearEntry, expected: QuantTensor, scheme: Any) -> None:
        """Stored tensors, codes and values of one weight."""
        module, layout = linear.name, layout_of(linear)
        encoded = layout.encode(expected)
        tensors = {part: self.tensor(f"{module}.{part}", tensor, part) for part, tensor in encoded.items()}
        ones = torch.ones_like(expected.scale, dtype=torch.float32).to(expected.scale.dtype)
        unscaled = replace(expected, scale=ones, global_scale=1.0)
        units = {part: tensor for part, tensor in layout.encode(unscaled).items() if "scale" in part}
        codes = self.decompressed(module, tensors | units, scheme, layout)
        compare(f"{module} codes", codes.float(), unscaled.dequantize(), bits=False)
        weight = self.decompressed(module, tensors, scheme, layout)
        compare(f"{module} weight", weight, expected.dequantize(weight.dtype), bits=False)

    def decompressed(self, module: str, tensors: dict[str, Tensor], scheme: Any, layout: Layout) -> Tensor:
        try:
            decompressor = self.library.compressors.BaseCompressor.get_value_from_registry(layout.name)
            weight: Tensor = decompressor.decompress(tensors, scheme)["weight"]
        except Exception as error:  # whatever the library raises, it cannot read this weight by that config
            raise VerificationError(f"{module}: compressed-tensors cannot decode it: {first_line(error)}") from None
        return weight

    def tensor(self, name: str, expected: Tensor, part: str | None = None) -> Tensor:
        """The stored tensor `name`, which must equal `expected`."""
        if name not in self.left:
            raise VerificationError(f"{self.directory}: tensor {name!r} is missing")
        found = self.stored.read([name])[name]
        what = name if part is None else f"{name.removesuffix('.' + part)} {part.removeprefix('weight_')}"
        compare(what, found, expected)
        self.left.discard(name)
        return found

    def nothing_left(self, unquantized: list[str]) -> None:
        """No tensor that was not compared, and no linear that an engine would quantize although the run did not."""
        if self.left:
            raise VerificationError(f"{self.directory} holds tensors that the run does not: {sorted(self.left)[0]!r}")
        for module in unquantized:
            if not module.startswith("re:") and self.picked(module) is not None:
                raise VerificationError(
                    f"{self.directory}: by its config {module!r} is quantized, in the run it is not"
                )


def _library() -> Any:
    """compressed-tensors, and what is used of it."""
    try:
        import compressed_tensors.compressors
        import compressed_tensors.quantization
        import compressed_tensors.utils.match
    except ImportError:
        raise FewbitError("verifying this export needs its decoder: pip install 'fewbit[verify]'") from None
    return compressed_tensors

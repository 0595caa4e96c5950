import json

import pytest
import torch

from fewbit.checkpoint.files import write_json
from fewbit.checkpoint.native import MANIFEST, OUTSIDE, NativeCheckpoint, NativePart, block_file, write_part
from fewbit.checkpoint.source import TensorInfo
from fewbit.config.schemes import scheme_config
from fewbit.config.spec import QuantizationSpec
from fewbit.errors import CheckpointError
from fewbit.tensor import QuantTensor

SPECS = {
    "W4": scheme_config("W4A16", 8).weight,
    "W3_ASYM": scheme_config("W3A16_ASYM", -1).weight,
    "W8": QuantizationSpec(dtype="int8", qscheme="per_tensor", scale_dtype="float32"),
    "W2_ASYM_SIGNED": QuantizationSpec(dtype="int2", qscheme="per_group", group_size=20, symmetric=False),
}
BLOCKS = 2


def quant_tensor(spec: QuantizationSpec, seed: int) -> QuantTensor:
    generator = torch.Generator().manual_seed(seed)
    scale_shape = spec.tiling.scale_shape((6, 40))

    def codes(*shape: int) -> torch.Tensor:
        smallest, largest = int(spec.format.smallest), int(spec.format.largest)
        return torch.randint(smallest, largest + 1, shape, generator=generator).to(spec.format.code_dtype)

    scale = torch.randn(scale_shape, generator=generator).to(spec.stored_scale_dtype(torch.bfloat16))
    return QuantTensor(codes(6, 40), scale, None if spec.symmetric else codes(*scale_shape), spec)


def quantized(block: int) -> dict[str, QuantTensor]:
    return {
        f"layers.{block}.{name}.weight": quant_tensor(spec, seed=10 * block + i)
        for i, (name, spec) in enumerate(SPECS.items())
    }


def dense(prefix: str) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(len(prefix))
    return {
        f"{prefix}.norm": torch.randn(5, generator=generator).bfloat16(),
        f"{prefix}.scale": torch.randn(
            3, 2, generator=generator
        ),  # a dense tensor may be called what parts are called
        f"{prefix}.ids": torch.arange(4),
    }


def write_checkpoint(directory):
    for block in range(BLOCKS):
        write_part(block_file(directory, block), quantized(block), dense(f"layers.{block}"))
    write_part(directory / OUTSIDE, {}, dense("outside"))
    write_json(directory / MANIFEST, {"format_version": 1, "num_blocks": BLOCKS})
    return directory


def assert_same(one: QuantTensor, other: QuantTensor) -> None:
    assert one.spec == other.spec
    assert torch.equal(one.codes, other.codes)
    assert one.scale.dtype == other.scale.dtype
    assert torch.equal(one.scale, other.scale)
    assert (one.zero_point is None) == (other.zero_point is None)
    assert one.zero_point is None or torch.equal(one.zero_point, other.zero_point)


@pytest.fixture
def part(tmp_path) -> NativePart:
    write_part(tmp_path / "part.safetensors", quantized(0), dense("layers.0"))
    return NativePart(tmp_path / "part.safetensors")


class TestPart:
    def test_quantized_weights_read_back_exactly(self, part):
        for name, weight in quantized(0).items():
            assert_same(part.read_quantized(name), weight)

    def test_dense_tensors_read_back_exactly(self, part):
        for name, tensor in dense("layers.0").items():
            read = part.read(name)
            assert read.dtype == tensor.dtype
            assert torch.equal(read, tensor)

    @pytest.mark.parametrize("dtype", [None, torch.float32, torch.bfloat16])
    def test_read_dequantizes(self, part, dtype):
        for name, weight in quantized(0).items():
            read = part.read(name, dtype)
            assert read.dtype == (dtype or torch.float32)
            assert torch.equal(read, weight.dequantize(dtype or torch.float32))

    def test_the_file_alone_says_what_it_holds(self, part):
        weights = quantized(0)
        assert part.quantized == {name: (weight.spec, (6, 40)) for name, weight in weights.items()}
        assert part.info() == {name: TensorInfo((6, 40), torch.float32) for name in weights} | {
            name: TensorInfo(tuple(tensor.shape), tensor.dtype) for name, tensor in dense("layers.0").items()
        }

    def test_written_many_times_the_bytes_are_the_same(self, tmp_path):
        written = set()
        for _ in range(16):
            write_part(tmp_path / "part.safetensors", quantized(0), dense("layers.0"))
            written.add((tmp_path / "part.safetensors").read_bytes())
        assert len(written) == 1

    def test_a_dense_tensor_that_is_not_finite_is_named(self, tmp_path):
        write_part(tmp_path / "part.safetensors", {}, {"norm": torch.tensor([1.0, torch.nan])})
        with pytest.raises(CheckpointError, match="tensor 'norm' holds 1 NaN"):
            NativePart(tmp_path / "part.safetensors").read("norm")

    def test_a_truncated_file_is_named(self, part):
        part.file.write_bytes(part.file.read_bytes()[:-1])
        with pytest.raises(CheckpointError, match=r"part\.safetensors is truncated"):
            NativePart(part.file)


class TestCheckpoint:
    def test_every_tensor_of_every_part_reads_back(self, tmp_path):
        checkpoint = NativeCheckpoint(write_checkpoint(tmp_path))
        weights = {name: weight for block in range(BLOCKS) for name, weight in quantized(block).items()}
        others = dense("outside") | dense("layers.0") | dense("layers.1")
        assert set(checkpoint.info()) == set(weights) | set(others)
        assert set(checkpoint.quantized) == set(weights)
        for name, weight in weights.items():
            assert_same(checkpoint.read_quantized(name), weight)
        read = checkpoint.read([*weights, *others])
        assert all(torch.equal(read[name], weight.dequantize()) for name, weight in weights.items())
        assert all(torch.equal(read[name], tensor) for name, tensor in others.items())

    def test_an_unknown_tensor_is_named(self, tmp_path):
        checkpoint = NativeCheckpoint(write_checkpoint(tmp_path))
        with pytest.raises(CheckpointError, match="no tensor 'absent'"):
            checkpoint.read(["absent"])
        with pytest.raises(CheckpointError, match="no tensor 'absent'"):
            checkpoint.read_quantized("absent")

    @pytest.mark.parametrize("missing", ["blocks/00000.safetensors", "blocks/00001.safetensors", OUTSIDE])
    def test_a_missing_part_means_the_run_is_not_finished(self, missing, tmp_path):
        (write_checkpoint(tmp_path) / missing).unlink()
        with pytest.raises(CheckpointError, match=r"is not finished.*--resume") as caught:
            NativeCheckpoint(tmp_path)
        assert missing.split("/")[-1] in str(caught.value)

    def test_a_directory_without_a_manifest_is_no_run(self, tmp_path):
        (write_checkpoint(tmp_path) / MANIFEST).unlink()
        with pytest.raises(CheckpointError, match=f"is not a fewbit run: it has no {MANIFEST}"):
            NativeCheckpoint(tmp_path)

    @pytest.mark.parametrize("version", [0, 2, "1", None])
    def test_another_format_version_is_refused_and_both_are_named(self, version, tmp_path):
        write_json(write_checkpoint(tmp_path) / MANIFEST, {"format_version": version, "num_blocks": BLOCKS})
        with pytest.raises(CheckpointError, match=f"written in format {version!r}; this fewbit reads 1"):
            NativeCheckpoint(tmp_path)

    @pytest.mark.parametrize("text", ["", '{"format_version": 1', "[]", "null", '{"format_version": 1}'])
    def test_a_damaged_manifest_is_named(self, text, tmp_path):
        (write_checkpoint(tmp_path) / MANIFEST).write_text(text)
        with pytest.raises(CheckpointError, match=f"{MANIFEST} is damaged"):
            NativeCheckpoint(tmp_path)

    def test_the_fingerprint_is_that_of_the_manifest(self, tmp_path):
        one = NativeCheckpoint(write_checkpoint(tmp_path)).fingerprint()
        assert NativeCheckpoint(tmp_path).fingerprint() == one
        manifest = json.loads((tmp_path / MANIFEST).read_text())
        write_json(tmp_path / MANIFEST, manifest | {"fingerprint": "of another model"})
        assert NativeCheckpoint(tmp_path).fingerprint() != one

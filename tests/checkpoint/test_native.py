import json

import pytest
import torch

from fewbit.checkpoint.journal import Journal
from fewbit.checkpoint.native import (
    FORMAT_VERSION,
    MANIFEST,
    OUTSIDE,
    NativeCheckpoint,
    NativePart,
    StoredStep,
    block_file,
    write_manifest,
    write_part,
)
from fewbit.checkpoint.source import TensorInfo
from fewbit.config.schemes import scheme_config
from fewbit.config.spec import QuantizationSpec
from fewbit.errors import CheckpointError
from fewbit.files import write_json
from fewbit.tensor import QuantizedActivation, QuantTensor, quantize

SPECS = {
    "W4": scheme_config("W4A16", 8).weight,
    "W3_ASYM": scheme_config("W3A16_ASYM", -1).weight,
    "W8": QuantizationSpec(dtype="int8", qscheme="per_tensor", scale_dtype="float32"),
    "W2_ASYM_SIGNED": QuantizationSpec(dtype="int2", qscheme="per_group", group_size=20, symmetric=False),
    "COLUMNS": QuantizationSpec(dtype="int4", qscheme="per_channel", ch_axis=1),
    "GROUPS_OF_ROWS": QuantizationSpec(dtype="uint4", qscheme="per_group", group_size=3, ch_axis=0, symmetric=False),
    "FP8": QuantizationSpec(dtype="e4m3", qscheme="per_channel", observer="minmax"),
    "FP8_BLOCK": QuantizationSpec(dtype="e4m3", qscheme="per_block", block_size=(2, 16), scale_dtype="float32"),
    "E5M2": QuantizationSpec(dtype="fp8_e5m2", qscheme="per_tensor", observer="percentile", percentile=99.0),
    "FP6": QuantizationSpec(dtype="e3m2", qscheme="per_group", group_size=8, round_method="round"),
    "NVFP4": QuantizationSpec(dtype="e2m1", group_size=16, scale_type="e4m3"),
    "MXFP4": QuantizationSpec(dtype="mx", mx_element_dtype="fp4", group_size=16, exponent_mode="rceil"),
    "MX6": QuantizationSpec(dtype="mx6"),
    "MX9": QuantizationSpec(dtype="mx9"),
    "POF2": QuantizationSpec(dtype="int4", qscheme="per_channel", scale_type="pof2", round_method="floor"),
    "BF16": QuantizationSpec(dtype="bfloat16"),
    "FP16": QuantizationSpec(dtype="float16"),
    "TWO_STAGE": QuantizationSpec(
        dtype="int4", qscheme="per_channel", first_stage=QuantizationSpec(dtype="e4m3", qscheme="per_tensor")
    ),
}
SHAPE = (6, 80)
STATIC = QuantizationSpec(dtype="uint8", qscheme="per_tensor", symmetric=False, observer="minmax", clip_ratio=0.9)
ACTIVATIONS = {
    "layers.0.W4.input": QuantizedActivation(STATIC, torch.tensor([[0.25]]), torch.tensor([[3]], dtype=torch.uint8)),
    "layers.0.W4.output": QuantizedActivation(
        QuantizationSpec(dtype="e4m3", qscheme="per_tensor", observer="histogram"), torch.tensor([[2.0]]).bfloat16()
    ),
    "layers.0.NVFP4.input": QuantizedActivation(
        QuantizationSpec(dtype="e2m1", group_size=16, scale_type="e4m3", observer="minmax", is_dynamic=True),
        global_scale=2.0**-9,
    ),
    "layers.0.attention.key": QuantizedActivation(
        QuantizationSpec(dtype="int8", qscheme="per_token", observer="minmax", is_dynamic=True, residual=True)
    ),
    "layers.0.attention.value": QuantizedActivation(QuantizationSpec(dtype="float16")),
}
BLOCKS = 2


def quant_tensor(spec: QuantizationSpec, seed: int) -> QuantTensor:
    weight = torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed))
    format = spec.scale_format(torch.bfloat16, spec.global_scale(weight))
    return quantize(weight, spec, format, *spec.grid_rule(format).find(spec.tiling.split(weight)))


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
        flows = {name.replace("layers.0", f"layers.{block}"): flow for name, flow in ACTIVATIONS.items()}
        digest = write_part(block_file(directory, block), quantized(block), dense(f"layers.{block}"), flows)
        Journal(directory).add_block(block, digest, [])
    Journal(directory).add_file(OUTSIDE, write_part(directory / OUTSIDE, {}, dense("outside")))
    write_manifest(directory, {"num_blocks": BLOCKS})
    return directory


def assert_same(one: QuantTensor, other: QuantTensor) -> None:
    assert one.spec == other.spec
    assert torch.equal(one.codes, other.codes)
    assert one.scale.dtype == other.scale.dtype
    assert torch.equal(one.scale.float(), other.scale.float())
    assert one.codes.dtype == other.codes.dtype
    assert one.global_scale == other.global_scale
    assert (one.zero_point is None) == (other.zero_point is None)
    assert one.zero_point is None or torch.equal(one.zero_point, other.zero_point)


def assert_same_activations(found: dict[str, QuantizedActivation], expected: dict[str, QuantizedActivation]) -> None:
    assert set(found) == set(expected)
    for name, activation in expected.items():
        assert found[name].spec == activation.spec
        assert found[name].global_scale == activation.global_scale
        for field in ("scale", "zero_point"):
            one, other = getattr(found[name], field), getattr(activation, field)
            assert (one is None) == (other is None)
            assert one is None or (one.dtype == other.dtype and torch.equal(one, other))


@pytest.fixture
def part(tmp_path) -> NativePart:
    write_part(tmp_path / "part.safetensors", quantized(0), dense("layers.0"), ACTIVATIONS)
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

    def test_activations_read_back_exactly(self, part):
        assert_same_activations(part.activations(), ACTIVATIONS)

    def test_a_part_without_activations_has_none(self, tmp_path):
        write_part(tmp_path / "part.safetensors", quantized(0), dense("layers.0"))
        assert NativePart(tmp_path / "part.safetensors").activations() == {}

    @pytest.mark.parametrize("dtype", [None, torch.float32, torch.bfloat16])
    def test_read_dequantizes(self, part, dtype):
        for name, weight in quantized(0).items():
            read = part.read(name, dtype)
            assert read.dtype == (dtype or torch.float32)
            assert torch.equal(read, weight.dequantize(dtype or torch.float32))

    def test_the_file_alone_says_what_it_holds(self, part):
        weights = quantized(0)
        assert part.quantized == {name: (weight.spec, SHAPE) for name, weight in weights.items()}
        assert part.info() == {name: TensorInfo(SHAPE, torch.float32) for name in weights} | {
            name: TensorInfo(tuple(tensor.shape), tensor.dtype) for name, tensor in dense("layers.0").items()
        }

    def test_written_many_times_the_bytes_are_the_same(self, tmp_path):
        written = set()
        for _ in range(16):
            write_part(tmp_path / "part.safetensors", quantized(0), dense("layers.0"), ACTIVATIONS)
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

    def test_activations_of_every_part_are_found(self, tmp_path):
        expected = {
            name.replace("layers.0", f"layers.{block}"): flow
            for block in range(BLOCKS)
            for name, flow in ACTIVATIONS.items()
        }
        assert_same_activations(NativeCheckpoint(write_checkpoint(tmp_path)).activations(), expected)

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

    @pytest.mark.parametrize("version", [0, FORMAT_VERSION - 1, FORMAT_VERSION + 1, str(FORMAT_VERSION), None])
    def test_another_format_version_is_refused_and_both_are_named(self, version, tmp_path):
        write_manifest(write_checkpoint(tmp_path), {"format_version": version, "num_blocks": BLOCKS})
        with pytest.raises(
            CheckpointError, match=f"written in format {version!r}; this fewbit reads {FORMAT_VERSION}"
        ):
            NativeCheckpoint(tmp_path)

    @pytest.mark.parametrize(
        "text", ["", f'{{"format_version": {FORMAT_VERSION}', "[]", "null", f'{{"format_version": {FORMAT_VERSION}}}']
    )
    def test_a_damaged_manifest_is_named(self, text, tmp_path):
        (write_checkpoint(tmp_path) / MANIFEST).write_text(text)
        with pytest.raises(CheckpointError, match=f"{MANIFEST} is damaged"):
            NativeCheckpoint(tmp_path)

    def test_the_fingerprint_is_that_of_the_manifest_and_of_every_file(self, tmp_path):
        one = NativeCheckpoint(write_checkpoint(tmp_path)).fingerprint()
        assert NativeCheckpoint(tmp_path).fingerprint() == one
        write_manifest(tmp_path, {"num_blocks": BLOCKS, "model": "another"})
        assert NativeCheckpoint(tmp_path).fingerprint() != one
        write_checkpoint(tmp_path)
        assert NativeCheckpoint(tmp_path).fingerprint() == one
        Journal(tmp_path).add_file(OUTSIDE, write_part(tmp_path / OUTSIDE, {}, dense("others")))
        assert NativeCheckpoint(tmp_path).fingerprint() != one

    def test_a_manifest_that_was_changed_is_refused(self, tmp_path):
        manifest = json.loads((write_checkpoint(tmp_path) / MANIFEST).read_text())
        write_json(tmp_path / MANIFEST, manifest | {"num_blocks": BLOCKS - 1})
        with pytest.raises(CheckpointError, match=f"{MANIFEST} is damaged"):
            NativeCheckpoint(tmp_path)

    @pytest.mark.parametrize("part", range(BLOCKS + 1))
    def test_a_changed_value_is_never_read(self, part, tmp_path):
        changed = NativeCheckpoint(write_checkpoint(tmp_path)).parts[part].file
        data = bytearray(changed.read_bytes())
        data[-1] ^= 1
        changed.write_bytes(data)
        checkpoint = NativeCheckpoint(tmp_path)  # its description is as before
        name = next(iter(checkpoint.parts[part].dense))
        with pytest.raises(CheckpointError, match=rf"{changed.name} is damaged.*--resume"):
            checkpoint.read([name])


def test_steps_are_stored_in_their_order_with_what_was_folded(tmp_path):
    scale, order = torch.rand(4), torch.tensor([3, 0, 1, 2])
    steps = {
        "a": [
            StoredStep("permute", {"permute.order": order}),
            StoredStep("divide", {"smoothing": scale}, {"folded": True}),
        ],
        "b": [StoredStep("flip", {}, {"every": 3})],
    }
    write_part(tmp_path / "part", {}, {"norm.weight": torch.ones(4)}, steps=steps, folded=["norm.weight"])
    part = NativePart(tmp_path / "part")
    found = part.steps()
    assert [(step.kind, step.data) for step in found["a"]] == [("permute", {}), ("divide", {"folded": True})]
    assert torch.equal(found["a"][0].tensors["permute.order"], order)
    assert torch.equal(found["a"][1].tensors["smoothing"], scale)
    assert found["b"] == [StoredStep("flip", {}, {"every": 3})]
    assert part.folded == ["norm.weight"]
    assert list(part.info()) == ["norm.weight"]

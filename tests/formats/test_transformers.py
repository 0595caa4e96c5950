"""transformers loads exports and computes what fewbit's own fake quantization computes, to the last bit.

In float32, where nothing is rounded between the steps. FP4, FP6 and MX weights are decoded to bfloat16, so models of
these load in bfloat16 only; their activation scales are exact there, too.
"""

import pytest
import torch
import transformers
from native_runs import SCHEMES
from test_compressed_tensors import CACHES, FORMAT
from transformers import AutoModelForCausalLM

from fewbit.checkpoint.native import NativeCheckpoint
from fewbit.formats import export
from fewbit.formats.table import open_any

IDS = torch.randint(304, (2, 24), generator=torch.Generator().manual_seed(0))
FLOAT32 = [
    "W4A16",
    "W3A16_ASYM",
    "W8A16, channel",
    "W4A8",
    "W4AFP8",
    "W8A8",
    "W8A8, static",
    "W8A8, affine static",
    "FP8",
    "FP8_DYNAMIC",
    "FP8_BLOCK",
]
BFLOAT16 = ["NVFP4", "NVFP4A16", "MXFP4", "MXFP6", "MXFP8A16"]


@pytest.fixture
def loaded(native, tmp_path):
    """loaded(name, stored dtype, attention, dtype): the run, and its export as transformers loads it."""

    def load(name, stored, attention, dtype):
        run = native(name, stored, attention)
        directory = export(run, FORMAT, tmp_path / "export")
        if name == "W3A16_ASYM" and int(transformers.__version__.split(".")[1]) > 17:
            pytest.skip(
                "newer transformers loads packed zero points only with dequantize=True, which rounds to bfloat16"
            )
        return run, AutoModelForCausalLM.from_pretrained(directory, dtype=dtype).eval()

    return load


@torch.no_grad()
def logits(model):
    return model(input_ids=IDS).logits


@pytest.mark.parametrize(
    ("name", "dtype"), [(n, torch.float32) for n in FLOAT32] + [(n, torch.bfloat16) for n in BFLOAT16]
)
def test_transformers_computes_exactly_what_fewbit_computes(loaded, emulated, dequantized, name, dtype):
    run, model = loaded(name, torch.bfloat16, None, dtype)
    found = logits(model)
    assert found.dtype == dtype
    assert torch.equal(found, logits(emulated(run, dtype)))
    quantizes_activations = SCHEMES[name][1].input_tensors is not None
    assert torch.equal(found, logits(dequantized(run, dtype))) != quantizes_activations


@pytest.mark.parametrize("cache", CACHES)
def test_transformers_quantizes_keys_values_and_queries_as_fewbit_does(loaded, emulated, dequantized, cache):
    run, model = loaded("W4A16", torch.float32, CACHES[cache], torch.float32)
    found = logits(model)
    assert torch.equal(found, logits(emulated(run)))
    assert not torch.equal(found, logits(dequantized(run)))


@pytest.mark.parametrize("name", ["mixed", "MXFP8", "W8A8"])
def test_in_bfloat16_the_weights_are_exactly_the_runs(loaded, name):
    run, model = loaded(name, torch.bfloat16, None, torch.bfloat16)
    assert logits(model).isfinite().all()  # decompresses
    checkpoint = NativeCheckpoint(run)
    found = model.state_dict()
    for weight in checkpoint.quantized:
        assert torch.equal(found[weight], checkpoint.read_quantized(weight).dequantize(torch.bfloat16))


@pytest.mark.parametrize("name", ["NVFP4A16", "MXFP8A16"])
def test_in_float32_transformers_fails_where_the_export_notes_it(loaded, name):
    _, model = loaded(name, torch.float32, None, torch.float32)
    with pytest.raises(RuntimeError, match="same dtype"):
        logits(model)


def test_fewbit_opens_an_export_as_a_model(native, tmp_path):
    run = native("mixed", torch.float32)
    ours, theirs = open_any(run), open_any(export(run, FORMAT, tmp_path / "export"))
    names = ours.block_tensors(0)
    expected, found = ours.source.read(names, torch.float32), theirs.source.read(names, torch.float32)
    assert all(torch.equal(found[name], expected[name]) for name in names)

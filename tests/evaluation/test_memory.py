"""Peak memory of evaluation and of the walk does not grow with windows or blocks. Each in a process of its own, where
nothing else is in the heap."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

pytestmark = pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peaks are read from Linux")

START = """
import json, pathlib, sys, torch, fewbit
few, many, scratch = sys.argv[1:]

def peak(call, *arguments):
    pathlib.Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    call(*arguments)
    status = pathlib.Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0])

def ids(windows, vocabulary, length=256):
    return torch.randint(5, vocabulary, (windows, length), generator=torch.Generator().manual_seed(0))
"""
WINDOWS = """
def run(windows):
    fewbit.evaluate(few, ids(windows, 40000), against=many)
sizes = (2, 2, 16)
"""
EVALUATED = """
def run(model):
    fewbit.evaluate(model, ids(3, 300))
sizes = (few, few, many)
"""
QUANTIZED = """
def run(model):
    where = f"{scratch}/{len(list(pathlib.Path(scratch).iterdir()))}"
    fewbit.quantize(model, "W8A16", algorithm="rtn", calibration=ids(3, 300), output=where, progress=False)
sizes = (few, few, many)
"""
END = """
print(json.dumps([peak(run, size) for size in sizes]))
"""


def saved(directory, blocks, vocabulary, width):
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=blocks,
        num_attention_heads=4,
        max_position_embeddings=256,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(directory)
    return directory


def peaks(code, few, many, scratch):
    scratch.mkdir()
    command = [sys.executable, "-c", START + code + END, few, many, scratch]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    _, first, second = json.loads(done.stdout.splitlines()[-1])  # the very first loads libraries
    return first, second


def test_windows_take_no_more_logits_than_one(tmp_path):
    model = saved(tmp_path / "wide", 1, 40_000, 16)
    few, many = peaks(WINDOWS, model, model, tmp_path / "scratch")
    assert many < 1.1 * few


@pytest.mark.parametrize("code", [EVALUATED, QUANTIZED], ids=["evaluated", "quantized"])
def test_blocks_take_no_more_memory_than_a_few(tmp_path, code):
    models = [saved(tmp_path / str(blocks), blocks, 300, 256) for blocks in (5, 40)]  # 4 MiB each in float32
    few, many = peaks(code, *models, tmp_path / "scratch")
    assert many < 1.15 * few

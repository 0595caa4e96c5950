"""The versions of compressed-tensors that engines pin read every layout as the run has it, or the table says that they
cannot.

They are installed once, without what they depend on, into .cache/ of the repository; one process of each decodes all.
"""

import fcntl
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from native_runs import EVERY
from safetensors.torch import load_file
from test_compressed_tensors import CACHES, FORMAT

from fewbit.checkpoint.native import NativeCheckpoint
from fewbit.formats import export
from fewbit.formats.compressed_tensors.engines import ENGINES, Effect, applying

CACHE = Path(__file__).parents[2] / ".cache" / FORMAT
VERSIONS = sorted({engine.library for engine in ENGINES.values()})
SIX = {"MXFP6", "MXFP6A8"}
BEYOND = {"0.17.0": SIX | {"W3A16_ASYM"}, "0.18.0": SIX, "0.20.0": set()}
"""What versions cannot decode: floats of 6 bits before 0.20; and 0.17 packs 3 bits with gaps (vLLM, which pins it,
unpacks by itself, without)."""


@pytest.fixture(scope="session")
def library():
    """library(version): a directory that holds it."""

    def install(version):
        CACHE.mkdir(parents=True, exist_ok=True)
        with (CACHE / ".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            target = CACHE / version
            if not target.exists():
                beside = CACHE / f"{version}.partial"
                shutil.rmtree(beside, ignore_errors=True)
                pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(beside)]
                subprocess.run([*pip, f"compressed-tensors=={version}"], check=True, capture_output=True)
                beside.rename(target)
        return target

    return install


@pytest.fixture(scope="module")
def exports(native, tmp_path_factory):
    """Run and export of everything, by name."""
    made = {name: native(name, torch.bfloat16) for name in EVERY}
    made |= {f"cache {name}": native("W4A16", torch.bfloat16, cache) for name, cache in CACHES.items()}
    root = tmp_path_factory.mktemp("versions")
    return {name: (run, export(run, FORMAT, root / name.replace(" ", "-"))) for name, run in made.items()}


@pytest.mark.parametrize("version", VERSIONS)
def test_every_version_that_engines_pin_decodes_every_layout_to_the_runs_weights(version, library, exports, tmp_path):
    jobs = {"exports": {name: str(directory) for name, (_, directory) in exports.items()}, "output": str(tmp_path)}
    (tmp_path / "jobs.json").write_text(json.dumps(jobs))
    script = Path(__file__).parent / "decode_with.py"
    where = os.environ | {"PYTHONPATH": str(library(version))}
    ended = subprocess.run(
        [sys.executable, script, tmp_path / "jobs.json"], check=True, capture_output=True, text=True, env=where
    )
    said = json.loads(ended.stdout.splitlines()[-1])
    assert said["version"] == version
    assert set(said["failed"]) == BEYOND[version], said["failed"]
    for name in set(exports) - set(said["failed"]):
        native, decoded = NativeCheckpoint(exports[name][0]), load_file(tmp_path / f"{name}.safetensors")
        assert set(decoded) == set(native.quantized)
        for weight, found in decoded.items():
            assert torch.equal(found, native.read_quantized(weight).dequantize(found.dtype)), f"{name}: {weight}"


def test_what_a_pinned_version_cannot_say_its_engine_refuses_in_the_table(exports):
    for name in SIX:
        contents = NativeCheckpoint(exports[name][0]).contents
        for engine in ENGINES.values():
            effects = {rule.effect for rule in applying(contents, engine.name)}
            assert (Effect.REFUSES in effects) == (engine.library != "0.20.0")

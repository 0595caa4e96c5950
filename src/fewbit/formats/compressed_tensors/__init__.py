"""compressed-tensors, the format of vLLM and transformers: integers, FP8, NVFP4 and MX, activations and KV cache.

layouts.py      a weight's codes and scales as the format's tensors, and back
scheme.py       specs in the format's words, and back; which layout a weight has
config.py       the quantization_config of config.json; what is refused
activations.py  static scales of activations and KV cache as tensors, and back
sharing.py      fused linears have one scale
targets.py      which modules a config group is for
engines.py      what engines make of an export: rules with their sources (contents.py: what they ask)
write.py, read.py, verify.py
"""

from __future__ import annotations

from fewbit.formats.compressed_tensors.config import NAME, check, quantization_config
from fewbit.formats.compressed_tensors.engines import engines_for, notes
from fewbit.formats.compressed_tensors.layouts import LAYOUTS
from fewbit.formats.compressed_tensors.read import CompressedTensorsSource
from fewbit.formats.compressed_tensors.scheme import layout_for
from fewbit.formats.compressed_tensors.verify import verify
from fewbit.formats.compressed_tensors.write import write

__all__ = [
    "LAYOUTS",
    "NAME",
    "CompressedTensorsSource",
    "check",
    "engines_for",
    "layout_for",
    "notes",
    "quantization_config",
    "verify",
    "write",
]

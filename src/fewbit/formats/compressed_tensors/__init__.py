"""compressed-tensors, the format of vLLM and transformers: integers, FP8, NVFP4 and MX, activations and KV cache.

layouts.py      a weight's codes and scales as the format's tensors, and back
scheme.py       specs in the format's words, and back; which layout a weight has
config.py       the quantization_config of config.json; what is refused
activations.py  static scales of activations and KV cache as tensors, and back
targets.py      which modules a config group is for
engines.py      what engines make of an export: rules with their sources
write.py, read.py, verify.py
"""

from fewbit.formats.compressed_tensors.config import NAME, check
from fewbit.formats.compressed_tensors.engines import engines, layouts, notes
from fewbit.formats.compressed_tensors.read import open_export
from fewbit.formats.compressed_tensors.verify import verify
from fewbit.formats.compressed_tensors.write import write
from fewbit.formats.format import ExportFormat

FORMAT = ExportFormat(NAME, open_export, check, layouts, engines, notes, write, verify)

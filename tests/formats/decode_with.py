"""Decodes exports with the compressed-tensors that the interpreter finds; knows nothing of fewbit.

    python decode_with.py JOBS.json: {"exports": {NAME: DIRECTORY}, "output": DIRECTORY}

Prints {"version": …, "failed": {NAME: error}} and writes the decoded weights of NAME to OUTPUT/NAME.safetensors, by
the scheme that the library itself picks for each linear.
"""

import json
import sys
from pathlib import Path

import compressed_tensors
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationConfig
from compressed_tensors.utils.match import match_targets
from safetensors.torch import load_file, save_file
from torch import nn


def decode(directory):
    described = json.loads((directory / "config.json").read_text())["quantization_config"]
    config = QuantizationConfig.model_validate(described)
    schemes = {target: scheme for scheme in config.config_groups.values() for target in scheme.targets}
    tensors = {name: tensor for file in directory.glob("*.safetensors") for name, tensor in load_file(file).items()}
    decoded = {}
    for name in tensors:
        if not name.endswith(".weight_scale"):
            continue
        module, linear = name.removesuffix(".weight_scale"), nn.Linear(1, 1, device="meta")
        if match_targets(module, linear, config.ignore):
            raise ValueError(f"{module} is ignored")
        scheme = schemes[match_targets(module, linear, schemes)[0]]
        own = {n.removeprefix(f"{module}."): t for n, t in tensors.items() if n.startswith(f"{module}.weight")}
        compressor = BaseCompressor.get_value_from_registry(scheme.format or config.format)
        decoded[f"{module}.weight"] = compressor.decompress(own, scheme)["weight"].contiguous()
    return decoded


def main():
    jobs = json.loads(Path(sys.argv[1]).read_text())
    failed = {}
    for name, directory in jobs["exports"].items():
        try:
            save_file(decode(Path(directory)), Path(jobs["output"]) / f"{name}.safetensors")
        except Exception as error:
            failed[name] = f"{type(error).__name__}: {error}"
    print(json.dumps({"version": compressed_tensors.__version__, "failed": failed}))


if __name__ == "__main__":
    main()

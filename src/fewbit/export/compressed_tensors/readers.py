"""What readers make of an export, where it is not what one expects.

tests/export/test_transformers.py runs transformers 5.17 with compressed-tensors 0.20: the default mode keeps weights
packed until the first forward, then makes them dense; activations and KV cache are fake-quantized in its dtype.
What is said of transformers 5.23 and of vLLM is reported, not tested here: in a trial with 5.17, zero points, several
formats and quantized activations worked with dequantize=True as they do without.
"""

from __future__ import annotations

from fewbit.export.compressed_tensors.config import ATTENTION_SLOTS, Specs, layout_of

PACKED, NVFP4, MXFP8 = "pack-quantized", "nvfp4-pack-quantized", "mxfp8-quantized"
DECODED_TO_BFLOAT16 = {NVFP4, MXFP8, "mxfp4-pack-quantized", "mxfp6-pack-quantized"}

NOTES = {
    "wrong experts": "transformers 5.23 loads NVFP4 experts WRONG without a word (no global scale): use vLLM",
    "experts": "transformers 5.23 cannot load experts with zero points, FP8 blocks or MXFP8: use vLLM",
    "bfloat16": "transformers decodes FP4, FP6 and MX weights to bfloat16; load with dtype=torch.bfloat16 only",
    "affine": "transformers 5.23 loads packed weights with zero points only with dequantize=True",
    "mixed": "transformers 5.23 cannot load several formats with dequantize=True; the default mode can",
    "activations": "transformers 5.23 with dequantize=True leaves quantized activations and KV cache out without a "
    "word; the default mode keeps them",
    "cache": "vLLM quantizes its KV cache to symmetric FP8 only; transformers emulates this one",
}


def notes(weights: Specs, activations: Specs | None = None) -> list[str]:
    """What a user should know about loading an export of these, by names as in `config.check`; often nothing."""
    activations = activations or {}
    layouts = {name: layout_of(name, spec, activations).name for name, spec in weights.items()}
    experts = {name: spec for name, spec in weights.items() if ".experts." in name}
    cache = [spec for name, spec in activations.items() if name.rpartition(".")[2] in ATTENTION_SLOTS]
    failing = [
        name
        for name, spec in experts.items()
        if not spec.symmetric or spec.qscheme == "per_block" or layouts[name] == MXFP8
    ]
    apply = {
        "wrong experts": any(layouts[name] == NVFP4 for name in experts),
        "experts": bool(failing),
        "bfloat16": not DECODED_TO_BFLOAT16.isdisjoint(layouts.values()),
        "affine": any(not spec.symmetric and layouts[name] == PACKED for name, spec in weights.items()),
        "mixed": len(set(layouts.values())) > 1,
        "activations": bool(activations),
        "cache": any(spec.format.is_integer for spec in cache),
    }
    return [NOTES[name] for name, applies in apply.items() if applies]

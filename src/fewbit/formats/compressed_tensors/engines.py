"""What engines make of a checkpoint: one table of rules, each with its source, and the kinds of linears it asks for.

The column "engines" of `fewbit schemes`, docs/formats.md and the notes in fewbit-export.json follow from it. Of
transformers, tests/formats/test_transformers.py shows what 5.17 computes; of the readers' library, tests/formats/
test_versions.py shows what the versions decode that engines pin. All else was read in the engines' own files, or is
reported, where the source says so.
"""

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum

from fewbit.config.spec import QuantizationSpec
from fewbit.contents import Contents
from fewbit.formats.compressed_tensors.config import layout_of

PACKED, INT, NAIVE, FLOAT = "pack-quantized", "int-quantized", "naive-quantized", "float-quantized"
NVFP4, MXFP4, MXFP6, MXFP8 = "nvfp4-pack-quantized", "mxfp4-pack-quantized", "mxfp6-pack-quantized", "mxfp8-quantized"


@dataclass(frozen=True)
class Engine:
    """An engine as the rules know it."""

    name: str
    library: str
    """Version of compressed-tensors that it pins (of transformers: that it was tested with)."""


ENGINES = {
    engine.name: engine
    for engine in (Engine("vLLM", "0.17.0"), Engine("SGLang", "0.18.0"), Engine("transformers", "0.20.0"))
}


class Effect(Enum):
    """What a rule is about, the worst first."""

    REFUSES = "the engine does not load it"
    WRONG = "it loads, and silently computes something else"
    OTHERWISE = "it loads, and is computed otherwise than it was quantized, but sensibly"
    LIMITED = "it needs some hardware, kernel or setting"


@dataclass(frozen=True)
class Rule:
    """One thing that an engine does and a user should know."""

    engine: str
    effect: Effect
    applies: Callable[[Contents], bool]
    note: str
    source: str
    short: str = ""
    """For the column "engines"; what goes without saying for a scheme has none."""


def applying(found: Contents, engine: str | None = None) -> list[Rule]:
    """Rules that apply, of one engine or of all."""
    return [rule for rule in RULES if engine in (None, rule.engine) and rule.applies(found)]


def notes(contents: Contents) -> list[str]:
    """What a user should know about loading an export of these; often nothing."""
    return [rule.note for rule in applying(contents)]


def engines(contents: Contents) -> str:
    """Engines that load it, each with what it needs or does otherwise in brackets; "" if there are none."""
    named = []
    for engine in ENGINES:
        rules = applying(contents, engine)
        shorts = ", ".join(dict.fromkeys(rule.short for rule in rules if rule.short))
        if all(rule.effect is not Effect.REFUSES for rule in rules):
            named.append(f"{engine} ({shorts})" if shorts else engine)
    return ", ".join(named)


@dataclass(frozen=True)
class Kind:
    """What engines choose a scheme for linears by."""

    weight: QuantizationSpec
    input: QuantizationSpec | None
    layout: str
    """Name of how the weight lies."""
    routed: bool


def kinds(found: Contents) -> list[Kind]:
    """Of the linears with a quantized weight, each kind once. ConfigError for what the format cannot hold."""
    alike = {(linear.weight, linear.input, linear.routed): linear for linear in found.weights}
    return [
        Kind(weight, given, layout_of(linear).name, routed)
        for (weight, given, routed), linear in alike.items()
        if weight is not None
    ]


def layouts(found: Contents) -> list[str]:
    """Of all weights, each once."""
    return list(dict.fromkeys(kind.layout for kind in kinds(found)))


def some(holds: Callable[[Kind], bool]) -> Callable[[Contents], bool]:
    """Whether there are linears of such a kind."""
    return lambda found: any(holds(kind) for kind in kinds(found))


def inside(found: Contents, *slots: str) -> list[QuantizationSpec]:
    """Specs of what is quantized in these slots of attention modules."""
    return [module.specs[slot] for module in found.attention.values() for slot in slots if slot in module.specs]


def cache(found: Contents) -> list[QuantizationSpec]:
    """Specs of keys and values."""
    return inside(found, "key", "value")


def fp8_cache(spec: QuantizationSpec, *qschemes: str) -> bool:
    return spec.dtype == "e4m3" and spec.symmetric and not spec.is_dynamic and spec.qscheme in qschemes


def unlike_fused(found: Contents) -> bool:
    """Whether linears that engines fuse are quantized in unlike ways."""
    return any(len({(linear.weight, linear.input) for linear in members}) > 1 for members in found.fused_linears())


def packed_affine(kind: Kind) -> bool:
    return kind.layout == PACKED and not kind.weight.symmetric


def packed_alone(kind: Kind) -> bool:
    return kind.layout == PACKED and kind.input is None


def packed_by_integers(kind: Kind) -> bool:
    inputs = kind.input
    if kind.layout != PACKED or inputs is None or not inputs.format.is_integer:
        return False
    return inputs.is_dynamic and inputs.symmetric and inputs.qscheme in ("per_token", "per_group")


def int4_by_fp8(kind: Kind) -> bool:
    weight, inputs = kind.weight, kind.input
    known = kind.layout == PACKED and weight.bits == 4 and weight.symmetric and weight.qscheme == "per_group"
    return known and inputs is not None and inputs.dtype == "e4m3" and inputs.qscheme == "per_token"


def hard_for_experts(kind: Kind) -> bool:
    return kind.routed and (not kind.weight.symmetric or kind.weight.qscheme == "per_block" or kind.layout == MXFP8)


def marlin(kind: Kind) -> bool:
    """Whether vLLM's usual kernel takes packed integers."""
    weight = kind.weight
    return weight.bits in ((4, 8) if weight.symmetric else (4,)) and weight.group_size in (None, 32, 64, 128)


def as_engines_multiply(kind: Kind) -> bool:
    """NVFP4; FP8 per tensor, channel or block; int8 by int8 in one product: symmetric weights of one scale per row,
    inputs per token or static."""
    weight, inputs = kind.weight, kind.input
    in_rows = weight.qscheme in ("per_channel", "per_tensor")
    if kind.layout == NVFP4:
        return inputs is None or inputs.scale_type == "e4m3"
    if kind.layout in (NAIVE, FLOAT):
        return (in_rows or weight.qscheme == "per_block") and not (inputs and inputs.format.is_integer)
    if kind.layout != INT or inputs is None:
        return False
    known = inputs.qscheme == ("per_token" if inputs.is_dynamic else "per_tensor")
    return in_rows and weight.symmetric and inputs.bits == 8 and known


def loads_in_vllm(kind: Kind) -> bool:
    """vLLM's own choice of a scheme."""
    packed = int4_by_fp8(kind) or packed_by_integers(kind) or packed_alone(kind)
    return packed or kind.layout in (MXFP4, MXFP8) or as_engines_multiply(kind)


def loads_in_sglang(kind: Kind) -> bool:
    """SGLang's choice for linears outside of experts."""
    return (packed_alone(kind) and kind.weight.bits in (4, 8)) or as_engines_multiply(kind)


CHOICE = "layers/quantization/compressed_tensors/compressed_tensors.py of {}, _get_scheme_from_parts"
VLLM, SGLANG = "vllm/model_executor/" + CHOICE.format("0.32"), "sglang/srt/" + CHOICE.format("0.5.23")
MEASURED = "measured with transformers 5.23 and compressed-tensors 0.20 on tiny models"
REFUSES, WRONG, OTHERWISE, LIMITED = Effect


RULES: tuple[Rule, ...] = (
    Rule("vLLM", REFUSES, some(lambda kind: not loads_in_vllm(kind) and kind.layout != MXFP6),
         "vLLM 0.33 knows no scheme for some of these weights and inputs together and does not load the model", VLLM),
    Rule("vLLM", REFUSES, some(lambda kind: kind.layout == MXFP6),
         "vLLM 0.33 cannot load MXFP6: it pins compressed-tensors 0.17, which knows no floats of 6 bits",
         "compressed-tensors 0.17.0, QuantizationArgs; tests/formats/test_versions.py"),
    Rule("vLLM", LIMITED, some(lambda kind: (packed_alone(kind) or packed_by_integers(kind)) and not marlin(kind)),
         "vLLM 0.33 runs packed integers of other widths than 4 and 8 bits, of other groups than 32, 64 and 128, and "
         "of other zero points than 4-bit ones through its Humming kernels only (compute capability 7.5 and later)",
         "vLLM #46389 and utils/marlin_utils.py of 0.32, query_marlin_supported_quant_types", "Humming"),
    Rule("vLLM", OTHERWISE, some(lambda kind: packed_by_integers(kind) and marlin(kind)),
         "vLLM 0.33 loads packed integers with integer inputs, but runs them without quantizing the inputs",
         "kernels/linear/mixed_precision of 0.32: of the kernels only Humming looks at the inputs' scheme, and Marlin "
         "and Machete are chosen before it", "inputs as they are"),
    Rule("vLLM", LIMITED, some(int4_by_fp8),
         "vLLM 0.33 runs int4 weights with FP8 inputs on compute capability 9.0 only, in groups of 128 and where "
         "inputs and outputs divide by 128", "schemes/compressed_tensors_w4a8_fp8.py of vLLM 0.32; kernels reported",
         "sm90"),
    Rule("vLLM", LIMITED, some(lambda kind: kind.layout == NVFP4 and kind.input is not None),
         "vLLM 0.33 quantizes the inputs of NVFP4 on compute capability 10.0 and later; elsewhere it leaves them as "
         "they are", VLLM, "inputs on sm100"),
    Rule("vLLM", LIMITED, some(lambda kind: kind.layout == MXFP4 and kind.input is not None),
         "vLLM 0.33 quantizes the inputs of MXFP4 on compute capability 10.0 and later with FlashInfer; elsewhere it "
         "leaves them as they are", "schemes/compressed_tensors_w4a4_mxfp4.py of vLLM 0.32", "inputs on sm100"),
    Rule("vLLM", OTHERWISE, some(lambda kind: kind.layout == MXFP4 and kind.input is None),
         "vLLM 0.33 quantizes the inputs of MXFP4 weights on compute capability 10.0 and later with FlashInfer, "
         "although this export leaves them as they are", "schemes/compressed_tensors_w4a4_mxfp4.py of vLLM 0.32",
         "W4A4 on sm100"),
    Rule("vLLM", OTHERWISE, some(lambda kind: kind.layout == MXFP8 and kind.input is None),
         "vLLM 0.33 quantizes the inputs of MXFP8 weights, although this export leaves them as they are", VLLM,
         "W8A8"),
    Rule("vLLM", REFUSES, lambda found: any(not fp8_cache(spec, "per_tensor", "per_channel") for spec in cache(found)),
         "vLLM quantizes its KV cache to symmetric FP8 only and does not load this one; transformers emulates it",
         "CompressedTensorsKVCacheMethod of vLLM 0.32"),
    Rule("vLLM", OTHERWISE, lambda found: bool(inside(found, "query")),
         "vLLM 0.33 passes over quantized queries and takes the scales of keys and values only",
         "CompressedTensorsConfig.from_config of vLLM 0.32", "not queries"),
    Rule("vLLM", WRONG, unlike_fused,
         "vLLM and SGLang fuse linears that are quantized in unlike ways here (q, k and v, or gate and up): they "
         "refuse the model or load it wrong", "find_matched_target of vLLM 0.32 and SGLang 0.5.23"),
    Rule("SGLang", REFUSES, some(lambda kind: not loads_in_sglang(kind)),
         "SGLang 0.5.23 does not load this: it takes packed integers of 4 and 8 bits without quantized inputs, INT8 "
         "and FP8 as engines multiply them, and NVFP4", SGLANG),
    Rule("SGLang", LIMITED, some(lambda kind: kind.layout == NVFP4 and kind.input is not None),
         "SGLang 0.5.23 quantizes the inputs of NVFP4 on compute capability 10.0 and later; elsewhere it leaves them "
         "as they are", SGLANG, "inputs on sm100"),
    Rule("SGLang", REFUSES, lambda found: bool(inside(found, "query")),
         "SGLang 0.5.23 does not load quantized queries: it wants weights in every config group",
         "_quantization_scheme_map_from_config of SGLang 0.5.23"),
    Rule("SGLang", OTHERWISE, lambda found: any(not fp8_cache(spec, "per_tensor") for spec in cache(found)),
         "SGLang 0.5.23 leaves all KV caches unquantized but FP8 with one static scale, with a warning",
         "CompressedTensorsKVCacheMethod.is_supported_scheme of SGLang 0.5.23", "not the cache"),
    Rule("transformers", WRONG, some(lambda kind: kind.layout == NVFP4 and kind.routed),
         "transformers 5.23 silently loads NVFP4 experts incorrectly (it ignores the global scale): use vLLM",
         MEASURED),
    Rule("transformers", REFUSES, some(hard_for_experts),
         "transformers 5.23 cannot load experts with zero points, FP8 blocks or MXFP8: use vLLM",
         MEASURED + "; transformers PR 47430 is open"),
    Rule("transformers", LIMITED, some(lambda kind: kind.layout in (NVFP4, MXFP4, MXFP6, MXFP8)),
         "transformers decodes FP4, FP6 and MX weights to bfloat16; load with dtype=torch.bfloat16 only",
         "tests/formats/test_transformers.py"),
    Rule("transformers", LIMITED, some(lambda kind: kind.layout == MXFP6),
         "transformers loads MXFP6 with compressed-tensors 0.20 and later only", "tests/formats/test_versions.py"),
    Rule("transformers", LIMITED, some(lambda kind: kind.layout == PACKED and bool(32 % kind.weight.bits)),
         "transformers loads packed weights of 3, 5, 6 and 7 bits with compressed-tensors 0.18 and later only: 0.17 "
         "packs them with gaps", "tests/formats/test_versions.py"),
    Rule("transformers", LIMITED, some(packed_affine),
         "transformers 5.23 and later load packed weights with zero points only with dequantize=True", MEASURED,
         "dequantize=True"),
    Rule("transformers", REFUSES, lambda found: len(layouts(found)) > 1 and some(packed_affine)(found),
         "transformers 5.23 and later cannot load packed zero points together with FP8 or another format: the default "
         "mode cannot load the one, dequantize=True not the other", MEASURED),
    Rule("transformers", LIMITED, lambda found: len(layouts(found)) > 1,
         "transformers 5.23 cannot load several formats with dequantize=True; the default mode can", MEASURED),
    Rule("transformers", LIMITED, lambda found: bool(cache(found)) or some(lambda kind: kind.input is not None)(found),
         "transformers 5.23 with dequantize=True silently leaves quantized activations and KV cache out; the default "
         "mode keeps them", MEASURED),
    Rule("transformers", OTHERWISE, lambda found: bool(cache(found)),
         "transformers 5.24 silently drops the quantization of keys, values and queries", "reported",
         "not the cache from 5.24 on"),
)  # fmt: skip

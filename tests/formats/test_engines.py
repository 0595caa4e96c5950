"""The table of what engines do: what is said of the schemes, that sentences have sources, that each rule can apply."""

import pytest
from native_runs import SCHEMES as KINDS
from native_runs import contents_of, spec

from fewbit.config.schemes import KV_CACHES, SCHEMES
from fewbit.config.spec import AttentionConfig
from fewbit.contents import nominal
from fewbit.formats import holding
from fewbit.formats.compressed_tensors import notes
from fewbit.formats.compressed_tensors.engines import ENGINES, RULES, Effect, applying, engines

SAID = {
    "W8A16": "vLLM, SGLang, transformers",
    "W3A16": "vLLM (Humming), transformers",
    "W2A16_ASYM": "vLLM (Humming), transformers (dequantize=True)",
    "W4A16_ASYM": "vLLM, SGLang, transformers (dequantize=True)",
    "W4A8": "vLLM (inputs as they are), transformers",
    "W4A4": "vLLM (inputs as they are), transformers",
    "W4AFP8": "vLLM (sm90), transformers",
    "MXFP6": "transformers",
    "MXFP4A16": "vLLM (W4A4 on sm100), transformers",
    "FP8_BLOCK": "vLLM, SGLang, transformers",
    "MX9": "",
}


@pytest.mark.parametrize("name", SAID)
def test_the_column_of_engines_says_what_is_known(name):
    found = nominal(SCHEMES[name])
    assert ", ".join(form.engines(found) for form in holding(found)) == SAID[name]


def test_a_cache_is_loaded_by_whom_it_is_said():
    def cache(how):
        return nominal(attention=AttentionConfig(key=how, value=how))

    assert engines(cache(KV_CACHES["KVFP8"])) == "vLLM, SGLang, transformers (not the cache from 5.24 on)"
    assert holding(cache(KV_CACHES["KV8"])) == []
    assert "vLLM" not in engines(cache(spec("int8", "per_tensor")))


def test_every_sentence_is_one_and_has_a_source_and_every_engine_a_rule():
    assert {rule.engine for rule in RULES} == set(ENGINES)
    for rule in RULES:
        assert rule.source
        assert rule.engine in rule.note
        assert not rule.note.endswith(".")
        assert "\n" not in rule.note
        assert isinstance(rule.effect, Effect)
    assert len({rule.note for rule in RULES}) == len(RULES)


FP8, HEADS = spec("e4m3", "per_tensor"), spec("e4m3", "per_channel")
ODD = {
    "int8 groups by int8": KINDS["W8A8, groups"][1],
    "affine int8 by int8": KINDS["W8A8, affine"][1],
    "int8 by FP8": KINDS["W8AFP8"][1],
    "FP8 groups": KINDS["FP8, weights only"][1],
}


@pytest.mark.parametrize("name", ODD)
def test_what_engines_have_no_scheme_for_is_said(name):
    config = ODD[name]
    inputs = {} if config.input_tensors is None else {"m.input": config.input_tensors}
    found = contents_of({"m.weight": config.weight}, inputs)
    assert not {"vLLM", "SGLang"} & set(engines(found).replace(",", "").split())
    assert any("does not load the model" in note for note in notes(found))


def test_every_rule_applies_to_something():
    """And none to everything."""
    cases = []
    for name, (_, config) in KINDS.items():
        for module in ("m", "mlp.experts.0.up_proj"):
            inputs = {} if config.input_tensors is None else {f"{module}.input": config.input_tensors}
            cases.append((name, contents_of({f"{module}.weight": config.weight}, inputs)))
    weights = {"m.weight": KINDS["W3A16_ASYM"][1].weight, "n.weight": KINDS["FP8, weights only"][1].weight}
    cases.append(("zero points and FP8", contents_of(weights)))
    fused = {"a.q_proj.weight": KINDS["W4A16"][1].weight, "a.k_proj.weight": KINDS["W8A16, channel"][1].weight}
    cases.append(("unlike", contents_of(fused)))
    for how in (FP8, HEADS, spec("int8", "per_tensor")):
        cases.append(("cache", contents_of({}, {"a.key": how, "a.value": how, "a.query": how})))
    applied = {name: applying(found) for name, found in cases}
    for rule in RULES:
        assert any(rule in rules for rules in applied.values()), rule.note
    assert applied["W4A16"] == []


def test_notes_on_fused_linears_that_are_unlike():
    weight = KINDS["W4A16"][1].weight
    parts = [f"a.{part}_proj.weight" for part in ("q", "k", "v")]
    assert notes(contents_of(dict.fromkeys(parts, weight))) == []
    assert any(
        "unlike ways" in note for note in notes(contents_of({parts[0]: weight, parts[1]: KINDS["NVFP4A16"][1].weight}))
    )

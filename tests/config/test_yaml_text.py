"""Whatever is written as YAML: plain data or one sentence, in seconds and in little memory."""

import resource
import time

import pytest

from fewbit.config.algorithms import algorithm_configs
from fewbit.config.recipe import Config
from fewbit.config.yaml_text import parse_yaml
from fewbit.errors import ConfigError


def bomb(levels: int, width: int = 9) -> str:
    nested = ["&a0 [x, x]"] + [f"&a{i} [{', '.join([f'*a{i - 1}'] * width)}]" for i in range(1, levels)]
    return f"seed: [{', '.join(nested)}]\n"


def bomb_of_tables(levels: int) -> str:
    """Anchors merged into tables."""
    tables = ["a0: &a0 {k: 1}"] + [
        f"a{i}: &a{i} {{x: [*a{i - 1}, *a{i - 1}], <<: *a{i - 1}}}" for i in range(1, levels)
    ]
    return "\n".join(tables)


HARMFUL = {
    "a bomb of lists": bomb(10),
    "a bomb of tables": bomb_of_tables(40),
    "an anchor in itself": "a: &a [*a]",
    "an anchor in itself, as a table": "a: &a {b: *a}",
    "an unknown anchor": "a: *nowhere",
    "lists without end": "a: " + "[" * 20_000,
    "tables without end": "{a: " * 20_000,
    "lists in blocks": "\n".join(" " * i + "-" for i in range(2000)),
    "a Python object": "a: !!python/object/apply:os.system [ls]",
    "a Python name": "a: !!python/name:os.system",
    "an unknown tag": "a: !mine 1",
    "no date": "a: 2026-13-45",
    "no number": "a: !!int abc",
    "no truth": "a: !!bool perhaps",
    "no time": "a: !!timestamp abc",
    "no bytes": "a: !!binary ä",
    "a huge number": "a: " + "9" * 5001,
    "a number with many digits": "a: " + "9" * 4500,
    "a number to the base of sixty": "a: " + "1:" * 100_000 + "1",
    "a key that is a list": "? [a]\n: 1",
    "two texts": "a: 1\n---\nb: 2",
    "a bell": "a: \a",
    "many values": "a: [" + "1," * 300_000 + "]",
    "a tab": "a:\n\t- b",
}


@pytest.mark.parametrize("text", HARMFUL.values(), ids=HARMFUL)
@pytest.mark.timeout(30)
def test_what_is_harmful_is_one_sentence(text):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started = time.process_time()
    with pytest.raises(ConfigError) as caught:
        parse_yaml(text, "recipe x.yaml")
    said = str(caught.value)
    assert said.startswith("recipe x.yaml")
    assert "\n" not in said
    assert len(said) < 600
    assert time.process_time() - started < 15
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300_000  # KiB


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("scheme: W4A16\nscheme: W8A16", r"'scheme' is given twice \(again in line 2\)"),
        ("calibration: {num_samples: 1, num_samples: 2}", "'num_samples' is given twice"),
        ('a: 1\n"a": 2', "'a' is given twice"),
        ("- {1: a, 1: b}", "1 is given twice"),
        ("&x a: 1\n*x : 2", "'a' is given twice"),
    ],
)
def test_a_field_that_is_given_twice_is_an_error(text, named):
    with pytest.raises(ConfigError, match=named):
        parse_yaml(text, "recipe")


def test_anchors_and_merges_of_ordinary_size_are_read():
    text = "base: &base {a: 1, b: 2}\nother: {<<: *base, b: 3}\nlist: [*base, *base]"
    found = parse_yaml(text, "recipe")
    assert found["other"] == {"a": 1, "b": 3}
    assert found["list"] == [{"a": 1, "b": 2}] * 2


@pytest.mark.parametrize(
    "text",
    ["gptq:drift=[", "gptq:drift=abc", "gptq:unknown=1", "gptq:drift", "gptq:=1", "gptq:drift=0.1,drift=0.2",
     "gptq:drift=*a", "gptq:drift=!!python/none", "gptq:drift=1e999", "gptq:block_size=" + "9" * 4400,
     "gptq:drift={a: 1}", "awq:n_grid=1000000000000000", "x" * 100_000, "+" * 1000, ":", "gptq:name=awq",
     "awq:alpha=.nan"],
)  # fmt: skip
def test_options_of_an_algorithm_that_are_none_are_one_sentence(text):
    with pytest.raises(ConfigError) as caught:
        algorithm_configs(text)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 600


@pytest.mark.parametrize(
    "fields",
    [{"seed": 2**64}, {"seed": -(2**63) - 1}, {"seed": "x"}, {"seed": 1e300}, {"seed": 10**4000},
     {"calibration": {"num_samples": 10**30}}, {"calibration": {"sequence_length": 10**30}},
     {"calibration": {"num_samples": 0}}, {"calibration": []}, {"group_size": 10.5}, {"exclude": [1]},
     {"exclude": {"a": 1}}, {"layer_quant_config": {"a": [1]}}, {"layer_quant_config": {1: "W4A16"}},
     {"layer_quant_config": {"a": {"weight": [1, 2]}}},
     {"attention": 5}, {"attention": {"key": {1: 2}}}, {"attention": {"nothing": {}}}, {"algo_config": [[1]]},
     {"algo_config": [{1: 2}]}, {"algo_config": {"name": ["gptq"]}}, {"x" * 10_000: 1}, {"scheme": ["W4A16"]},
     {"scheme": "x" * 10_000}, {"scheme": "W4\nA16"}, {"scheme": "W4A16-g" + "9" * 5000}, {"scheme": "W4A16-g٣"},
     {"layer_type_quant_config": {"Linear": {"weight": {"dtype": 4}}}}],
    ids=lambda fields: str(fields)[:40],
)  # fmt: skip
def test_fields_of_a_recipe_that_are_none_are_one_sentence(fields):
    with pytest.raises(ConfigError) as caught:
        Config.from_dict({"scheme": "W4A16"} | fields)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 1200

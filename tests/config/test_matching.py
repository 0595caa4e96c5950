import time

import pytest

from fewbit.config.matching import matching, resolve
from fewbit.config.recipe import Config
from fewbit.config.schemes import scheme_config
from fewbit.errors import ConfigError

MODULES = {f"model.layers.{i}.{name}": "Linear" for i in range(12) for name in ("attn.q", "attn.v", "mlp.down")}
MODULES["lm_head"] = "Head"

V1 = "model.layers.1.attn.v"
TYPE = {"layer_type_quant_config": {"Linear": "W8A16"}}
PATTERNS = {"layer_quant_config": {"*.v": "W3A16", "re:.*attn.*": "W2A16"}}
EXACT = {"layer_quant_config": PATTERNS["layer_quant_config"] | {V1: "W4A16_ASYM"}}


def rules(**fields) -> dict[str, str]:
    """{module: the rule that decided}, for a recipe with the scheme W4A16 and these fields."""
    return {name: match.rule for name, match in resolve(recipe(**fields), MODULES).items()}


def recipe(**fields) -> Config:
    return Config.from_dict({"scheme": "W4A16"} | fields)


class TestPrecedence:
    """Each test adds one stronger rule to the rules of the one before; the module is always the same."""

    def config_of_v1(self, **fields):
        return resolve(recipe(**fields), MODULES)[V1].config

    def test_global_applies_where_nothing_else_does(self):
        assert self.config_of_v1() == scheme_config("W4A16")
        assert set(rules().values()) == {"global"}

    def test_type_beats_global(self):
        assert self.config_of_v1(**TYPE) == scheme_config("W8A16")
        assert rules(**TYPE)["lm_head"] == "global"

    def test_pattern_beats_type(self):
        assert self.config_of_v1(**TYPE, **PATTERNS) == scheme_config("W3A16")

    def test_the_first_pattern_that_matches_wins(self):
        turned = dict(reversed(PATTERNS["layer_quant_config"].items()))
        assert self.config_of_v1(layer_quant_config=turned) == scheme_config("W2A16")
        assert self.config_of_v1(**PATTERNS) == scheme_config("W3A16")

    def test_exact_name_beats_patterns_that_stand_before_it(self):
        assert self.config_of_v1(**TYPE, **EXACT) == scheme_config("W4A16_ASYM")

    @pytest.mark.parametrize("pattern", [V1, "*.v", "re:.*\\.1\\..*"])
    def test_exclude_beats_all(self, pattern):
        assert self.config_of_v1(**TYPE, **EXACT, exclude=[pattern]) is None

    def test_each_module_says_which_rule_decided(self):
        found = rules(**TYPE, **EXACT, exclude=["*.2.*", "lm_head"])
        assert found[V1] == "exact name"
        assert found["model.layers.2.attn.v"] == "exclude '*.2.*'"
        assert found["model.layers.3.attn.v"] == "pattern '*.v'"
        assert found["model.layers.3.attn.q"] == "pattern 're:.*attn.*'"
        assert found["model.layers.3.mlp.down"] == "type Linear"
        assert found["lm_head"] == "exclude 'lm_head'"


def test_every_module_is_resolved_in_the_order_given():
    assert list(resolve(recipe(), MODULES)) == list(MODULES)


@pytest.mark.parametrize(
    ("pattern", "name", "expected"),
    [
        ("lm_head", "lm_head", True),
        ("lm_head", "model.lm_head", False),
        ("*.v", V1, True),
        ("*.V", V1, False),
        ("model.layers.?.attn.v", V1, True),
        ("model.layers.?.attn.v", "model.layers.11.attn.v", False),
        ("model.layers.[01].*", V1, True),
        ("attn", V1, False),
        ("re:.*attn.*", V1, True),
        ("re:attn", V1, False),
        (r"re:model\.layers\.(0|1)\..*", V1, True),
        (r"re:model\.layers\.1\.", V1, False),
        (r"re:model.layers.1[01]?.attn.v", "model.layers.10.attn.v", True),
    ],
)
def test_wildcards_and_regular_expressions_cover_the_whole_name(pattern, name, expected):
    assert (name in matching(pattern, [name])) is expected


@pytest.mark.parametrize("pattern", ["model.layers.1.attn.w", "*.vv", "re:attn", "re:.*expert.*"])
@pytest.mark.parametrize("field", ["exclude", "layer_quant_config"])
def test_a_pattern_that_matches_nothing_is_an_error_that_names_it(field, pattern):
    value = [pattern] if field == "exclude" else {pattern: "W8A16"}
    with pytest.raises(ConfigError, match=field) as caught:
        resolve(recipe(**{field: value}), MODULES)
    assert repr(pattern) in str(caught.value)
    assert len(str(caught.value)) < 500


def test_one_useless_pattern_beside_useful_ones_is_an_error():
    with pytest.raises(ConfigError, match=r"'\*\.vv' matches no module"):
        resolve(recipe(exclude=["*.v", "*.vv", "lm_head"]), MODULES)


def test_a_misspelt_name_is_answered_with_the_nearest():
    with pytest.raises(ConfigError, match="did you mean 'lm_head'"):
        resolve(recipe(exclude=["lm_haed"]), MODULES)


def test_a_type_that_no_module_has_is_an_error_that_names_the_nearest():
    with pytest.raises(ConfigError, match=r"no module is of class 'Liner'.*did you mean 'Linear'"):
        resolve(recipe(layer_type_quant_config={"Liner": "W8A16"}), MODULES)


@pytest.mark.parametrize("field", ["exclude", "layer_quant_config"])
def test_a_broken_regular_expression_is_an_error_that_names_it(field):
    value = ["re:(attn"] if field == "exclude" else {"re:(attn": "W8A16"}
    with pytest.raises(ConfigError, match=r"'re:\(attn' is not a regular expression"):
        resolve(recipe(**{field: value}), MODULES)


NAMES = [f"model.layers.{block}.self_attn.q_proj" for block in range(40)]


@pytest.mark.parametrize(
    "pattern",
    ["re:(a|aa)+b", "re:(((a{1000}){1000}){1000})", "re:" + "(" * 900 + ")" * 900, "re:a{99999999999}",
     "re:" + "x" * 5000, "re:[", "re:(?P<a>x)(?P<a>y)", "re:(?<n>a)", "re:(?1)"],
)  # fmt: skip
@pytest.mark.timeout(30)
def test_patterns_that_are_none_or_never_end_are_one_sentence(pattern):
    started = time.process_time()
    with pytest.raises(ConfigError, match="pattern") as caught:
        matching(pattern, [*NAMES, "a" * 100])
    assert time.process_time() - started < 10
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize(
    "pattern",
    ["*a" * 100 + "b", "*[a-z]" * 100 + "!", "[", "[z-a]", "*" * 1000 + "!", "re:([a-z_.0-9]|[a-z]|_)+!",
     "re:" + "(.*)" * 60 + "!", "re:(.*)*!", "re:(a?){50}a{101}"],
)  # fmt: skip
@pytest.mark.timeout(30)
def test_patterns_that_try_much_end(pattern):
    assert matching(pattern, [*NAMES, "a" * 100]) == set()


@pytest.mark.parametrize(
    ("pattern", "name"),
    [(r"re:model\.layers\.\d{1,2}\..*q_proj", NAMES[12]), ("re:^(?!other).*$", NAMES[0]), ("re:a{e}", "a{e}"),
     (r"re:(\w)\1{2}", "aaa"), ("re:[[]x", "[x"), (r"re:\{\}", "{}")],
)  # fmt: skip
def test_expressions_mean_what_they_mean_to_python(pattern, name):
    assert matching(pattern, [name, "other"]) == {name}

"""Every reader finds the same group for every linear, whatever it looks at first; what is fused shares scales."""

import itertools
import json
import re

import pytest
import torch
from native_runs import BLOCKS, LINEARS, SCHEMES, contents_of, spec
from test_compressed_tensors import CACHES, FORMAT

import fewbit
from fewbit.checkpoint.native import NativeCheckpoint
from fewbit.errors import ConfigError
from fewbit.formats import export
from fewbit.formats.compressed_tensors import check
from fewbit.formats.compressed_tensors.config import quantization_config
from fewbit.formats.compressed_tensors.targets import FUSED, patterns

NAMES = [f"model.layers.{block}.{linear}" for block in range(12) for linear in LINEARS]
FUSES = {"qkv_proj": FUSED["qkv_proj"], "gate_up_proj": FUSED["gate_up_proj"]}


def config_of(kinds, ignore=("lm_head",)):
    """The config of linears of NAMES by a function from a name to one of SCHEMES, or None: left as it is."""
    chosen = {name: SCHEMES[kind][1] for name in NAMES if (kind := kinds(name)) is not None}
    weights = {f"{name}.weight": found.weight for name, found in chosen.items()}
    inputs = {f"{name}.input": found.input_tensors for name, found in chosen.items() if found.input_tensors}
    left = [name for name in NAMES if name not in chosen]
    return quantization_config(contents_of(weights, inputs, unquantized=[*left, *ignore]))


def matches(name, target):
    return re.match(target[3:], name) is not None if target.startswith("re:") else name == target


def by_name(name, targets):
    return next((target for target in targets if matches(name, target)), None)


def by_class(name, targets):
    """Readers have several classes of linears and look whether the target is part of the class's name."""
    return next((target for target in targets if target.lower() in "qkvparallellinear"), None)


def by_parts(name, targets):
    owner, _, last = name.rpartition(".")
    found = [by_name(f"{owner}.{part}", targets) for part in FUSES.get(last, ())]
    return found[0] if found and all(found) else None


ORDERS = [(by_name, by_class, by_parts), (by_name, by_parts, by_class)]  # SGLang's and vLLM's


def group_of(config, name, order):
    """Number of the config group in which a reader finds a linear of its own, fused or not; None: not quantized."""
    owner, _, last = name.rpartition(".")
    parts = [f"{owner}.{part}" for part in FUSES.get(last, (last,))]
    ignored = {any(matches(part, target) for target in config["ignore"]) for part in parts}
    assert len(ignored) == 1, "readers refuse linears of which a part is quantized"
    if ignored == {True}:
        return None
    targets = {t: number for number, group in enumerate(config["config_groups"].values()) for t in group["targets"]}
    return targets[next(filter(None, (look(name, targets) for look in order)))]


def read_names():
    """Linears as a reader has them."""
    fused = {part: name for name, parts in FUSES.items() for part in parts}
    for name in NAMES:
        owner, _, last = name.rpartition(".")
        yield f"{owner}.{fused.get(last, last)}", name


MIXTURES = {
    "mlp": lambda name: "W8A16, channel" if ".mlp." in name else "W4A16",
    "one layer": lambda name: "FP8_DYNAMIC" if ".layers.1." in name else "W4A16",
    "first and last": lambda name: "W8A8" if re.search(r"layers\.(0|11)\.", name) else "NVFP4",
    "down": lambda name: "MXFP8" if name.endswith("down_proj") and int(name.split(".")[2]) % 3 else "W4A16",
    "three": lambda name: "W4A16" if "attn" in name else None if ".layers.1." in name else "W8A8",
    "one": lambda name: "W4A16" if ".layers.10." not in name else None,
}


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("mixture", MIXTURES)
def test_every_order_of_looking_finds_the_scheme_of_the_run(mixture, order):
    kinds = MIXTURES[mixture]
    config = config_of(kinds)
    for read, stored in read_names():
        number = group_of(config, read, order)
        wanted = kinds(stored)
        assert (number is None) == (wanted is None)
        if number is not None:
            group = list(config["config_groups"].values())[number]
            assert group["format"] == SCHEMES[wanted][0]
            assert (group["weights"]["num_bits"], group["weights"]["type"]) == (
                SCHEMES[wanted][1].weight.bits,
                "int" if SCHEMES[wanted][1].weight.format.is_integer else "float",
            )
    if len(config["config_groups"]) > 1:
        assert not any(target == "Linear" for group in config["config_groups"].values() for target in group["targets"])


def test_patterns_match_their_members_and_nothing_else():
    for number in range(1, 2**7 - 1):
        kinds = [linear for bit, linear in enumerate(LINEARS) if number >> bit & 1]
        members = {
            name for name in NAMES if any(name.endswith(kind) for kind in kinds) and int(name.split(".")[2]) % 2
        }
        found = patterns(members)
        assert {name for name in NAMES if by_name(name, found)} == members
        for near in ("model.layers.1.mlp.down_proj_2", "draft.model.layers.1.mlp.down_proj", "model.layers.111.mlp.x"):
            assert by_name(near, found) is None
        assert len(found) <= 2


def test_patterns_of_experts_are_few():
    members = [
        f"model.layers.{b}.mlp.experts.{e}.{p}" for b in range(3, 40) for e in range(64) for p in ("up_proj", "w")
    ]
    members += [
        f"model.layers.{b}.mlp.experts.{e}.down_proj" for b in range(3, 40) for e in range(64) if (b, e) != (9, 7)
    ]
    found = patterns(members)
    assert len(found) <= 3
    assert all(by_name(name, found) for name in members)
    assert by_name("model.layers.9.mlp.experts.7.down_proj", found) is None
    assert by_name("model.layers.2.mlp.experts.7.up_proj", found) is None


def test_names_that_vllm_gives_to_the_text_model_of_a_vision_model_are_matched_too():
    found = patterns(["model.language_model.layers.0.mlp.up_proj"])
    assert by_name("language_model.model.layers.0.mlp.up_proj", found)
    assert not by_name("model.visual.layers.0.mlp.up_proj", found)


def test_a_quantized_query_is_a_group_of_one_attention_class(native, tmp_path):
    run = native("W4A16", torch.float32, CACHES["query"])
    config = json.loads((export(run, FORMAT, tmp_path / "out") / "config.json").read_text())["quantization_config"]
    without = [group for group in config["config_groups"].values() if not group.get("weights")]
    assert [group["targets"] for group in without] == [["LlamaAttention"]]


def test_queries_of_two_classes_are_two_groups_and_half_a_class_is_refused():
    flows = {f"{module}.{slot}": CACHES["query"][slot] for module in ("a", "b", "c") for slot in CACHES["query"]}
    classes = {"a": "OneAttention", "b": "TwoAttention", "c": "OneAttention"}
    config = quantization_config(contents_of({}, flows, classes=classes))
    assert [group["targets"] for group in config["config_groups"].values()] == [["OneAttention"], ["TwoAttention"]]
    del flows["c.query"]
    with pytest.raises(ConfigError, match="quantize all or none"):
        check(contents_of({}, flows, classes=classes))


@pytest.mark.parametrize("algorithm", ["rtn", "gptq"])
def test_fp8_per_tensor_has_one_scale_for_what_engines_fuse(checkpoint, quick, tmp_path, algorithm):
    settings = quick | {"scheme": "FP8", "group_size": None, "algorithm": algorithm}
    run = fewbit.quantize(checkpoint("llama"), output=tmp_path / "run", **settings)
    made = NativeCheckpoint(run.directory)
    flows = made.activations()
    for block, parts in itertools.product(range(BLOCKS), FUSES.values()):
        owner = f"model.layers.{block}.{'self_attn' if 'q_proj' in parts else 'mlp'}"
        scales = {float(made.read_quantized(f"{owner}.{part}.weight").scale) for part in parts}
        assert len(scales) == 1
        assert len({float(flows[f"{owner}.{part}.input"].scale) for part in parts}) == 1
    run.export(FORMAT)
    assert run.verify()[0].quantized == 14


def test_blocks_that_do_not_end_where_fused_linears_do_are_refused_before_the_work(checkpoint, quick, tmp_path):
    settings = quick | {"scheme": "FP8_BLOCK", "group_size": None}  # 64 rows, blocks of 128; inputs in groups of 128
    weight = {"dtype": "e4m3", "qscheme": "per_block", "block_size": [128, 64]}
    del settings["scheme"], settings["group_size"]
    with pytest.raises(ConfigError, match=r"blocks of 128 rows do not divide the 64 of .*q_proj"):
        fewbit.quantize(
            checkpoint("llama"),
            output=tmp_path / "run",
            config={"global_quant_config": {"weight": weight}},
            export=[FORMAT],
            **settings,
        )
    assert not (tmp_path / "run").exists()


def test_the_last_of_fused_linears_may_end_within_a_block():
    block = spec("e4m3", "per_block", block_size=(128, 128))
    weights = {f"a.{part}_proj.weight": block for part in ("q", "k", "v", "gate", "up")}
    rows = {"q": 256, "k": 128, "v": 64, "gate": 256, "up": 100}
    shapes = {f"a.{part}_proj.weight": (n, 256) for part, n in rows.items()}
    check(contents_of(weights, None, shapes))
    check(
        contents_of({"a.k_proj.weight": block}, None, {"a.k_proj.weight": (64, 64)})
    )  # fused with nothing that is quantized
    with pytest.raises(ConfigError, match=r"the 100 of 'a\.gate_proj\.weight'.*'a\.up_proj'.*FP8_DYNAMIC"):
        check(contents_of(weights, None, shapes | {"a.gate_proj.weight": (100, 256)}))
    experts = {f"mlp.experts.0.{part}_proj.weight": block for part in ("gate", "up")}
    with pytest.raises(ConfigError, match=r"the 100 of 'mlp\.experts\.0\.up_proj"):
        check(contents_of(experts, None, {name: shapes[name.replace("mlp.experts.0.", "a.")] for name in experts}))

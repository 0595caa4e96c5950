"""From a checkpoint to a finished run, on tiny models."""

import json
import logging
import shutil

import pytest
import torch
from transformers import GenerationConfig

import fewbit
from fewbit.calibration.tokens import calibration_set
from fewbit.checkpoint.native import NativeCheckpoint
from fewbit.checkpoint.source import SafetensorsSource
from fewbit.config.recipe import Config
from fewbit.errors import CalibrationError, ConfigError, RunError
from fewbit.models.blockwise import BlockwiseModel
from fewbit.runs.progress import setup_logging

ALGORITHMS = ["rtn", "gptq"]
TOKENS = 8 * 32


def report_of(run):
    return json.loads((run / "report.json").read_text(encoding="utf-8"))


def codes_of(run):
    checkpoint = NativeCheckpoint(run)
    return {name: checkpoint.read_quantized(name) for name in checkpoint.quantized}


def assert_same_weights(run, other):
    ours, others = codes_of(run), codes_of(other)
    assert list(ours) == list(others)
    for name in ours:
        assert torch.equal(ours[name].codes, others[name].codes), name
        assert torch.equal(ours[name].scale, others[name].scale), name


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_every_linear_appears_in_the_report_with_what_became_of_it(finished_run, checkpoint, family, algorithm):
    report = report_of(finished_run(family, algorithm=algorithm))
    model = BlockwiseModel.from_directory(checkpoint(family))
    rows = {row["name"]: row for row in report["linears"]}
    assert set(rows) == set(model.linears())
    assert len(rows) == len(report["linears"])
    for name, row in rows.items():
        assert row["weights"] == model.linears()[name].weight.numel()
        if name == "lm_head":
            assert (row["status"], row["reason"]) == ("skipped", "outside the blocks' groups")
            continue
        assert row["status"] == "quantized"
        assert f".{row['block']}." in name
        assert row["tokens"] == TOKENS
        assert 0 < row["loss"] < 0.1
        assert row["loss"] == pytest.approx(row["error"] / row["energy"])
        assert row["bits_per_weight"] == 4 + 32 / 32
        assert row["seconds"] >= 0
        assert row["fallback"] is None
        assert (row["damping"] is None) == (algorithm == "rtn")


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_the_report_has_totals_environment_and_recipe(finished_run, checkpoint, quick, family, algorithm):
    report = report_of(finished_run(family, algorithm=algorithm))
    rows = [row for row in report["linears"] if row["status"] == "quantized"]
    totals = report["totals"]
    assert totals["linears"] == {"quantized": len(rows), "skipped": 1}
    assert totals["fallbacks"] == 0
    assert totals["bits_per_weight"] == 5
    assert totals["loss"] == pytest.approx(sum(row["error"] for row in rows) / sum(row["energy"] for row in rows))
    assert set(totals["seconds"]) == {"prepare", "blocks", "total"}
    assert totals["peak_memory_bytes"] > 10**8
    assert report["environment"]["torch"] == torch.__version__
    assert {"fewbit", "python", "transformers", "platform", "threads"} <= set(report["environment"])
    assert report["warnings"] == []
    recipe = Config.from_dict(report["recipe"])
    assert [config.name for config in recipe.algo_config] == [algorithm]
    assert recipe.global_quant_config.weight.group_size == 32
    run = report["run"]
    assert run["model"] == str(checkpoint(family))
    assert run["calibration"] == {"source": "calibration.txt", "sequences": 8, "requested": 8, "tokens": TOKENS}
    assert run["blocks"] == max(row["block"] for row in rows) + 1
    assert run["forward"] == "staged"


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize(
    ("family", "name"),
    [
        ("llama", "model.layers.0.self_attn.q_proj"),
        ("llama", "model.layers.1.mlp.down_proj"),
        ("qwen2", "model.layers.1.self_attn.o_proj"),
        ("gemma3_text", "model.layers.6.mlp.gate_proj"),
    ],
)
def test_the_reported_loss_is_that_of_the_outputs(
    finished_run, checkpoint, dequantized, calibration_file, tokenizer, family, name, algorithm
):
    # the input of a linear depends on quantized weights before it only, so the finished model shows it again
    run = finished_run(family, algorithm=algorithm)
    model = dequantized(run)
    inputs = []
    model.get_submodule(name).register_forward_pre_hook(lambda _module, args: inputs.append(args[0].flatten(0, 1)))
    data = calibration_set(calibration_file, tokenizer, 8, 32, seed=0)
    with torch.no_grad():
        for batch in data.batches:
            model(**batch)
    x = torch.cat(inputs).double()
    weight = SafetensorsSource(checkpoint(family)).read([f"{name}.weight"])[f"{name}.weight"].double()
    delta = model.get_submodule(name).weight.detach().double() - weight
    (row,) = [row for row in report_of(run)["linears"] if row["name"] == name]
    assert row["tokens"] == x.shape[0]
    assert row["energy"] == pytest.approx((x @ weight.T).square().sum().item(), rel=1e-3)
    assert row["error"] == pytest.approx((x @ delta.T).square().sum().item(), rel=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_not_quantized_is_kept_bit_for_bit(finished_run, checkpoint, family, dtype):
    source = SafetensorsSource(checkpoint(family, dtype))
    run = NativeCheckpoint(finished_run(family, dtype))
    assert set(run.info()) == set(source.info())
    dense = set(run.info()) - set(run.quantized)
    assert any(name.endswith("norm.weight") for name in dense)
    assert any(name.endswith(".bias") for name in dense) == (family == "qwen2")
    ours, theirs = run.read(dense), source.read(dense)
    for name in dense:
        assert ours[name].dtype == theirs[name].dtype == dtype
        assert torch.equal(ours[name], theirs[name]), name


def test_scales_have_the_dtype_of_the_checkpoint(finished_run):
    assert {weight.scale.dtype for weight in codes_of(finished_run("llama", torch.bfloat16)).values()} == {
        torch.bfloat16
    }


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_more_bits_lose_less(finished_run, algorithm):
    losses = [
        report_of(finished_run("llama", algorithm=algorithm, scheme=scheme))["totals"]["loss"]
        for scheme in ("W8A16", "W4A16", "W3A16", "W2A16")
    ]
    assert losses == sorted(losses)
    assert losses[0] < 1e-3 < losses[-1]


@pytest.mark.parametrize(("family", "algorithm"), [("llama", "rtn"), ("llama", "gptq"), ("qwen3", "gptq")])
def test_the_same_inputs_give_the_same_bytes(finished_run, checkpoint, quick, files_of, tmp_path, family, algorithm):
    again = fewbit.quantize(checkpoint(family), output=tmp_path / "again", **quick | {"algorithm": algorithm})
    assert files_of(again.directory) == files_of(finished_run(family, algorithm=algorithm))


@pytest.mark.parametrize(
    ("family", "algorithm", "memory"),
    [
        ("llama", "gptq", 0),
        ("llama", "gptq", "40KB"),  # some batches in memory, some on disk
        ("mistral", "rtn", 0),
        ("qwen2", "rtn", "40KB"),
        ("qwen3", "gptq", 0),
        ("gemma3_text", "rtn", 0),
    ],
)
def test_hidden_states_on_disk_and_replay_give_the_same_bytes(
    finished_run, checkpoint, quick, files_of, tmp_path, family, algorithm, memory
):
    arguments = quick | {"algorithm": algorithm, "num_samples": 70}  # two batches
    on_disk = fewbit.quantize(checkpoint(family), output=tmp_path / "run", activation_memory=memory, **arguments)
    assert on_disk.report["run"]["forward"] == "replay"
    in_memory = finished_run(family, algorithm=algorithm, num_samples=70)
    assert report_of(in_memory)["run"]["forward"] == "staged"
    assert files_of(on_disk.directory) == files_of(in_memory)
    assert not (on_disk.directory / "work").exists()


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_module_in_memory_gives_the_codes_of_its_checkpoint(
    finished_run, random_model, tokenizer, quick, tmp_path, family, algorithm
):
    module = random_model(family)
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    run = fewbit.quantize(
        module, output=tmp_path / "run", tokenizer=tokenizer, **quick | {"algorithm": algorithm}
    ).directory
    assert_same_weights(run, finished_run(family, algorithm=algorithm))
    assert all(torch.equal(before[name], tensor) for name, tensor in module.state_dict().items())
    assert (run / "config.json").exists()
    assert (run / "tokenizer.json").exists()


def test_a_sharded_checkpoint_gives_the_same_bytes_as_a_single_file(
    finished_run, checkpoint, quick, files_of, tmp_path
):
    sharded = fewbit.quantize(checkpoint("llama", sharded=True), output=tmp_path / "run", **quick)
    assert files_of(sharded.directory) == files_of(finished_run("llama"))


def test_a_run_holds_what_its_model_needs_besides_weights(finished_run, checkpoint):
    run, source = finished_run("llama"), checkpoint("llama")
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        assert (run / name).read_bytes() == (source / name).read_bytes()
    assert not list(run.rglob("*.partial"))


def test_another_seed_chooses_other_text_and_gives_other_codes(finished_run):
    one, other = (codes_of(finished_run("llama", algorithm="gptq", seed=seed)) for seed in (0, 1))
    assert any(not torch.equal(one[name].codes, other[name].codes) for name in one)


def test_rtn_without_calibration_quantizes_every_linear(finished_run, checkpoint, family):
    run = finished_run(family, calibration="none")
    rows = [row for row in report_of(run)["linears"] if row["status"] == "quantized"]
    assert {row["tokens"] for row in rows} == {0}
    assert report_of(run)["run"]["calibration"] == {"source": "none", "sequences": 0, "tokens": 0}
    source = SafetensorsSource(checkpoint(family))
    for row in rows:  # without data the loss is that of the weights
        name = f"{row['name']}.weight"
        weight = source.read([name])[name].double()
        delta = NativeCheckpoint(run).read([name])[name].double() - weight
        assert row["loss"] == pytest.approx((delta.square().sum() / weight.square().sum()).item(), rel=1e-4)


def test_gptq_without_calibration_is_an_error_before_anything_is_written(checkpoint, quick, tmp_path):
    arguments = quick | {"algorithm": "gptq", "calibration": "none"}
    with pytest.raises(ConfigError, match="gptq needs calibration data; use --algorithm rtn"):
        fewbit.quantize(checkpoint("llama"), output=tmp_path / "run", **arguments)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_padding_counts_neither_as_tokens_nor_in_the_codes(checkpoint, quick, tmp_path, algorithm):
    ids = torch.randint(304, (4, 24), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[:, 20:] = 0
    other = torch.where(mask.bool(), ids, 7)
    arguments = quick | {"algorithm": algorithm}
    runs = [
        fewbit.quantize(
            checkpoint("llama"),
            output=tmp_path / str(number),
            **arguments | {"calibration": [{"input_ids": batch, "attention_mask": mask}]},
        )
        for number, batch in enumerate((ids, other))
    ]
    assert {row["tokens"] for row in runs[0].report["linears"] if "tokens" in row} == {4 * 20}
    assert_same_weights(runs[0].directory, runs[1].directory)


@pytest.mark.parametrize("kind", ["opt", "phi"])
def test_padding_is_left_out_of_a_detected_family_too(random_model, quick, tmp_path, kind):
    extra = {"ffn_dim": 128, "word_embed_proj_dim": 64} if kind == "opt" else {}
    mask = torch.ones(4, 24, dtype=torch.int64)
    mask[:, 20:] = 0
    batch = {"input_ids": torch.arange(96).view(4, 24), "attention_mask": mask}
    run = fewbit.quantize(random_model(kind, **extra), output=tmp_path / "run", **quick | {"calibration": [batch]})
    assert {row["tokens"] for row in run.report["linears"] if "tokens" in row} == {4 * 20}


def test_calibration_may_be_texts_or_token_ids(finished_run, checkpoint, quick, calibration_file, tokenizer, tmp_path):
    data = calibration_set(calibration_file, tokenizer, 8, 32, seed=0)
    ids = torch.cat([batch["input_ids"] for batch in data.batches])
    texts = [calibration_file.read_text(encoding="utf-8")]
    for name, calibration in (("ids", ids), ("texts", texts)):
        run = fewbit.quantize(checkpoint("llama"), output=tmp_path / name, **quick | {"calibration": calibration})
        assert_same_weights(run.directory, finished_run("llama"))


def test_a_recipe_mixes_specs_and_what_is_excluded_is_reported_with_the_reason(checkpoint, quick, tmp_path):
    affine = {"dtype": "uint3", "qscheme": "per_channel", "symmetric": False}
    config = {
        "scheme": "W4A16",
        "group_size": 32,
        "layer_quant_config": {"*.down_proj": {"weight": affine}},
        "exclude": ["model.layers.0.self_attn.*", "lm_head"],
    }
    arguments = {key: value for key, value in quick.items() if key not in ("scheme", "group_size")}
    run = fewbit.quantize(checkpoint("llama"), output=tmp_path / "run", config=config, **arguments)
    rows = {row["name"]: row for row in run.report["linears"]}
    excluded = {name for name, row in rows.items() if row["status"] == "excluded"}
    assert excluded == {"lm_head", *(f"model.layers.0.self_attn.{name}_proj" for name in "qkvo")}
    assert rows["model.layers.0.self_attn.o_proj"]["reason"] == "exclude 'model.layers.0.self_attn.*'"
    assert rows["model.layers.1.mlp.down_proj"]["bits_per_weight"] == 3 + (32 + 3) / 128
    assert run.report["totals"]["linears"] == {"quantized": 10, "excluded": 5}
    totals = sum(row["bits_per_weight"] * row["weights"] for row in rows.values() if row["status"] == "quantized")
    weights = sum(row["weights"] for row in rows.values() if row["status"] == "quantized")
    assert run.report["totals"]["bits_per_weight"] == pytest.approx(totals / weights)


@pytest.mark.parametrize(
    ("algorithm", "tokens", "warned"), [("gptq", 8, True), ("gptq", 4096, False), ("rtn", 8, False)]
)
def test_too_little_text_for_gptq_is_said(checkpoint, tmp_path, algorithm, tokens, warned):
    ids = torch.randint(0, 64, (1, tokens), generator=torch.Generator().manual_seed(0)).view(-1, 8)
    options = {"algorithm": algorithm, "group_size": 32, "progress": False}
    run = fewbit.quantize(checkpoint("llama"), "W4A16", calibration=ids, output=tmp_path / "run", **options)
    assert any("calibration tokens are fewer" in warning for warning in run.report["warnings"]) == warned


def test_warnings_of_the_plan_are_in_the_report(checkpoint, quick, tmp_path):
    arguments = {key: value for key, value in quick.items() if key not in ("scheme", "group_size")}
    config = {"scheme": "W4A16", "group_size": 32, "layer_quant_config": {"*.v_proj": "W8A16"}}
    run = fewbit.quantize(checkpoint("llama"), output=tmp_path / "run", config=config, **arguments)
    assert len(run.report["warnings"]) == 1


def test_the_log_has_every_layers_error(checkpoint, quick, tmp_path):
    before = list(logging.getLogger("fewbit").handlers)
    for _ in range(2):  # a notebook's cell that runs again writes no line twice
        setup_logging(tmp_path / "deep" / "log.txt")
    try:
        run = fewbit.quantize(checkpoint("llama"), output=tmp_path / "run", **quick)
    finally:
        for handler in set(logging.getLogger("fewbit").handlers) - set(before):
            handler.close()
            logging.getLogger("fewbit").removeHandler(handler)
    log = (tmp_path / "deep" / "log.txt").read_text(encoding="utf-8")
    for row in run.report["linears"]:
        assert log.count(f"{row['name']} loss ") == (row["status"] == "quantized")
    with pytest.raises(RunError, match="cannot be written"):
        setup_logging(tmp_path)


def test_a_damaged_weight_stops_the_run_and_is_named(llama, quick, tmp_path):
    from safetensors.torch import load_file, save_file

    name = "model.layers.1.mlp.up_proj.weight"
    tensors = load_file(llama / "model.safetensors")
    tensors[name][3, 4] = torch.nan
    save_file(tensors, llama / "model.safetensors", {"format": "pt"})
    with pytest.raises(fewbit.FewbitError, match=f"'{name}' holds 1 NaN"):
        fewbit.quantize(llama, output=tmp_path / "run", **quick)


def test_a_run_can_be_read_after_it_was_moved(finished_run, tmp_path):
    original = finished_run("llama")
    moved = shutil.copytree(original, tmp_path / "moved")
    assert_same_weights(original, moved)


def test_a_block_that_gives_no_numbers_is_named_with_the_sequence(random_model, quick, tmp_path):
    model = random_model("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.fill_(3e38)  # its input is finite, its output is not
    ids = torch.randint(5, 300, (3, 16), generator=torch.Generator().manual_seed(0))
    with pytest.raises(CalibrationError, match=r"block 'model.layers.1' gives NaN or infinity .*of sequence 0\)"):
        fewbit.quantize(model, output=tmp_path / "run", **quick | {"calibration": [ids[:1], ids[1:]]})


def test_a_generation_config_that_cannot_be_saved_is_mended_and_said(llama, quick, tmp_path, caplog):
    (llama / "generation_config.json").write_text(json.dumps({"do_sample": False, "temperature": 0.6, "top_p": 0.9}))
    run = fewbit.quantize(llama, output=tmp_path / "run", **quick)
    assert any("do_sample is on" in warning for warning in run.report["warnings"])
    assert "do_sample is on" in caplog.text
    for directory in (run.directory, run.export("compressed-tensors")):
        mended = GenerationConfig.from_pretrained(directory)
        mended.validate(strict=True)
        assert (mended.do_sample, mended.temperature, mended.top_p) == (True, 0.6, 0.9)
    run.verify()


def test_a_generation_config_that_can_be_saved_is_copied_as_it_is(llama, quick, tmp_path):
    text = '{"eos_token_id": [2, 7],\n "own": 1}'
    (llama / "generation_config.json").write_text(text)
    run = fewbit.quantize(llama, output=tmp_path / "run", **quick)
    assert (run.directory / "generation_config.json").read_text() == text


def test_a_warning_is_shown_once(llama, quick, tmp_path, capfd):
    (llama / "model.gguf").write_bytes(b"GGUF")
    (llama / "own.safetensors.index.json").write_text("{}")
    fewbit.quantize(llama, output=tmp_path / "run", **quick | {"progress": True})
    assert capfd.readouterr().err.count("left behind") == 1

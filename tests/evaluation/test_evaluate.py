"""Perplexity and the distance to a reference model, against loops of a few lines with transformers."""

import copy
import json
import math

import pytest
import torch
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM

import fewbit
from fewbit.calibration.tokens import tokenize
from fewbit.checkpoint.native import NativeCheckpoint
from fewbit.errors import CalibrationError, CheckpointError
from fewbit.evaluation import metrics, reference
from fewbit.nn import attention
from fewbit.nn.activation import ActivationQuantizer
from fewbit.nn.attach import attention_config

LENGTH = 150  # more than the rows of logits that are computed at a time, and no multiple of them
EVALUATION = {"sequence_length": LENGTH, "max_windows": 3, "device": "cpu"}


@pytest.fixture(scope="module")
def windows(evaluation_file, tokenizer):
    tokens = tokenize([evaluation_file.read_text(encoding="utf-8")], tokenizer)
    return tokens[: 3 * LENGTH].view(3, LENGTH)


def log_probabilities(model, windows):
    """[windows, tokens − 1, vocabulary] float64."""
    with torch.no_grad():
        return torch.cat([model(input_ids=window[None]).logits[:, :-1] for window in windows]).double().log_softmax(-1)


def perplexity(model, windows):
    scores = log_probabilities(model, windows).gather(-1, windows[:, 1:, None])
    return math.exp(-scores.mean().item())


def load(directory):
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()


def test_perplexity_of_a_checkpoint_is_that_of_a_plain_loop(checkpoint, evaluation_file, windows, family):
    found = fewbit.evaluate(checkpoint(family), evaluation_file, **EVALUATION)
    assert found.perplexity == pytest.approx(perplexity(load(checkpoint(family)), windows), rel=1e-5)
    assert (found.windows, found.sequence_length, found.tokens) == (3, LENGTH, 3 * (LENGTH - 1))
    assert found.kl_mean is None


def test_a_bf16_checkpoint_is_evaluated_in_float32(checkpoint, evaluation_file, windows):
    directory = checkpoint("llama", torch.bfloat16)
    found = fewbit.evaluate(directory, evaluation_file, **EVALUATION)
    assert found.perplexity == pytest.approx(perplexity(load(directory), windows), rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16])
def test_run_export_and_dequantized_checkpoint_agree(
    finished_run, dequantized, tokenizer, evaluation_file, windows, family, dtype, tmp_path
):
    run = finished_run(family, dtype)
    exported = fewbit.Run(run).export("compressed-tensors", tmp_path / "export")
    model = dequantized(run)
    model.save_pretrained(tmp_path / "plain")
    tokenizer.save_pretrained(tmp_path / "plain")
    found = [
        fewbit.evaluate(target, evaluation_file, **EVALUATION).perplexity
        for target in (fewbit.Run(run), run, exported, tmp_path / "plain")
    ]
    assert found == [found[0]] * 4
    assert found[0] == pytest.approx(perplexity(model, windows), rel=1e-5)


def test_two_bits_are_compared_with_the_model_itself(finished_run, checkpoint, evaluation_file):
    found = fewbit.evaluate(
        finished_run("llama", scheme="W2A16"), evaluation_file, against=checkpoint("llama"), **EVALUATION
    )
    plain = fewbit.evaluate(checkpoint("llama"), evaluation_file, **EVALUATION)
    assert found.reference_perplexity == plain.perplexity
    assert found.perplexity != plain.perplexity  # of random weights: neither better nor worse
    assert found.kl_mean > 0.01


def test_a_model_against_itself_has_no_distance(checkpoint, evaluation_file):
    found = fewbit.evaluate(checkpoint("llama"), evaluation_file, against=checkpoint("llama"), **EVALUATION)
    assert (found.kl_mean, found.kl_p99, found.top1_agreement) == (0, 0, 1)
    assert found.reference_perplexity == found.perplexity


@pytest.mark.parametrize("scheme", ["W4A16", "W2A16"])
def test_kl_and_top1_are_those_of_a_plain_loop(
    finished_run, checkpoint, dequantized, evaluation_file, windows, scheme
):
    run = finished_run("llama", scheme=scheme)
    found = fewbit.evaluate(run, evaluation_file, against=checkpoint("llama"), **EVALUATION)
    ours, reference = (
        log_probabilities(dequantized(run), windows),
        log_probabilities(load(checkpoint("llama")), windows),
    )
    kl = (reference.exp() * (reference - ours)).sum(-1).flatten()
    assert found.kl_mean == pytest.approx(kl.mean().item(), rel=1e-3)
    assert found.kl_p99 == pytest.approx(kl.quantile(0.99).item(), rel=1e-3)
    assert found.top1_agreement == pytest.approx((ours.argmax(-1) == reference.argmax(-1)).double().mean().item())
    assert 0 < found.kl_mean < found.kl_p99


def test_a_reference_is_computed_once_per_text(finished_run, checkpoint, evaluation_file, windows, monkeypatch):
    model, run = checkpoint("llama"), finished_run("llama")
    plain = [fewbit.evaluate(run, ids, against=model) for ids in (windows, windows[:2])]
    called = []
    original = reference.last_hidden_states
    monkeypatch.setattr(reference, "last_hidden_states", lambda *args: called.append(args) or original(*args))
    kept = fewbit.Reference(model)
    found = [fewbit.evaluate(run, ids, against=kept) for ids in (windows, windows, windows[:2], windows[:2])]
    assert found == [plain[0], plain[0], plain[1], plain[1]]
    assert len(called) == 2


def test_kl_of_different_distributions_is_the_sum_over_the_vocabulary():
    reference = torch.tensor([[0.5, 0.5], [0.9, 0.1]]).log()
    model = torch.tensor([[0.25, 0.75], [0.9, 0.1]]).log()
    expected = 0.5 * math.log(0.5 / 0.25) + 0.5 * math.log(0.5 / 0.75)
    assert metrics.kl_divergence(reference, model).tolist() == pytest.approx([expected, 0], abs=1e-7)


def test_a_module_and_token_ids_need_no_files(random_model, checkpoint, evaluation_file, windows):
    found = fewbit.evaluate(random_model("llama"), windows, device="cpu")
    assert found.perplexity == fewbit.evaluate(checkpoint("llama"), evaluation_file, **EVALUATION).perplexity


@pytest.mark.parametrize("memory", [0, "100KB"])
def test_hidden_states_on_disk_give_the_same_numbers(finished_run, checkpoint, evaluation_file, memory):
    arguments = EVALUATION | {"against": checkpoint("llama")}
    plain = fewbit.evaluate(finished_run("llama"), evaluation_file, **arguments)
    assert fewbit.evaluate(finished_run("llama"), evaluation_file, activation_memory=memory, **arguments) == plain


def test_all_whole_windows_are_used_unless_limited(checkpoint, evaluation_file, tokenizer):
    tokens = tokenize([evaluation_file.read_text(encoding="utf-8")], tokenizer).numel()
    found = fewbit.evaluate(checkpoint("llama"), evaluation_file, sequence_length=250, device="cpu")
    assert found.windows == tokens // 250


def test_models_with_other_vocabularies_cannot_be_compared(random_model, windows):
    with pytest.raises(CheckpointError, match="vocabularies of 304 and 200"):
        fewbit.evaluate(random_model("llama"), windows, against=random_model("llama", vocab_size=200))


def test_text_shorter_than_a_window_is_refused_with_both_numbers(checkpoint, tokenizer, tmp_path):
    (tmp_path / "short.txt").write_text("ba be bi")
    count = tokenize(["ba be bi"], tokenizer).numel()
    with pytest.raises(CalibrationError, match=rf"short\.txt has {count} tokens, less than one window of 64"):
        fewbit.evaluate(checkpoint("llama"), tmp_path / "short.txt", sequence_length=64)


def test_text_for_a_module_without_tokenizer_is_refused(random_model, evaluation_file):
    with pytest.raises(CalibrationError, match="a text needs a tokenizer"):
        fewbit.evaluate(random_model("llama"), evaluation_file)


def test_a_directory_that_is_nothing_is_refused(evaluation_file, tmp_path):
    with pytest.raises(CheckpointError, match=r"has no config\.json; is it a checkpoint, a run or an export\?"):
        fewbit.evaluate(tmp_path, evaluation_file)


def test_a_checkpoint_quantized_by_another_method_is_refused_by_its_name(llama, evaluation_file):
    config = json.loads((llama / "config.json").read_text())
    (llama / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "awq"}}))
    with pytest.raises(CheckpointError, match="quantized with 'awq'"):
        fewbit.evaluate(llama, evaluation_file)


# --- quantized activations and caches -------------------------------------------------------------------------------

QUANTIZED = {
    "dynamic": {"scheme": "W8A8"},
    "static": {"scheme": "W8A8_STATIC"},
    "cache": {"scheme": "FP8KVFP8"},
    "searched": {"scheme": "W8A8_STATICKVFP8", "algorithm": "smoothquant+gptq"},
}


@pytest.fixture
def emulated(dequantized):
    """emulated(run): a transformers model with the run's weights whose activations are quantized by hooks."""

    def load(run):
        model, activations = dequantized(run), NativeCheckpoint(run).activations()
        for name, known in activations.items():
            module, _, slot = name.rpartition(".")
            if slot == "input":
                quantizer = ActivationQuantizer(known.spec, known)
                model.get_submodule(module).register_forward_pre_hook(lambda _, args, q=quantizer: (q(args[0]),))
        if (config := attention_config(activations)) is not None:
            attention.attach(model, config, activations)
        return model

    return load


@pytest.mark.parametrize("name", QUANTIZED)
@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_a_run_with_quantized_activations_is_evaluated_with_them(
    finished_run, emulated, evaluation_file, windows, family, name
):
    run = finished_run(family, **{"group_size": None} | QUANTIZED[name])
    found = fewbit.evaluate(run, evaluation_file, **EVALUATION)
    assert found.perplexity == pytest.approx(perplexity(emulated(run), windows), rel=2e-4)


@pytest.mark.parametrize("name", QUANTIZED)
def test_an_export_with_quantized_activations_is_evaluated_with_them(
    finished_run, checkpoint, dequantized, evaluation_file, windows, tmp_path, name
):
    run = finished_run("llama", torch.bfloat16, **{"group_size": None} | QUANTIZED[name])
    exported = fewbit.Run(run).export("compressed-tensors", tmp_path / "export")
    arguments = EVALUATION | {"against": checkpoint("llama", torch.bfloat16)}
    ours = fewbit.evaluate(run, evaluation_file, **arguments)
    assert fewbit.evaluate(exported, evaluation_file, **arguments) == ours
    assert ours.perplexity != pytest.approx(perplexity(dequantized(run), windows), rel=1e-6)  # weights alone


def test_hidden_states_on_disk_give_the_same_numbers_with_activations(finished_run, evaluation_file):
    run = finished_run("llama", scheme="W8A8_STATICKVFP8", group_size=None)
    plain = fewbit.evaluate(run, evaluation_file, **EVALUATION)
    assert fewbit.evaluate(run, evaluation_file, activation_memory=0, **EVALUATION) == plain


# --- families that begin every text with a token of its own ---------------------------------------------------------


def test_every_window_begins_as_texts_do(checkpoint, tokenizer, evaluation_file):
    beginner = copy.deepcopy(tokenizer)
    beginner.add_special_tokens({"bos_token": "<s>"})
    special = [("<s>", beginner.bos_token_id)]
    beginner.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=special)
    stream = tokenize([evaluation_file.read_text(encoding="utf-8")], beginner)
    expected = torch.cat(
        [torch.full((3, 1), beginner.bos_token_id), stream[: 3 * (LENGTH - 1)].view(3, LENGTH - 1)], dim=1
    )
    found = fewbit.evaluate(checkpoint("llama"), evaluation_file, tokenizer=beginner, **EVALUATION)
    assert (found.windows, found.sequence_length) == (3, LENGTH)
    assert found.perplexity == pytest.approx(perplexity(load(checkpoint("llama")), expected), rel=1e-5)


def test_as_many_windows_of_ids_are_measured_as_were_wanted(checkpoint):
    ids = torch.randint(1, 300, (4, 12), generator=torch.Generator().manual_seed(0))
    some = fewbit.evaluate(checkpoint("llama"), ids, max_windows=2)
    assert some == fewbit.evaluate(checkpoint("llama"), ids[:2])
    with pytest.raises(CalibrationError, match="one token"):
        fewbit.evaluate(checkpoint("llama"), ids[:, :1])


def test_a_reference_survives_an_interruption(checkpoint, monkeypatch):
    first, second = torch.randint(1, 300, (2, 2, 12), generator=torch.Generator().manual_seed(0))
    reference = fewbit.Reference(checkpoint("llama"))
    wanted = fewbit.evaluate(checkpoint("llama"), first, against=reference)

    def interrupted(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("fewbit.evaluation.reference.last_hidden_states", interrupted)
        with pytest.raises(KeyboardInterrupt):
            reference.last_hidden_states(second, torch.device("cpu"), 2**30)
    assert fewbit.evaluate(checkpoint("llama"), first, against=reference) == wanted


# --- what is no number, and data in other forms ----------------------------------------------------------------------


def overflowing(random_model, name):
    """A model of which every weight is finite and one is so large that what it computes is not."""
    model = random_model("llama")
    with torch.no_grad():
        model.get_submodule(name).weight.fill_(3e38)
    return model


WHERE = {
    "model.norm": r"head of the model gives NaN or infinity \(first for token 0 of sequence 0\)",
    "model.layers.1.post_attention_layernorm": r"block 'model.layers.1' gives NaN .*token 0 of sequence 0",
}


@pytest.mark.parametrize("name", WHERE)
def test_numbers_that_are_none_are_an_error_that_names_the_window(random_model, windows, name):
    broken = overflowing(random_model, name)
    with pytest.raises(CalibrationError, match=WHERE[name]):
        fewbit.evaluate(broken, windows)
    with pytest.raises(CalibrationError, match=WHERE[name]):
        fewbit.evaluate(broken, windows, against=broken)
    with pytest.raises(CalibrationError, match=WHERE[name].replace("the model", "the reference")):
        fewbit.evaluate(random_model("llama"), windows, against=broken)


def test_texts_rows_and_ids_in_every_form_give_the_same(random_model, tokenizer, evaluation_file, tmp_path):
    model, text = random_model("llama"), evaluation_file.read_text(encoding="utf-8")
    options = EVALUATION | {"tokenizer": tokenizer}
    plain = fewbit.evaluate(model, evaluation_file, **options)
    (tmp_path / "rows.jsonl").write_text(json.dumps({"id": 1, "text": text}))
    for data in (tmp_path / "rows.jsonl", str(tmp_path / "rows.jsonl"), [text], [{"text": text}]):
        assert fewbit.evaluate(model, data, **options) == plain
    ids = tokenize([text], tokenizer)[: 3 * LENGTH].view(3, LENGTH)
    for data in (ids, ids.numpy(), list(ids), ids.tolist(), [{"input_ids": row} for row in ids.tolist()]):
        assert fewbit.evaluate(model, data, **options) == plain


def test_windows_of_ids_have_one_length_and_no_padding(random_model):
    for data in ([[1, 2, 3], [1, 2]], [{"input_ids": [1, 2, 3], "attention_mask": [0, 1, 1]}]):
        with pytest.raises(CalibrationError, match="windows of token ids"):
            fewbit.evaluate(random_model("llama"), data)


def test_a_broken_tokenizer_is_no_matter_to_token_ids(llama, windows, evaluation_file, quick, tmp_path):
    (llama / "tokenizer.json").write_text("{")
    assert fewbit.evaluate(llama, windows).windows == 3
    run = fewbit.quantize(llama, output=tmp_path / "run", **quick | {"calibration": windows})
    assert fewbit.evaluate(run, windows).windows == 3
    with pytest.raises(CheckpointError, match="tokenizer in"):
        fewbit.evaluate(llama, evaluation_file)


def test_a_loss_that_no_perplexity_expresses_is_a_sentence(random_model):
    model = random_model("llama", tie_word_embeddings=False)
    with torch.no_grad():
        model.lm_head.weight.mul_(1e6)
    with pytest.raises(CalibrationError, match="nats per token, beyond any perplexity"):
        fewbit.evaluate(model, torch.randint(5, 300, (2, 16), generator=torch.Generator().manual_seed(0)))

"""What is stored beside what is needed: as transformers loads a checkpoint, and refused by name before any work."""

import json
import math
import shutil
import time

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch.nn import functional

import fewbit
from fewbit.errors import ArchitectureError, CheckpointError, FewbitError
from fewbit.models.blockwise import BlockwiseModel

TOKENS = torch.randint(5, 300, (2, 24), generator=torch.Generator().manual_seed(0))
QUICK = {"scheme": "W8A16", "group_size": 32, "algorithm": "rtn", "calibration": "none", "progress": False}


def change_config(directory, **fields):
    described = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(described | fields))


def change_tensors(directory, change):
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(
        {name: tensor.contiguous() for name, tensor in tensors.items()},
        directory / "model.safetensors",
        {"format": "pt"},
    )


def loaded(directory):
    return transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()


def perplexity(model) -> float:
    with torch.no_grad():
        logits = model(TOKENS).logits.float()
    return math.exp(functional.cross_entropy(logits[:, :-1].flatten(0, 1), TOKENS[:, 1:].flatten()).item())


def everywhere(directory, tmp_path):
    """Perplexity by fewbit of a directory, of the model that transformers loads from it, of a run and an export."""
    run = fewbit.quantize(directory, output=tmp_path / "run", **QUICK)
    export = run.export("compressed-tensors")
    of_module = fewbit.quantize(loaded(directory), output=tmp_path / "run-2", **QUICK)
    plain = [fewbit.evaluate(source, TOKENS).perplexity for source in (directory, loaded(directory))]
    return plain, [fewbit.evaluate(source, TOKENS).perplexity for source in (run, export, of_module)], export


class TestTiedHeads:
    def agrees(self, directory, tmp_path):
        expected = perplexity(loaded(directory))
        plain, quantized, export = everywhere(directory, tmp_path)
        assert plain == pytest.approx([expected] * 2, rel=1e-4)
        assert quantized == pytest.approx([expected] * 3, rel=0.01)
        return json.loads((export / "config.json").read_text())["tie_word_embeddings"]

    def test_another_head_that_is_stored_counts_whatever_the_configuration_says(self, llama, tmp_path):
        change_config(llama, tie_word_embeddings=True)
        assert self.agrees(llama, tmp_path) is False

    def test_the_same_head_that_is_stored_stays_tied(self, llama, tmp_path):
        change_config(llama, tie_word_embeddings=True)
        change_tensors(llama, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
        assert self.agrees(llama, tmp_path) is True

    def test_a_head_that_is_not_stored_is_the_embeddings(self, llama, tmp_path):
        change_config(llama, tie_word_embeddings=True)
        change_tensors(llama, lambda t: t.pop("lm_head.weight"))
        assert self.agrees(llama, tmp_path) is True

    def test_embeddings_that_are_not_stored_are_the_head(self, llama, tmp_path):
        change_config(llama, tie_word_embeddings=True)
        change_tensors(llama, lambda t: t.pop("model.embed_tokens.weight"))
        assert self.agrees(llama, tmp_path) is True

    def test_a_head_that_is_neither_stored_nor_tied_is_missing(self, llama):
        change_tensors(llama, lambda t: t.pop("lm_head.weight"))
        with pytest.raises(CheckpointError, match=r"no tensor 'lm_head\.weight'"):
            BlockwiseModel.from_directory(llama)

    def test_a_module_whose_tie_was_cut(self, random_model, tmp_path):
        model = random_model("qwen3")
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach() * 1.5)
        run = fewbit.quantize(model, output=tmp_path / "run", **QUICK)
        for source in (model, run, run.export("compressed-tensors")):
            assert fewbit.evaluate(source, TOKENS).perplexity == pytest.approx(perplexity(model), rel=0.01)
        assert json.loads((run.directory / "config.json").read_text())["tie_word_embeddings"] is False

    def test_a_tied_head_in_memory_is_written_once(self, random_model, tmp_path):
        run = fewbit.quantize(random_model("qwen3"), output=tmp_path / "run", **QUICK)
        assert "lm_head.weight" not in load_file(run.directory / "outside.safetensors")


@pytest.mark.parametrize(
    ("name", "change", "said"),
    [
        ("lm_head.weight", lambda t: t.T, r"shape \(64, 304\), config.json says \(304, 64\)"),
        ("model.norm.weight", lambda t: t[:-1], r"shape \(63,\)"),
        ("model.layers.1.mlp.down_proj.weight", lambda t: t.T, "shape"),
        ("model.layers.1.self_attn.q_proj.weight", lambda t: t.to(torch.int8), "holds int8 where llama has floats"),
        ("model.embed_tokens.weight", lambda t: t.to(torch.int64), "holds int64"),
    ],
)
def test_shapes_and_kinds_of_all_tensors_are_looked_at_before_anything_is_written(name, change, said, llama, tmp_path):
    change_tensors(llama, lambda tensors: tensors.update({name: change(tensors[name])}))
    for work in (
        lambda: fewbit.quantize(llama, output=tmp_path / "run", **QUICK),
        lambda: fewbit.evaluate(llama, TOKENS),
    ):
        with pytest.raises(CheckpointError, match=said) as caught:
            work()
        assert name in str(caught.value)
    assert not (tmp_path / "run").exists()


class TestUnexpected:
    def warnings(self, directory, tmp_path):
        run = fewbit.quantize(directory, output=tmp_path / "run", **QUICK)
        return [warning for warning in run.report["warnings"] if "not part of" in warning]

    def test_a_tensor_that_no_module_has_is_named(self, llama, tmp_path):
        change_tensors(llama, lambda t: t.update({"model.layers.0.extra.weight": torch.ones(2, 2)}))
        (warning,) = self.warnings(llama, tmp_path)
        assert "model.layers.0.extra.weight" in warning

    def test_what_transformers_passes_over_is_not(self, llama, tmp_path):
        change_tensors(llama, lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}))
        assert self.warnings(llama, tmp_path) == []

    @pytest.mark.parametrize("suffix", ["weight_scale_inv", "weight_scale", "qweight", "SCB"])
    def test_parts_of_quantized_weights_that_the_configuration_does_not_know_are_refused(self, suffix, llama):
        change_tensors(llama, lambda t: t.update({f"model.layers.0.mlp.up_proj.{suffix}": torch.ones(1)}))
        with pytest.raises(
            CheckpointError, match=rf"up_proj\.{suffix}.*does not say that the checkpoint is quantized"
        ):
            BlockwiseModel.from_directory(llama)


@pytest.mark.parametrize(
    "fields",
    [{"hidden_size": 10**9}, {"vocab_size": 10**9}, {"num_attention_heads": 3}, {"num_key_value_heads": 7},
     {"num_hidden_layers": 300}, {"head_dim": 10**8}, {"intermediate_size": -4}, {"hidden_act": "nonsense"},
     {"initializer_range": math.nan}, {"rms_norm_eps": "small"}],
    ids=str,
)  # fmt: skip
def test_a_configuration_that_does_not_fit_what_is_stored_is_a_sentence_in_seconds(fields, llama):
    change_config(llama, **fields)
    started = time.perf_counter()
    with pytest.raises(FewbitError) as caught:
        BlockwiseModel.from_directory(llama)
    assert time.perf_counter() - started < 20
    assert "\n" not in str(caught.value)


class TestVisionLanguage:
    @pytest.fixture
    def model(self):
        text = {
            "vocab_size": 304, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
            "num_attention_heads": 4, "num_key_value_heads": 2, "model_type": "llama",
        }  # fmt: skip
        vision = {
            "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2,
            "image_size": 32, "patch_size": 16, "model_type": "clip_vision_model",
        }  # fmt: skip
        torch.manual_seed(0)
        config = transformers.LlavaConfig(text_config=text, vision_config=vision, image_token_index=300)
        return transformers.LlavaForConditionalGeneration(config).eval()

    def test_a_loaded_one_is_quantized_and_compared(self, model, tmp_path):
        run = fewbit.quantize(model, output=tmp_path / "run", **QUICK)
        measured = fewbit.evaluate(run, TOKENS, against=model)
        assert measured.reference_perplexity == pytest.approx(perplexity(model), rel=1e-4)
        assert measured.perplexity == pytest.approx(measured.reference_perplexity, rel=0.01)
        assert fewbit.evaluate(run.export("compressed-tensors"), TOKENS).perplexity == pytest.approx(
            measured.perplexity
        )

    def test_of_a_directory_it_is_said_how_to_load_it(self, model, tmp_path):
        model.save_pretrained(tmp_path / "model")
        with pytest.raises(CheckpointError, match=r"from_pretrained.*give the loaded model"):
            fewbit.evaluate(tmp_path / "model", TOKENS)


def test_an_encoder_decoder_and_an_encoder_are_refused_in_a_sentence(tmp_path, llama):
    for kind in ("t5", "vit"):
        transformers.AutoConfig.for_model(kind).save_pretrained(tmp_path)
        shutil.copy(llama / "model.safetensors", tmp_path)
        with pytest.raises(ArchitectureError, match="ModelQuantizer") as caught:
            BlockwiseModel.from_directory(tmp_path)
        assert len(str(caught.value)) < 400


@pytest.mark.parametrize(
    "change",
    [{}, {"scheme": "W8A8", "group_size": None}, {"scheme": "FP8", "group_size": None, "calibration": TOKENS}],
)
def test_weights_in_floats_of_8_bits_count_as_their_values_do(change, llama, tmp_path):
    name = "model.layers.1.mlp.up_proj.weight"
    found = []
    for dtype in (torch.float8_e4m3fn, torch.float32):
        change_tensors(llama, lambda t, dtype=dtype: t.update({name: t[name].to(torch.float8_e4m3fn).to(dtype)}))
        run = fewbit.quantize(llama, output=tmp_path / f"run-{dtype}", **QUICK | change)
        found += [fewbit.evaluate(source, TOKENS).perplexity for source in (run, run.export("compressed-tensors"))]
        run.verify()
    assert found == pytest.approx(found[:1] * 4, rel=1e-6)


@pytest.mark.parametrize(
    ("scheme", "algorithm"), [("FP8", "rtn"), ("FP8", "gptq"), ("NVFP4", "rtn"), ("NVFP4", "gptq")]
)
def test_fused_linears_share_what_engines_share_whatever_they_are_stored_in(scheme, algorithm, llama, tmp_path):
    name = "model.layers.0.self_attn.k_proj.weight"
    change_tensors(llama, lambda t: t.update({name: t[name].to(torch.bfloat16) * 3}))
    run = fewbit.quantize(
        llama, scheme, algorithm=algorithm, calibration=TOKENS, output=tmp_path / "run", progress=False
    )
    run.export("compressed-tensors")  # refuses what differs
    run.verify()


def test_a_family_without_linears_in_its_blocks_is_told_what_it_has(tmp_path):
    config = transformers.GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=2)
    model = transformers.AutoModelForCausalLM.from_config(config)
    with pytest.raises(
        ArchitectureError, match=r"no linears in its blocks.*h\.\*\.attn\.c_attn\.weight \(Conv1D, 2 of"
    ):
        fewbit.quantize(model, output=tmp_path / "run", **QUICK)

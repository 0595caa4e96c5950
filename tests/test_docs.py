"""What the documentation shows works: the blocks of README.md and docs/*.md run on a tiny llama.

Every fenced block runs unless the line before it is an HTML comment that says otherwise:

    <!-- not run: reason -->   it is left out
    <!-- setup -->             it runs before each of the page's python blocks
    <!-- continues -->         it runs behind the block before it, in the same place; otherwise each runs by itself

python runs as it stands; a page without a setup has that of coming-from.md. bash is commands of fewbit, and so is a
block without a language that begins with one (a line with … in it is an abbreviation, and not run); all must succeed.
Several that quantize into one directory are alternatives: each starts anew. Those that say nothing of samples get few.
yaml is a recipe, which must fit the model. Other languages do not run, and neither does other text without one. A
block's directory holds what a reader would have: a checkpoint, a text to calibrate on and another, by all the names
that the pages use.
"""

from __future__ import annotations

import importlib
import logging
import re
import shlex
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

import fewbit
from fewbit.config.schemes import SCHEMES
from fewbit.contents import nominal
from fewbit.formats import holding
from fewbit.formats.compressed_tensors.engines import RULES
from fewbit.numerics.formats import FORMATS

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCED = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
COMMENT = re.compile(r"<!-- ((?:(?!-->).)*) -->\s*\Z", re.DOTALL)
FEW_SAMPLES = ["--num-samples", "8", "--sequence-length", "64"]
MODELS, CALIBRATION_TEXTS, OTHER_TEXTS = (
    ("model", "MODEL", "path-or-hub-id"),
    ("text.txt", "my-text.txt"),
    ("other.txt", "other-text.txt"),
)


@dataclass(frozen=True)
class Block:
    """A fenced block of a page."""

    page: str
    line: int
    heading: str
    language: str
    code: str
    note: str
    """The comment before it."""
    before: Block | None
    """The block that it continues."""

    @property
    def runs(self) -> bool:
        return not self.note.startswith("not run:")

    def __str__(self) -> str:
        return f"{self.page}:{self.line} {self.heading}"


def blocks_of(page: Path) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    found: list[Block] = []
    for match in FENCED.finditer(text):
        above = text[: match.start()]
        language, code = match[1], match[2]
        if not language and code.startswith("fewbit "):
            language = "bash"
        comment = COMMENT.search(above)
        note = comment[1] if comment else ""
        headings = re.findall(r"^#+ (.*)$", FENCED.sub("", above), re.MULTILINE)
        line = above.count("\n") + 2  # the first one of the code
        before = found[-1] if note == "continues" else None
        found.append(Block(page.name, line, headings[-1] if headings else "", language, code, note, before))
    return found


BLOCKS = [block for page in PAGES for block in blocks_of(page)]
SETUP = {block.page: block for block in BLOCKS if block.note == "setup"}


def running(language: str) -> list[Block]:
    return [block for block in BLOCKS if block.language == language and block.runs and block.note != "setup"]


@pytest.fixture(scope="session")
def belongings(
    tmp_path_factory: pytest.TempPathFactory,
    random_model: Callable[..., PreTrainedModel],
    tokenizer: PreTrainedTokenizerFast,
    calibration_file: Path,
    evaluation_file: Path,
) -> dict[str, Path]:
    """Files by the names that the pages use. The model is wide enough for groups of 128."""
    directory = tmp_path_factory.mktemp("docs") / "model"
    random_model("llama", hidden_size=128, intermediate_size=256).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return (
        dict.fromkeys(MODELS, directory)
        | dict.fromkeys(CALIBRATION_TEXTS, calibration_file)
        | dict.fromkeys(OTHER_TEXTS, evaluation_file)
    )


@pytest.fixture
def place(tmp_path: Path, belongings: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A directory of the block's own, which is the current one."""
    for name, target in belongings.items():
        (tmp_path / name).symlink_to(target)
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    log = logging.getLogger("fewbit")
    handlers, level = list(log.handlers), log.level
    yield tmp_path
    for handler in set(log.handlers) - set(handlers):
        log.removeHandler(handler)
        handler.close()
    log.setLevel(level)


def run_python(block: Block, namespace: dict[str, Any]) -> None:
    if block.before is not None:
        run_python(block.before, namespace)
    above = "\n" * (block.line - 1)  # so that a traceback shows the page's line
    exec(compile(above + block.code, block.page, "exec"), namespace)


@pytest.mark.parametrize("block", running("python"), ids=str)
def test_python_runs(block: Block, place: Path) -> None:
    namespace: dict[str, Any] = {"__name__": "__main__"}
    run_python(SETUP.get(block.page, SETUP["coming-from.md"]), namespace)
    run_python(block, namespace)


def commands(code: str) -> list[list[str]]:
    """The command lines of a bash block, comments left out and lines joined that end in a backslash."""
    lines = (shlex.split(line, comments=True) for line in code.replace("\\\n", " ").splitlines() if "…" not in line)
    return [line for line in lines if line]


@pytest.mark.parametrize("block", running("bash"), ids=str)
def test_commands_succeed(block: Block, place: Path, cli: Callable[..., tuple[int, str, str]]) -> None:
    for program, *arguments in commands(block.code):
        assert program == "fewbit", "only commands of fewbit can be run; mark the block <!-- not run: reason -->"
        if arguments[0] == "quantize" and "--resume" not in arguments:
            shutil.rmtree(place / arguments[arguments.index("--output") + 1], ignore_errors=True)
        if arguments[0] == "quantize" and "--num-samples" not in arguments:
            arguments += FEW_SAMPLES
        code, _, err = cli(*arguments)
        assert code == 0, err


@pytest.mark.parametrize("block", running("yaml"), ids=str)
def test_recipes_fit_a_model(block: Block, place: Path, cli: Callable[..., tuple[int, str, str]]) -> None:
    (place / "recipe.yaml").write_text(block.code, encoding="utf-8")
    code, out, err = cli("inspect", "model", "--recipe", "recipe.yaml")
    assert (code, err) == (0, "")
    assert "quantized" in out


def test_blocks_are_found_as_they_are_marked() -> None:
    assert {page for page, block in SETUP.items() if block.language == "python"} == {"coming-from.md", "formats.md"}
    for language in ("python", "bash", "yaml"):
        assert {"README.md", "coming-from.md"} <= {block.page for block in running(language)}
    assert all(block.before is None or block.before.language == "python" for block in running("python"))
    notes = {block.note for block in BLOCKS if block.runs}
    assert notes <= {"", "setup", "continues"}, "a comment right before a block decides whether and how it runs"


def prose(page: Path) -> str:
    return FENCED.sub("", page.read_text(encoding="utf-8"))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_names_of_fewbit_exist(page: Path) -> None:
    for name in re.findall(r"`(fewbit(?:\.[A-Za-z_]\w*)+)", prose(page)):
        found: Any = fewbit
        for index, part in enumerate(parts := name.split(".")[1:], start=1):
            if not hasattr(found, part):
                importlib.import_module(".".join(["fewbit", *parts[:index]]))
            found = getattr(found, part)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        file, _, anchor = target.partition("#")
        if "://" in target:
            continue
        linked = page.parent / file if file else page
        assert linked.exists(), target
        headings = re.findall(r"^#+ (.*)$", prose(linked), re.MULTILINE) if anchor else []
        anchors = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
        assert not anchor or anchor in anchors, target


NAMES = """
    DataRecorder register_input_hooks register_pos_embed_hooks register_linear_input_hooks register_input_ids_hooks
    register_output_hooks save_inputs clear_inputs remove_hooks model_input model_pos_embed model_input_ids
    model_output DefaultDataset build_calib_dataset_inputs Quantizer find_scale quantize FakeQuantLinear W8A8FakeLinear
    W4A16FakeLinear QuantLinear from_module forward_manager register run_gptq_for_sequential_layers
    run_smooth_quant_for_sequential_layers w_method a_method q_linear_type duo_scale setup_logging load dump
    QuantizationSpec Dtype QSchemeType ScaleType RoundType PlaceholderObserver PerTensorMinMaxObserver
    PerChannelMinMaxObserver PerGroupMinMaxObserver PerBlockMXObserver PerTensorPercentileObserver PerTensorMSEObserver
    int8 uint8 int4 uint4 int2 bfloat16 float16 fp8_e5m2 fp8_e4m3 fp6_e3m2 fp6_e2m3 fp4 mx symmetric ch_axis is_dynamic
    group_size round_method scale_type pof2 half_even QuantizationConfig input_tensors output_tensors weight bias
    AWQConfig SmoothQuantConfig GPTQConfig scaling_layers model_decoder_layers embedding_layers alpha scale_clamp_min
    damp_percent desc_act static_groups true_sequential inside_layer_modules Config global_quant_config
    layer_type_quant_config layer_quant_config exclude algo_config quant_mode replace k_proj v_proj ModelQuantizer
    quantize_model ActQuantizer ActQuantWrapper add_actquant find_qlayers WQuantizer gptq_fwrd rtn_fwrd nsamples
    percdamp act_order w_static_groups w_clip k_bits v_bits k_groupsize v_groupsize k_asym v_asym k_clip_ratio
    v_clip_ratio a_clip_ratio a_residual format w_bits a_bits w_group_size a_group_size w_observer gptq
    quantization_order build_calib_datset_inputs root_dir LayerForwardManager AlgoConfig QuantizationMode eager_mode
    fx_graph_mode ZeroPointType Int8PerTensorSpec to_quantization_spec ProgressiveSpec ScaleQuantSpec
    pre_quant_opt_config log_severity_level kv_cache_quant_config softmax_quant_spec export_safetensors ModelExporter
    LLMTemplate AutoSmoothQuantConfig QTensorConfig QLayerConfig QConfig filter_fn
"""


def test_every_name_that_users_know_is_on_the_page() -> None:
    page = (ROOT / "docs" / "coming-from.md").read_text(encoding="utf-8")
    assert [name for name in NAMES.split() if not re.search(rf"(?<![A-Za-z]){name}(?![A-Za-z])", page)] == []


def rows(page: Path, heading: str) -> list[list[str]]:
    """Cells of the table whose header begins with `heading`."""
    table = re.search(rf"^\| {heading} \|.*\n\|[-|]*\|\n((?:\|.*\n)+)", page.read_text(encoding="utf-8"), re.MULTILINE)
    assert table is not None
    return [[cell.strip(" `") for cell in line.strip("|").split("|")] for line in table[1].splitlines()]


def test_the_table_of_schemes_says_what_they_are() -> None:
    table = {name: cells for name, *cells in rows(ROOT / "docs" / "formats.md", "scheme")}
    assert list(table) == list(SCHEMES)
    for name, (weight, bits, layout, engines) in table.items():
        contents = nominal(SCHEMES[name])
        spec = contents.linears["m"].weight
        assert spec is not None
        assert weight.startswith(spec.dtype)
        size = 16 if spec.scale_type == "microexponent" else spec.group_size
        assert size is None or re.search(rf"\b{size}\b", weight)
        assert bits == f"{contents.bits_per_weight:.3f}"
        exports = holding(contents)
        assert layout == (", ".join(found for form in exports for found in form.layouts(contents)) or "–")
        assert engines == (", ".join(form.engines(contents) for form in exports) or "–")


def test_the_table_of_element_formats_says_what_they_are() -> None:
    for name, also, bits, low, high in rows(ROOT / "docs" / "formats.md", "dtype"):
        format = FORMATS[name]
        assert (int(bits), float(low.replace("−", "-")), float(high)) == (format.bits, format.smallest, format.largest)
        assert not also or fewbit.QuantizationSpec(dtype=also, qscheme="per_tensor").format is format


def test_what_readers_do_otherwise_is_told() -> None:
    page = " ".join((ROOT / "docs" / "formats.md").read_text(encoding="utf-8").split())
    assert [rule.note for rule in RULES if rule.note not in page] == []

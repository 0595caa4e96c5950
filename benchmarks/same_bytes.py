"""Same bytes: a matrix of recipes on two commits, every tensor of every run compared. For refactorings.

    python benchmarks/same_bytes.py BEFORE [AFTER] --json benchmarks/results/same_bytes.json

BEFORE and AFTER are revisions of this repository (AFTER: the working tree). Tiny random models: Llama, Qwen 3 (tied),
Gemma 3, a detected family (Phi 3); checkpoints, models in memory and stacks of layers; interrupted and resumed. Exit
status 1 if a tensor differs.
"""

import argparse
import datetime
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
SHAPE = {
    "vocab_size": 304, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4,
    "max_position_embeddings": 256, "initializer_range": 0.12, "bos_token_id": None, "eos_token_id": 0,
}  # fmt: skip
FAMILIES = {
    "llama": {"num_key_value_heads": 2, "tie_word_embeddings": False},
    "qwen3": {"num_key_value_heads": 2, "tie_word_embeddings": True, "head_dim": 16},
    "gemma3_text": {"num_key_value_heads": 2, "head_dim": 16, "sliding_window": 8, "query_pre_attn_scalar": 16},
    "phi3": {"num_key_value_heads": 2, "tie_word_embeddings": False, "pad_token_id": 0},
}
RECIPES = {
    "rtn": {"scheme": "W4A16", "group_size": 32, "algorithm": "rtn"},
    "gptq": {"scheme": "W4A16", "group_size": 32},
    "drift": {"scheme": "W4A16", "group_size": 32, "algorithm": "gptq:drift=0.5"},
    "awq+gptq": {"scheme": "W4A16_ASYM", "group_size": 32, "algorithm": "awq+gptq"},
    "awq clip": {"scheme": "W3A16", "group_size": 32, "algorithm": "awq:clip=true+rtn"},
    "static": {"scheme": "W8A8_STATIC", "algorithm": "smoothquant+gptq"},
    "nvfp4": {"scheme": "NVFP4", "algorithm": "smoothquant+gptq:drift=0.5"},
    "mxfp4": {"scheme": "MXFP4"},
    "cache": {"scheme": "W4A8KVFP8-g32"},
    "mixed": {
        "scheme": "W4A16", "group_size": 32, "layer_quant_config": {"*down_proj": "W8A16-g32"}, "exclude": ["*.0.*"],
    },
}  # fmt: skip


def digest(tensor) -> str:
    flat = tensor.detach().cpu().contiguous().flatten()
    import torch

    data = flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""
    return hashlib.sha256(data + f"{tuple(tensor.shape)}{tensor.dtype}".encode()).hexdigest()[:16]


def stored(directory: Path) -> dict[str, str]:
    """Every tensor of every safetensors file below a directory."""
    from safetensors.torch import load_file

    files = sorted(directory.rglob("*.safetensors"))
    return {
        f"{file.relative_to(directory)}:{name}": digest(tensor)
        for file in files
        for name, tensor in load_file(file).items()
    }


def interrupted(fewbit, arguments: dict, output: Path):
    """The run, ended once after its first block and resumed."""
    from fewbit.checkpoint import native

    class _StopError(Exception):
        pass

    original, count = native.write_safetensors, [0]

    def save(*given, **named):
        count[0] += 1
        if count[0] == 2:
            raise _StopError
        return original(*given, **named)

    native.write_safetensors = save
    try:
        fewbit.quantize(output=output, **arguments)
    except _StopError:
        pass
    finally:
        native.write_safetensors = original
    return fewbit.quantize(output=output, resume=True, **arguments)


def run_all(scratch: Path) -> dict[str, dict[str, str]]:
    """{case: {tensor: digest}} of the fewbit that is imported."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    import fewbit

    torch.set_num_threads(1)

    def made(family: str):
        torch.manual_seed(0)
        config = AutoConfig.for_model(family, **SHAPE | FAMILIES[family])
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.data.add_(0.2 * torch.randn_like(parameter))
        return model

    ids = torch.randint(1, 300, (8, 32), generator=torch.Generator().manual_seed(1))
    mask = torch.ones(2, 32, dtype=torch.int64)
    mask[0, :7] = 0
    batches = [{"input_ids": ids[:3]}, {"input_ids": ids[3:5], "attention_mask": mask}, {"input_ids": ids[5:, :20]}]
    found: dict[str, dict[str, str]] = {}
    for family in FAMILIES:
        made(family).bfloat16().save_pretrained(scratch / family)
    for recipe, options in RECIPES.items():
        for family in FAMILIES:
            given = {"config": options, "calibration": batches, "progress": False, "device": "cpu"}
            run = fewbit.quantize(scratch / family, output=scratch / f"{family}-{recipe}", **given)
            run.export("compressed-tensors")
            found[f"{recipe} · {family}"] = stored(run.directory)
            if recipe in ("drift", "static", "awq+gptq"):
                given["model"] = scratch / family
                again = interrupted(fewbit, given, scratch / f"{family}-{recipe}-again")
                found[f"{recipe}, interrupted · {family}"] = stored(again.directory)
    for recipe in ("gptq", "static"):
        model = made("llama")
        fewbit.ModelQuantizer(fewbit.Config.from_dict(RECIPES[recipe])).quantize_model(model, batches)
        found[f"in memory, {recipe}"] = {name: digest(tensor) for name, tensor in model.state_dict().items()}
    for drift in (0.0, 0.5):
        model = made("llama")
        with fewbit.DataRecorder(model) as recorder, torch.no_grad():
            model(ids, use_cache=False)
        inputs = fewbit.build_calib_dataset_inputs([recorder.recorded])
        fewbit.run_smooth_quant_for_sequential_layers(model.model.layers, inputs, "W8A8")
        smoothed = {name: digest(tensor) for name, tensor in model.model.layers.state_dict().items()}
        found[f"sequential smoothquant (drift {drift})"] = smoothed
        spec = fewbit.QuantizationSpec(dtype="int4", group_size=32)
        fewbit.run_gptq_for_sequential_layers(model.model.layers, inputs, spec, fewbit.GPTQConfig(drift=drift))
        layers = {name: digest(tensor) for name, tensor in model.model.layers.state_dict().items()}
        found[f"sequential gptq (drift {drift})"] = layers
    return found


def of_revision(revision: str | None, scratch: Path) -> dict[str, dict[str, str]]:
    """The matrix on one revision; None is the working tree."""
    source, output = ROOT / "src", scratch / "found.json"
    if revision is not None:
        tree = scratch / "tree"
        tree.mkdir(parents=True)
        archive = subprocess.run(["git", "archive", revision, "src"], cwd=ROOT, check=True, stdout=subprocess.PIPE)
        subprocess.run(["tar", "-x", "-C", tree], input=archive.stdout, check=True)
        source = tree / "src"
    (scratch / "runs").mkdir(parents=True)
    command = [sys.executable, __file__, "--measure", scratch / "runs", "--json", output]
    subprocess.run(command, check=True, env=os.environ | {"PYTHONPATH": str(source), "OMP_NUM_THREADS": "1"})
    return json.loads(output.read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", nargs="?")
    parser.add_argument("after", nargs="?")
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure is not None:
        args.json.write_text(json.dumps(run_all(args.measure)))
        return
    with tempfile.TemporaryDirectory() as scratch:
        before = of_revision(args.before, Path(scratch) / "before")
        after = of_revision(args.after, Path(scratch) / "after")
    rows = {}
    for case in before | after:
        one, other = before.get(case, {}), after.get(case, {})
        unlike = sorted(name for name in one | other if one.get(name) != other.get(name))
        rows[case] = {"tensors": len(one), "different": unlike}
        print(f"{case:45} {len(one):5} tensors  {f'{len(unlike)} DIFFER: {unlike[0]}' if unlike else 'same bytes'}")
    commit = subprocess.run(["git", "rev-parse", args.before], cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True)
    result = {"date": datetime.date.today().isoformat(), "before": commit.stdout.strip(), "cases": rows}
    args.json.write_text(json.dumps(result, indent=2) + "\n")
    sys.exit(any(row["different"] for row in rows.values()))


if __name__ == "__main__":
    main()

"""What each part of GPTQ brings: relative output error of some blocks' linears, everything before them unquantized.

    python benchmarks/layer_loss.py MODEL_DIR --calibration FILE --json benchmarks/results/layer_loss.json

Prints the geometric mean of tr(ΔHΔᵀ) / tr(WHWᵀ) over the stages of the chosen blocks, relative to the default.
"""

import argparse
import datetime
import json
import math
import time
from dataclasses import replace
from pathlib import Path

import torch
from transformers import AutoTokenizer

from fewbit.algorithms.gptq import gptq
from fewbit.algorithms.rtn import rtn
from fewbit.calibration.tokens import calibration_set
from fewbit.config.algorithms import GPTQConfig
from fewbit.config.spec import QuantizationSpec
from fewbit.engine.staged import StagedForward
from fewbit.engine.stages import Stage, stages_of
from fewbit.models.blockwise import BlockwiseModel
from fewbit.numerics.second_moment import quadratic_form

SPEC = QuantizationSpec(dtype="int4", group_size=64)
AFFINE = QuantizationSpec(dtype="uint4", group_size=64, symmetric=False)
PLAIN = replace(SPEC, observer="minmax")
METHODS = {
    "default": (SPEC, GPTQConfig()),
    "rtn, minmax": (PLAIN, None),
    "rtn, search": (SPEC, None),
    "minmax scales": (PLAIN, GPTQConfig()),
    "minmax scales, columns in order": (PLAIN, GPTQConfig(order="none")),
    "signed-max scales": (replace(SPEC, observer="signed-max"), GPTQConfig()),
    "no refit": (SPEC, GPTQConfig(refits=0)),
    "2 refits": (SPEC, GPTQConfig(refits=2)),
    "group-aware order throughout": (SPEC, GPTQConfig(order="group-aware")),
    "columns in order": (SPEC, GPTQConfig(order="none")),
    "affine": (AFFINE, GPTQConfig()),
}


def collect(model: BlockwiseModel, batches: list, blocks: list[int]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """(weight of the stage, H) of every stage of the chosen blocks."""
    inputs = list(model.enter(batches))
    hidden = [one.hidden for one in inputs]
    found: list[tuple[torch.Tensor, torch.Tensor]] = []

    def keep(stage: Stage) -> None:
        weight = torch.cat([linear.weight.data for linear in stage.members.values()])
        found.append((weight.clone(), stage.statistics.moment.clone()))

    for index in range(max(blocks) + 1):
        with model.loaded(index) as block:

            def forward(batch: int, index: int = index, block: torch.nn.Module = block) -> torch.Tensor:
                return model.call_block(block, hidden[batch], inputs[batch].calls[index])

            groups = model.groups(index) if index in blocks else ()
            stages = stages_of(block, groups, keep)
            StagedForward(stages, [None] * len(hidden), forward).run(hidden.__setitem__, "staged")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model_dir", type=Path)
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--blocks", type=int, nargs="+", default=[0, 5, 10, 15, 20, 25])
    parser.add_argument("--json", type=Path, required=True)
    args = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(args.model_dir)
    data = calibration_set(args.calibration, tokenizer, num_samples=32, sequence_length=512, seed=0)
    stages = collect(BlockwiseModel.from_directory(args.model_dir), data.batches, args.blocks)
    results = {}
    for name, (spec, config) in METHODS.items():
        started = time.perf_counter()
        losses = []
        for weight, moment in stages:
            if config is None:
                outcome = rtn(weight, moment, spec, spec.scale_format(torch.bfloat16))
            else:
                outcome = gptq(weight, moment, spec, spec.scale_format(torch.bfloat16), config)
            error = quadratic_form(outcome.weight.dequantize() - weight, moment).sum()
            losses.append(float(error / quadratic_form(weight, moment).sum()))
        mean = math.exp(sum(map(math.log, losses)) / len(losses))
        results[name] = {"loss": mean, "seconds": time.perf_counter() - started}
        results[name]["relative"] = mean / results["default"]["loss"]
        print(f"{name:34} {mean:.3e}  {results[name]['relative']:.3f}x  {results[name]['seconds']:.1f} s", flush=True)
    report = {"date": datetime.date.today().isoformat(), "model": args.model_dir.name, "methods": results}
    args.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()

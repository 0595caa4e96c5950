"""report.json: every linear, what became of it and what it cost; what else stays as it is; attention; totals;
environment; the recipe."""

import math
import os
import platform
import resource
import sys
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers

from fewbit.config.recipe import Config
from fewbit.contents import LINEAR_SLOTS, Contents
from fewbit.engine.stage_quantizer import LinearResult
from fewbit.errors import CheckpointError
from fewbit.files import read_json_object
from fewbit.runs.plan import Plan
from fewbit.version import __version__

REPORT = "report.json"


def linear_row(name: str, block: int, result: LinearResult, scaling: float | list[float] | None) -> dict[str, Any]:
    """The report's line of a quantized linear; also what the journal keeps."""
    taken = ("tokens", "loss", "error", "energy", "damping", "fallback")
    return {
        "name": name,
        "block": block,
        "status": "quantized",
        **{field: getattr(result, field) for field in taken},
        "seconds": round(result.seconds, 4),
        "bits_per_weight": result.weight.bits_per_weight,
        "weights": result.weight.codes.numel(),
        "scaling": scaling,
    }


def build_report(
    config: Config, plan: Plan, rows: list[dict[str, Any]], run: dict[str, Any], seconds: dict[str, float]
) -> dict[str, Any]:
    """The whole report. `rows` are the quantized linears; `run` says what was quantized, with which data and how."""
    contents = plan.contents
    left = [linear for linear in contents.linears.values() if linear.weight is None]
    untouched: list[dict[str, Any]] = [
        {"name": linear.name, "status": linear.status, "reason": linear.reason, "weights": math.prod(linear.shape)}
        for linear in left
    ]
    for row in rows + untouched:
        if (linear := contents.linears.get(row["name"])) is not None:
            row |= {slot: spec.summary for slot in LINEAR_SLOTS if (spec := getattr(linear, slot)) is not None}
    totals = {
        "linears": dict(Counter(row["status"] for row in rows + untouched)),
        "fallbacks": sum(row["fallback"] is not None for row in rows),
        "bits_per_weight": bits_per_weight(rows),
        "loss": sum(row["error"] for row in rows) / max(sum(row["energy"] for row in rows), 1e-300),
        "seconds": {name: round(value, 2) for name, value in seconds.items()},
        "peak_memory_bytes": peak_memory(),
        "peak_gpu_memory_bytes": torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0,
    }
    return {
        "run": run,
        "totals": totals,
        "warnings": plan.warnings,
        "linears": rows + untouched,
        "untouched": [tensor.row for tensor in plan.untouched],
        "attention": attention_row(contents),
        "environment": {
            "fewbit": __version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "platform": platform.platform(),
            "threads": torch.get_num_threads(),
        },
        "recipe": config.to_dict(),
    }


def attention_row(contents: Contents) -> dict[str, Any] | None:
    """The report's line of what is quantized inside attention; None if nothing is."""
    found = [known.specs for known in contents.attention.values() if known.specs]
    return {"modules": len(found)} | {slot: spec.summary for slot, spec in found[0].items()} if found else None


def bits_per_weight(rows: Iterable[Mapping[str, Any]]) -> float | None:
    """Stored bits per weight of the quantized linears with these rows; None if there are none."""
    rows = list(rows)
    weights = sum(row["weights"] for row in rows)
    return sum(row["bits_per_weight"] * row["weights"] for row in rows) / weights if weights else None


def peak_memory() -> int:
    """Largest resident memory of this process so far, in bytes."""
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    usage = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return usage if sys.platform == "darwin" else usage * 1024


def read_report(directory: Path) -> dict[str, Any]:
    """report.json of a finished run."""
    if not os.path.lexists(directory / REPORT):
        raise CheckpointError(f"{directory} has no {REPORT}: it is no run, or it is not finished (use --resume)")
    return read_json_object(directory / REPORT)

"""report.json: every linear, what became of it and what it cost; what else stays as it is; attention; totals;
environment; the recipe."""

from __future__ import annotations

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
from fewbit.contents import LINEAR_SLOTS, Contents, LinearEntry
from fewbit.engine.stage_quantizer import LinearResult
from fewbit.errors import CheckpointError
from fewbit.files import read_json_object
from fewbit.runs.plan import Plan
from fewbit.version import __version__

REPORT = "report.json"


def linear_row(name: str, block: int, result: LinearResult) -> dict[str, Any]:
    """The report's line of a quantized linear; also what the journal keeps."""
    return {
        "name": name,
        "block": block,
        "status": "quantized",
        "tokens": result.tokens,
        "loss": result.loss,
        "error": result.error,
        "energy": result.energy,
        "damping": result.damping,
        "fallback": result.fallback,
        "seconds": round(result.seconds, 4),
        "bits_per_weight": result.weight.bits_per_weight,
        "weights": result.weight.codes.numel(),
    }


def untouched_row(linear: LinearEntry) -> dict[str, Any]:
    """The report's line of a linear that stays as it is."""
    return {
        "name": linear.name,
        "status": linear.status,
        "reason": linear.reason,
        "weights": linear.shape[0] * linear.shape[1],
    }


def build_report(
    config: Config, plan: Plan, rows: list[dict[str, Any]], run: dict[str, Any], seconds: dict[str, float]
) -> dict[str, Any]:
    """The whole report. `rows` are the quantized linears; `run` says what was quantized, with which data and how."""
    contents = plan.contents
    untouched = [untouched_row(linear) for linear in contents.linears.values() if linear.weight is None]
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
        "environment": environment(),
        "recipe": config.to_dict(),
    }


def attention_row(contents: Contents) -> dict[str, Any] | None:
    """The report's line of what is quantized inside attention; None if nothing is."""
    quantized = [known for known in contents.attention.values() if known.specs]
    if not quantized:
        return None
    return {"modules": len(quantized)} | {slot: spec.summary for slot, spec in quantized[0].specs.items()}


def bits_per_weight(rows: Iterable[Mapping[str, Any]]) -> float | None:
    """Stored bits per weight of the quantized linears with these rows; None if there are none."""
    sizes = [(row["bits_per_weight"], row["weights"]) for row in rows]
    weights = sum(size for _, size in sizes)
    return sum(bits * size for bits, size in sizes) / weights if weights else None


def environment() -> dict[str, Any]:
    """Versions and machine, as far as they can matter for the result."""
    return {
        "fewbit": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "platform": platform.platform(),
        "threads": torch.get_num_threads(),
    }


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

"""The rows of schemes.py as the tables of README.md.

    python benchmarks/schemes_table.py benchmarks/results/schemes.json

A cell is what the algorithm costs: perplexity over full precision's in percent, mean KL divergence, seconds.
"""

import json
import statistics
import sys
from pathlib import Path

ALGORITHMS = ("rtn", "gptq", "awq", "awq+gptq")
COMPARED = ("gptq", "awq+gptq")
"""What is averaged over seeds."""


def cost(row: dict) -> float:
    """Perplexity over full precision's, in percent."""
    return 100 * (row["perplexity"] / row["reference_perplexity"] - 1)


def cell(row: dict | None) -> str:
    return "–" if row is None else f"{cost(row):+.2f} % · {row['kl_mean']:.4f} · {row['seconds']:.0f}"


def table(head: tuple[str, ...], lines: list[tuple[str, ...]]) -> None:
    for cells in (head, ("---",) * len(head), *lines):
        print(f"| {' | '.join(cells)} |")
    print()


def main() -> None:
    every = json.loads(Path(sys.argv[1]).read_text())["rows"]
    rows = [row for row in every if row.get("seed", 0) == 0]
    ours = {(row["model"], row["scheme"], row["algorithm"]): row for row in rows if row["tool"] == "fewbit"}
    lines = []
    for model, scheme in dict.fromkeys((row["model"], row["scheme"]) for row in rows):
        found = [ours.get((model, scheme, algorithm)) for algorithm in ALGORITHMS]
        if any(found):
            bits = next(row["bits_per_weight"] for row in found if row)
            lines.append((model, scheme, f"{bits:.2f}", *map(cell, found)))
    table(("model", "scheme", "bits", *ALGORITHMS), lines)

    others = [row for key, row in ours.items() if key[2] not in ALGORITHMS]
    lines = [(row["model"], row["scheme"], row["algorithm"], cell(row)) for row in others]
    table(("model", "scheme", "algorithm", "fewbit"), lines)

    lines = []
    for row in rows:
        if row["tool"] == "fewbit":
            continue
        same = [mine for mine in ours.values() if (mine["model"], mine["scheme"]) == (row["model"], row["scheme"])]
        best = min(same, key=lambda mine: mine["kl_mean"])
        key = (row["model"], row["scheme"], row["algorithm"])
        lines.append((*key, cell(row), cell(ours.get(key)), f"{cell(best)} ({best['algorithm']})"))
    table(("model", "scheme", "algorithm", "llm-compressor", "fewbit, the same", "fewbit, least KL"), lines)

    lines = []
    ours_by_seed = [row for row in every if row["tool"] == "fewbit" and row["algorithm"] in COMPARED]
    for model, scheme in dict.fromkeys((row["model"], row["scheme"]) for row in ours_by_seed if row.get("seed", 0)):
        for algorithm in COMPARED:
            found = [
                r for r in ours_by_seed if (r["model"], r["scheme"], r["algorithm"]) == (model, scheme, algorithm)
            ]
            costs = [cost(row) for row in sorted(found, key=lambda row: row.get("seed", 0))]
            kl = statistics.fmean(row["kl_mean"] for row in found)
            each = ", ".join(f"{value:+.2f}" for value in costs)
            lines.append((model, scheme, algorithm, each, f"{statistics.fmean(costs):+.2f} %", f"{kl:.4f}"))
    table(("model", "scheme", "algorithm", "cost by seed", "mean cost", "mean KL"), lines)


if __name__ == "__main__":
    main()

"""The rows of schemes.py as the tables of README.md.

    python benchmarks/schemes_table.py benchmarks/results/schemes.json

A cell is what the algorithm costs: perplexity over full precision's in percent, mean KL divergence, seconds.
"""

import json
import sys
from pathlib import Path

ALGORITHMS = ("rtn", "gptq", "awq", "awq+gptq")


def cell(row: dict | None) -> str:
    if row is None:
        return "–"
    cost = 100 * (row["perplexity"] / row["reference_perplexity"] - 1)
    return f"{cost:+.2f} % · {row['kl_mean']:.4f} · {row['seconds']:.0f}"


def line(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def main() -> None:
    rows = json.loads(Path(sys.argv[1]).read_text())["rows"]
    ours = {(row["model"], row["scheme"], row["algorithm"]): row for row in rows if row["tool"] == "fewbit"}
    print(line("model", "scheme", "bits", *ALGORITHMS))
    print("|---" * (3 + len(ALGORITHMS)) + "|")
    for model, scheme in dict.fromkeys((row["model"], row["scheme"]) for row in rows):
        found = [ours.get((model, scheme, algorithm)) for algorithm in ALGORITHMS]
        if any(found):
            bits = next(row["bits_per_weight"] for row in found if row)
            print(line(model, scheme, f"{bits:.2f}", *map(cell, found)))
    others = [row for row in rows if row["algorithm"] not in ALGORITHMS or row["tool"] != "fewbit"]
    print("\n" + line("model", "scheme", "algorithm", "tool", "cost · KL · seconds"))
    print("|---" * 5 + "|")
    for row in others:
        print(line(row["model"], row["scheme"], row["algorithm"], row["tool"], cell(row)))


if __name__ == "__main__":
    main()

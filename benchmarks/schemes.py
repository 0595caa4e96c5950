"""Every scheme by every algorithm: perplexity, KL divergence, bits and seconds, beside llm-compressor where asked.

    python benchmarks/schemes.py MODELS/smollm2 MODELS/smollm2-dithered --calibration CALIBRATION.txt \\
        --evaluation EVALUATION.txt --json benchmarks/results/schemes.json [--peer-python PEER/bin/python]

Weights of 4 bits and less are measured on the dithered model (the other's lie on a 4-bit grid), the rest on the
original. FP8_BLOCK is measured on the model of --blocks, if that is given: SmolLM2's 576 channels are no multiple of
its groups of 128 activations, Gemma 3's are. 32 × 512 tokens, seed 0 (or --seed); 16 windows of 512 of a text that was
not used for calibration. Rows that the JSON has already are not measured again, so the script can be stopped and
started. `--only W8A8:gptq` measures chosen rows.
"""

import argparse
import datetime
import functools
import json
import subprocess
import tempfile
from pathlib import Path

import fewbit

HERE = Path(__file__).parent
ALGORITHMS = ("rtn", "gptq", "awq", "awq+gptq")
SMOOTH = ("smoothquant+gptq", "smoothquant+gptq:drift=0.5")
WIDE = ["W8A8_STATIC", "FP8", "FP8_DYNAMIC", "W8A16-g64", "W8A16_ASYM-g64"]
WIDE += ["MXFP8", "MXFP6", "MXINT8", "MX9", "MX6", "BFP16"]
NARROW = [
    "W4A16-g64",
    "W4A16_ASYM-g64",
    "NVFP4",
    "NVFP4A16",
    "MXFP4",
    "MXFP4A16",
    "W4A8-g64",
    "W4AFP8-g64",
    "W4A4-g64",
]
NARROW += ["W3A16-g64", "W3A16_ASYM-g64", "W2A16-g64", "W2A16_ASYM-g64"]
CACHES = ["KV8", "KVFP8", "KV4"]
PEER = [
    "W8A8:rtn",
    "W8A8:smoothquant+gptq",
    "FP8_DYNAMIC:rtn",
    "NVFP4:rtn",
    "NVFP4:gptq",
    "MXFP4:rtn",
    "W4A16_ASYM-g64:gptq",
]
"""Rows that are measured with llm-compressor, too."""


def rows(only: list[str] | None) -> list[tuple[str, str, str]]:
    """(which model, scheme, algorithm) of everything to measure."""
    found = [("original", "W8A8", algorithm) for algorithm in (*ALGORITHMS, *SMOOTH)]
    # NVFP4 and MXFP4 on the original, too: what others published was measured there
    found += [("original", scheme, algorithm) for scheme in ("NVFP4", "MXFP4") for algorithm in (*ALGORITHMS, *SMOOTH)]
    found += [("original", scheme, "none") for scheme in CACHES]
    found += [("dithered", scheme, algorithm) for scheme in NARROW for algorithm in ALGORITHMS]
    found += [("original", scheme, algorithm) for scheme in WIDE for algorithm in ALGORITHMS]
    found += [("blocks", "FP8_BLOCK", algorithm) for algorithm in ALGORITHMS]
    return [row for row in found if not only or f"{row[1]}:{row[2]}" in only]


def measure(model: Path, scheme: str, algorithm: str, args: argparse.Namespace) -> dict:
    """fewbit's run of one row."""
    config: dict = {"scheme": scheme, "algorithm": algorithm}
    if algorithm == "none":  # the cache alone
        suite = fewbit.Config.from_dict({"scheme": f"W8A16{scheme}"}).attention
        config = {"global_quant_config": {}, "attention": suite, "algorithm": "rtn"}
    with tempfile.TemporaryDirectory() as scratch:
        run = fewbit.quantize(
            model,
            config=config,
            calibration=args.calibration,
            num_samples=args.num_samples,
            sequence_length=512,
            seed=args.seed,
            output=Path(scratch) / "run",
            progress=False,
        )
        totals = run.report["totals"]
        return evaluated(run.directory, model, args) | {
            "bits_per_weight": totals["bits_per_weight"],
            "seconds": totals["seconds"]["total"],
        }


def measure_peer(model: Path, scheme: str, algorithm: str, args: argparse.Namespace) -> dict:
    """llm-compressor's run of one row, in its own environment; measured by the same evaluation."""
    base, _, group = scheme.partition("-g")
    with tempfile.TemporaryDirectory() as scratch:
        result = Path(scratch) / "peer.json"
        command = [args.peer_python, HERE / "llmcompressor_gptq.py", model, scratch, "--calibration", args.calibration]
        command += ["--num-samples", args.num_samples, "--json", result, "--algorithm", algorithm]
        if base.startswith("W4A16"):
            command += ["--group-size", group] + (["--asymmetric"] if base.endswith("ASYM") else [])
        else:
            command += ["--scheme", base]
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        subprocess.run([str(word) for word in command], check=True, **quiet)
        measured = json.loads(result.read_text())
        return evaluated(Path(scratch) / "compressed", model, args) | {"seconds": measured["quantize_seconds"]}


@functools.cache
def reference(model: Path) -> fewbit.Reference:
    return fewbit.Reference(model)


def evaluated(quantized: Path, model: Path, args: argparse.Namespace) -> dict:
    options = {"sequence_length": 512, "max_windows": args.windows, "against": reference(model)}
    found = fewbit.evaluate(quantized, args.evaluation, **options)
    return {
        "perplexity": found.perplexity,
        "reference_perplexity": found.reference_perplexity,
        "kl_mean": found.kl_mean,
        "top1_agreement": found.top1_agreement,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("original", type=Path)
    parser.add_argument("dithered", type=Path)
    parser.add_argument("--blocks", type=Path, help="a model whose channels are multiples of 128")
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--evaluation", type=Path, required=True)
    parser.add_argument("--peer-python", type=Path, help="python of an environment with llmcompressor 0.14")
    parser.add_argument("--only", action="append", help="SCHEME:ALGORITHM; repeatable")
    parser.add_argument("--part", default="0/1", help="I/N: every N-th row from the I-th, to share the work")
    parser.add_argument("--num-samples", type=int, default=32)
    parser.add_argument(
        "--seed", type=int, default=0, help="which windows of the calibration text; fewbit's rows only"
    )
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--json", type=Path, required=True)
    args = parser.parse_args()
    report = {"samples": [args.num_samples, 512], "windows": args.windows, "rows": []}
    if args.json.exists():
        report = json.loads(args.json.read_text())
    known = {
        (row["model"], row["scheme"], row["algorithm"], row["tool"])
        for row in report["rows"]
        if row.get("seed", 0) == args.seed
    }
    wanted = [(*row, "fewbit") for row in rows(args.only) if getattr(args, row[0])]
    if args.peer_python and args.seed == 0:
        wanted += [
            ("dithered" if scheme.startswith("W4") else "original", scheme, algorithm, "llm-compressor")
            for scheme, algorithm in (name.split(":") for name in PEER)
            if not args.only or f"{scheme}:{algorithm}" in args.only
        ]
    part, parts = map(int, args.part.split("/"))
    for which, scheme, algorithm, tool in wanted[part::parts]:
        if (which, scheme, algorithm, tool) in known:
            continue
        run = measure if tool == "fewbit" else measure_peer
        found = run(getattr(args, which), scheme, algorithm, args)
        row = {"model": which, "scheme": scheme, "algorithm": algorithm, "tool": tool, "seed": args.seed} | found
        report["rows"].append(row | {"date": datetime.date.today().isoformat()})
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(report, indent=1) + "\n")
        cost = 100 * (found["perplexity"] / found["reference_perplexity"] - 1)
        print(
            f"{which:9} {scheme:16} {algorithm:17} {tool:15} perplexity {found['perplexity']:8.3f} (+{cost:.2f} %)  "
            f"KL {found['kl_mean']:.5f}  {found['seconds']:.0f} s",
            flush=True,
        )


if __name__ == "__main__":
    main()

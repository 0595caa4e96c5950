"""fewbit schemes"""

from __future__ import annotations


def schemes() -> None:
    """List the named schemes: what they are, bits per weight, where they can be exported to."""
    from rich.console import Console
    from rich.table import Table

    from fewbit.config.schemes import KV_SUITES, SCHEMES
    from fewbit.formats import engines_of_cache, engines_of_scheme

    table = Table(box=None)
    for column in ("scheme", "weight", "input", "bits/weight", "exports", "layout", "engines"):
        table.add_column(column)
    for scheme in SCHEMES.values():
        weight, inputs = scheme.config.weight, scheme.config.input_tensors
        assert weight is not None
        table.add_row(
            scheme.name,
            weight.summary,
            inputs.summary if inputs is not None else "–",
            f"{scheme.bits_per_weight:.3f}",
            ", ".join(scheme.exports) or "–",
            scheme.layout or "–",
            engines_of_scheme(scheme) or "fewbit evaluate",
        )
    console = Console(width=None if Console().is_terminal else 240)
    console.print(table)
    caches = Table(box=None)
    for column in ("KV cache", "key and value", "exports", "engines"):
        caches.add_column(column)
    for suite in KV_SUITES.values():
        engines = engines_of_cache(suite) or "fewbit evaluate, QuantizedCache"
        caches.add_row(suite.name, suite.spec.summary, ", ".join(suite.exports) or "–", engines)
    console.print(caches)
    console.print("Names compose: W4A8KV4-g64 is W4A8 with a 4-bit KV cache and groups of 64 (-g-1: per channel).")
    console.print("What is in brackets is said in full in docs/formats.md and in fewbit-export.json of each export.")

"""fewbit schemes"""


def schemes() -> None:
    """List the named schemes: what they are, bits per weight, where they can be exported to."""
    from rich.console import Console
    from rich.table import Table

    from fewbit.config.schemes import KV_CACHES, SCHEMES
    from fewbit.config.spec import AttentionConfig
    from fewbit.contents import nominal
    from fewbit.formats import holding

    table = Table("scheme", "weight", "input", "bits/weight", "exports", "layout", "engines", box=None)
    for name, config in SCHEMES.items():
        contents = nominal(config)
        exports = holding(contents)
        table.add_row(
            name,
            *(spec.summary if spec is not None else "–" for spec in (config.weight, config.input_tensors)),
            f"{contents.bits_per_weight:.3f}",
            ", ".join(form.name for form in exports) or "–",
            ", ".join(layout for form in exports for layout in form.layouts(contents)) or "–",
            ", ".join(form.engines(contents) for form in exports) or "fewbit evaluate",
        )
    console = Console(width=None if Console().is_terminal else 240)
    console.print(table)
    caches = Table("KV cache", "key and value", "exports", "engines", box=None)
    for name, spec in KV_CACHES.items():
        contents = nominal(attention=AttentionConfig(key=spec, value=spec))
        exports = holding(contents)
        engines = ", ".join(form.engines(contents) for form in exports) or "fewbit evaluate, QuantizedCache"
        caches.add_row(name, spec.summary, ", ".join(form.name for form in exports) or "–", engines)
    console.print(caches)
    console.print("Names compose: W4A8KV4-g64 is W4A8 with a 4-bit KV cache and groups of 64 (-g-1: per channel).")
    console.print("What is in brackets is said in full in docs/formats.md and in fewbit-export.json of each export.")

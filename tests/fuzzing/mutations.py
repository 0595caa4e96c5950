"""Damage of every kind, chosen by a seed: bytes, fields of JSON and YAML, and what lies in a file's place."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

HUGE = 2**36  # bytes of a file that takes no room
ODD: tuple[Callable[[random.Random], Any], ...] = (
    lambda chooser: None,
    lambda chooser: chooser.choice([True, False]),
    lambda chooser: chooser.choice([0, -1, 1, 2, 3, 7, 10**4, 2**31, 2**32, 2**63, 2**64, 10**30, -(10**9)]),
    lambda chooser: chooser.choice([0.0, -0.0, 0.5, 1e308, -1e308, 1e-320, float("nan"), float("inf")]),
    lambda chooser: chooser.choice(["", "x", "\0", "ä\ud800", "../..", "/dev/zero", "x" * 5000, "1", "re:(a|aa)+b"]),
    lambda chooser: chooser.choice([[], [[]], [None], [1, 2, 3], ["a", "b"], list(range(1000))]),
    lambda chooser: chooser.choice([{}, {"": 1}, {"a": {"b": {}}}, {"0": 0}]),
    lambda chooser: _nested(chooser.choice([10, 100, 900])),
)


def mutate(directory: Path, files: list[str], chooser: random.Random) -> str:
    """Damage one of `files` of `directory` in one way; returns in words what was done."""
    name = chooser.choice(files)
    path = directory / name
    ways: list[Callable[[Path, random.Random], str]] = [_bytes, _bytes, _bytes, _place]
    if path.suffix in (".json", ".yaml"):
        ways += [_field] * 5 + [_duplicated_key]
    if path.suffix == ".safetensors":
        ways += [_header] * 3
    if path.suffix == ".jsonl":
        ways += [_line] * 3
    return f"{name}: {chooser.choice(ways)(path, chooser)}"


def _bytes(path: Path, chooser: random.Random) -> str:
    data = bytearray(path.read_bytes())
    if not data:
        return "nothing"
    at = chooser.randrange(len(data))
    length = min(len(data) - at, chooser.choice([1, 2, 8, 64, 1000]))
    way = chooser.choice(["flip", "flip", "flip", "cut", "remove", "double", "insert", "zero", "ones", "empty"])
    if way == "flip":
        data[at] ^= 1 << chooser.randrange(8)
    elif way == "cut":
        del data[at:]
    elif way == "remove":
        del data[at : at + length]
    elif way == "double":
        data[at:at] = data[at : at + length]
    elif way == "insert":
        data[at:at] = chooser.randbytes(length)
    elif way in ("zero", "ones"):
        data[at : at + length] = (b"\0" if way == "zero" else b"\xff") * length
    else:
        data.clear()
    path.write_bytes(data)
    return f"{way} at {at}"


def _place(path: Path, chooser: random.Random) -> str:
    """Something else where the file was."""
    others = sorted(other for other in path.parent.iterdir() if other.is_file() and other != path)
    ways = ["gone", "directory", "pipe", "link to nowhere", "link to itself", "endless", "huge", "other", "swap"]
    way = chooser.choice(ways)
    content = path.read_bytes()
    path.unlink()
    if way == "directory":
        path.mkdir()
    elif way == "pipe":
        os.mkfifo(path)
    elif way == "link to nowhere":
        path.symlink_to("nowhere")
    elif way == "link to itself":
        path.symlink_to(path.name)
    elif way == "endless":
        path.symlink_to("/dev/zero")
    elif way == "huge":
        path.write_bytes(content)
        os.truncate(path, HUGE)
    elif way in ("other", "swap") and others:
        other = chooser.choice(others)
        shutil.copyfile(other, path)
        if way == "swap":
            other.write_bytes(content)
        return f"{way} {other.name}"
    return way


def _field(path: Path, chooser: random.Random) -> str:
    """A field of another kind, gone, or under another name."""
    try:
        data = json.loads(path.read_bytes())
    except ValueError:
        return _bytes(path, chooser)
    told = alter(data, chooser)
    path.write_bytes(json.dumps(data).encode("utf-8", "surrogatepass"))
    return told


def alter(data: Any, chooser: random.Random) -> str:
    """Change one value somewhere inside nested tables and lists."""
    places: list[tuple[Any, Any, str]] = []

    def collect(node: Any, path: str) -> None:
        items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
        for key, value in list(items)[:200]:
            places.append((node, key, f"{path}.{key}"))
            collect(value, f"{path}.{key}")

    collect(data, "")
    if not places:
        return "nothing"
    upper = [place for place in places if place[2].count(".") < 3]
    node, key, path = chooser.choice(places if chooser.random() < 0.5 else upper)
    way = chooser.choice(["odd", "odd", "odd", "odd", "near", "remove", "rename"])
    if way == "remove":
        del node[key]
    elif way == "rename" and isinstance(node, dict):
        node[f"{key}_"] = node.pop(key)
    elif way == "near" and isinstance(node[key], int | float):
        node[key] = chooser.choice([node[key] + 1, node[key] - 1, node[key] * 2, -node[key], float(node[key])])
    else:
        node[key] = chooser.choice(ODD)(chooser)
    return f"{way} {path[:80]}"


def _duplicated_key(path: Path, chooser: random.Random) -> str:
    try:
        data = json.loads(path.read_bytes())
    except ValueError:
        return _bytes(path, chooser)
    if not isinstance(data, dict) or not data:
        return "nothing"
    key = chooser.choice(list(data))
    value = json.dumps(chooser.choice(ODD)(chooser)).encode("utf-8", "surrogatepass")
    start = path.read_bytes().rstrip().removesuffix(b"}")
    path.write_bytes(start + b"," + json.dumps(key).encode() + b":" + value + b"}")
    return f"twice {key}"


def _line(path: Path, chooser: random.Random) -> str:
    lines = path.read_bytes().split(b"\n")
    at = chooser.randrange(len(lines))
    try:
        entry = json.loads(lines[at])
    except ValueError:
        lines.insert(at, chooser.choice([b"[]", b"1", b"null", b"{}", b'{"block": 0}', b"\xff", b"[" * 10_000]))
        path.write_bytes(b"\n".join(lines))
        return "a strange line"
    told = alter(entry, chooser)
    lines[at] = json.dumps(entry).encode("utf-8", "surrogatepass")
    path.write_bytes(b"\n".join(lines))
    return told


def _header(path: Path, chooser: random.Random) -> str:
    """The description at the head of a safetensors file, changed as JSON; the tensors stay."""
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    if length > len(data):
        return _bytes(path, chooser)
    header = json.loads(data[8 : 8 + length])
    inside = header.get("__metadata__", {}).get("fewbit")
    if inside is not None and chooser.random() < 0.6:
        described = json.loads(inside)
        told = "fewbit" + alter(described, chooser)
        header["__metadata__"]["fewbit"] = json.dumps(described)
    else:
        told = alter(header, chooser)
    text = json.dumps(header).encode("utf-8", "surrogatepass")
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])
    return told


def _nested(depth: int) -> Any:
    made: Any = 1
    for _ in range(depth):
        made = [made]
    return made

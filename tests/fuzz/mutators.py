"""Seeded damage: to bytes, to JSON documents (which stay JSON), and to lines of text."""

from __future__ import annotations

import copy
import json
import math
import random
from typing import Any

INTEGERS = (
    0, 1, -1, 2, 3, 7, 8, 127, 128, 255, 256, 511, 512, 1023, 1024, 1025, 32767, 32768, 65535, 65536,
    (1 << 31) - 1, 1 << 31, (1 << 32) - 1, 1 << 32, (1 << 53) + 1, (1 << 62), (1 << 63) - 1, 1 << 63, (1 << 64) - 1,
    -(1 << 31), -(1 << 63),
)  # fmt: skip
_VALUES: tuple[Any, ...] = (
    None, True, False, "", "x", "auto", "\0", "\ud800", "../../etc/passwd", "y" * 5000, "1e999", "-1", [], {}, [[]],
    [None], [1, "a"], {"": None}, 0.0, -0.0, 0.5, -1.5, 1e-320, 1e18, 1e300, -1e300, math.nan, math.inf, -math.inf,
    10**30, -(10**30), 10**400, *INTEGERS,
)  # fmt: skip


def mutate_bytes(rng: random.Random, data: bytes, dictionary: tuple[bytes, ...] = ()) -> bytes:
    """A copy with one to eight faults anywhere."""
    out = bytearray(data)
    for _ in range(rng.choice([1, 1, 2, 4, 8])):
        at = rng.randrange(len(out) + 1)
        what = rng.randrange(8 if dictionary else 7)
        if what == 0 and at < len(out):
            out[at] ^= 1 << rng.randrange(8)
        elif what == 1 and at < len(out):
            out[at] = rng.choice([0, 1, 127, 128, 255, 10, 34, 44, 45, 48, 91, 123])
        elif what == 2:
            width = rng.choice([1, 2, 4, 8])
            out[at : at + width] = (rng.choice(INTEGERS) % (1 << 8 * width)).to_bytes(width, "little")
        elif what == 3:
            del out[at : at + rng.choice([1, 1, 4, 16, 256])]
        elif what == 4:
            out[at:at] = rng.randbytes(rng.choice([1, 1, 4, 16, 256]))
        elif what == 5:
            length = rng.choice([1, 4, 16, 256])
            out[at:at] = out[at : at + length] * rng.choice([1, 2, 50])
        elif what == 6 and rng.random() < 0.5:
            del out[at:]
        elif what == 7:
            out[at:at] = rng.choice(dictionary)
    return bytes(out)


def mutate_json(rng: random.Random, document: Any) -> Any:
    """A copy with one to three faults in its structure."""
    holder = [copy.deepcopy(document)]
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        _one_fault(rng, holder)
    return holder[0]


def _one_fault(rng: random.Random, holder: list[Any]) -> None:
    places: list[tuple[Any, Any]] = [(holder, 0)]
    queue = [holder[0]]
    while queue and len(places) < 5000:
        node = queue.pop()
        keys = list(node) if isinstance(node, dict) else range(len(node)) if isinstance(node, list) else ()
        for key in keys:
            places.append((node, key))
            queue.append(node[key])
    # Deep places outnumber shallow ones by far: choose by depth first where it matters little.
    parent, key = rng.choice(places) if rng.random() < 0.6 else rng.choice(places[: 1 + len(places) // 10])
    what = rng.randrange(8)
    if what <= 3:
        parent[key] = copy.deepcopy(rng.choice(_VALUES))
    elif what == 4 and parent is not holder:
        del parent[key]
    elif what == 5:
        other, at = rng.choice(places)
        parent[key] = copy.deepcopy(other[at] if rng.random() < 0.3 else [parent[key]])
    elif what == 6 and isinstance(parent, list) and parent is not holder:
        parent.insert(key, copy.deepcopy(parent[key]))
    elif what == 7 and isinstance(parent, dict):
        parent[rng.choice(["", "x", "points", "fraction", "bytes", "cpu_us", "é" * 100])] = parent.pop(key)
    elif isinstance(parent[key], (int, float)) and not isinstance(parent[key], bool):
        parent[key] = rng.choice([-parent[key], 0, rng.choice(INTEGERS), str(parent[key])])


def dump_json(rng: random.Random, document: Any) -> bytes:
    """Its text, sometimes with what no document holds: doubled keys, deep nesting, long numbers, broken ends."""
    text = json.dumps(document).encode("utf-8", "replace")
    what = rng.randrange(20)
    if what == 0:
        depth = rng.choice([100, 2000, 100_000])
        nested = rng.choice([b"[" * depth + b"]" * depth, b'{"a":' * depth + b"1" + b"}" * depth, b"[" * depth])
        return text.replace(b"null", nested, 1) if b"null" in text and rng.random() < 0.5 else nested
    if what == 1:
        return text.replace(b"1", b"1" * rng.choice([20, 400, 6000]), 1)
    if what == 2 and text[:1] == b"{":
        return b"{" + text[1:-1] + b", " + text[1:]
    if what == 3:
        return text[: rng.randrange(len(text) + 1)]
    if what == 4:
        return text.decode().encode(rng.choice(["utf-16", "utf-8-sig", "utf-32"]))
    return text


def mutate_lines(rng: random.Random, text: str, separators: str = ",") -> bytes:
    """Cells exchanged, lines removed, doubled, moved, and noise."""
    lines = text.splitlines()
    for _ in range(rng.choice([1, 1, 2, 4])):
        if not lines:
            break
        at = rng.randrange(len(lines))
        what = rng.randrange(6)
        if what == 0:
            del lines[at]
        elif what == 1:
            lines.insert(rng.randrange(len(lines) + 1), lines[at])
        elif what == 2:
            rng.shuffle(lines)
        else:
            separator = rng.choice(separators)
            cells = lines[at].split(separator)
            cells[rng.randrange(len(cells))] = str(
                rng.choice(
                    [*INTEGERS, 10**30, "", "nan", "inf", "-inf", "1e999", '"', "[1, 1]", "x" * 300, "0x10", "1_0", "٣"]
                )
            )
            if rng.random() < 0.2:
                cells.append("1")
            lines[at] = separator.join(cells)
    data = "\n".join(lines).encode("utf-8", "replace")
    return mutate_bytes(rng, data) if rng.random() < 0.3 else data

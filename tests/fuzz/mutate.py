"""Changes to a case: JSON is changed as JSON, so that it gets past the parser; anything else byte by byte."""

from __future__ import annotations

import json
import random
import struct
from typing import Any

NASTY: list[Any] = [
    None, True, False, 0, 1, -1, 2, 3.5, 0.1, -0.0, 1e308, 1e-320, float("nan"), float("inf"), 2**31, 2**63, 2**64,
    -(2**63), 10**400, 10**20, "", "a", "..", "../x", "/etc/passwd", "a/b", "\0", "\x1b[2J", "\u202e", "\ud800",
    "[/]", "{}", "{0}", "{a.b}", "%s", "1e-3", "nan", "0x10", "-1", "*", ".", "x" * 300, "(a+)+b", [], {}, [[]], [{}],
    [None], [0, 1], {"": ""}, {"filter": "a", "value": 0.5}, {"filter": None, "value": None}, {"value": []},
    {"filter": 1}, [1, [2, [3]]], "ties", "linear", "wemoe", "adamerging", "emr", "base", "union", "float16", "F32",
    "BF16", "low_rank", "layers",
]  # fmt: skip
"""Values that once broke some program."""
TOKENS = [
    b"{", b"}", b"[", b"]", b":", b",", b'"', b"\\u0000", b"\\ud800", b"\n", b"\0", b"&a ", b"*a", b"<<: *a",
    b"!!binary ", b"!!python/object:os.system ", b"!!set ", b"!!timestamp ", b"2024-13-45", b"0x_", b"1:60", b"- ",
    b"? ", b"| ", b"---\n", b"9" * 30, b"9" * 5000, b"[" * 200, b"-.inf", b".nan", b"null", b"true", b"\xff\xfe",
    b"\xef\xbb\xbf", b"%YAML 9.9\n",
]  # fmt: skip


def mutate(data: bytes, dice: random.Random, others: list[bytes]) -> bytes:
    """One to four changes."""
    framed = len(data) > 8 and struct.unpack("<Q", data[:8])[0] <= len(data) - 8 and data[8:9] in b"{["
    head, body, tail = b"", data, b""
    if framed:  # a safetensors header: its JSON is changed, and its length mostly corrected
        length = struct.unpack("<Q", data[:8])[0]
        head, body, tail = data[:8], data[8 : 8 + length], data[8 + length :]
    for _ in range(dice.randint(1, 4)):
        body = _as_json(body, dice) if dice.random() < 0.6 else _as_bytes(body, dice, others)
    if framed and dice.random() < 0.85:
        head = struct.pack("<Q", len(body))
    if framed and dice.random() < 0.2:
        tail = _as_bytes(tail, dice, others)
    return (head + body + tail)[:20_000]


def _as_json(data: bytes, dice: random.Random) -> bytes:
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        return _as_bytes(data, dice, [])
    places: list[tuple[Any, Any]] = []
    _walk(value, places, 0)
    if not places:
        value = dice.choice(NASTY)
    else:
        holder, key = dice.choice(places)
        turn = dice.random()
        if turn < 0.5:
            holder[key] = dice.choice(NASTY)
        elif turn < 0.65:
            del holder[key]
        elif turn < 0.8 and isinstance(holder, dict):
            name = dice.choice([item for item in NASTY if isinstance(item, str)])
            holder[name] = holder.pop(key)
        else:
            other, place = dice.choice(places)
            holder[key] = json.loads(json.dumps(other[place])) if place in other or isinstance(other, list) else None
    try:
        return json.dumps(value).encode()
    except (RecursionError, ValueError):
        return data


def _walk(value: Any, places: list[tuple[Any, Any]], depth: int) -> None:
    if depth > 20 or len(places) > 500:
        return
    keys = list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    for key in keys:
        places.append((value, key))
        _walk(value[key], places, depth + 1)


def _as_bytes(data: bytes, dice: random.Random, others: list[bytes]) -> bytes:
    at = dice.randint(0, len(data))
    end = min(len(data), at + dice.choice([1, 1, 2, 8, 64]))
    turn = dice.randrange(5)
    if turn == 0:
        return data[:at] + dice.choice(TOKENS) + data[at:]
    if turn == 1:
        return data[:at] + data[end:]
    if turn == 2:
        return data[:at] + dice.randbytes(end - at) + data[end:]
    if turn == 3:
        return data[:at] + data[at:end] * dice.randint(2, 4) + data[end:]
    other = dice.choice(others) if others else data
    cut = dice.randint(0, len(other))
    return data[:at] + other[cut:]

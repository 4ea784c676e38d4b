"""What can be wrong with the bytes of any file, and with the header and the numbers of a safetensors file."""

from __future__ import annotations

import json
import random
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

Mutation = Callable[[Path, random.Random], None]

NAMES = [
    "",
    "\0",
    "a" * 5000,
    "../../x",
    "x\ny",
    "é.q",
    "__metadata__",
    "base_model.model.lora_A.weight",
    "lora_B",
    ".",
    "a..b",
]


def truncated(file: Path, chance: random.Random) -> None:
    """The end is missing."""
    content = file.read_bytes()
    file.write_bytes(content[: chance.randrange(len(content) + 1)])


def flipped(file: Path, chance: random.Random) -> None:
    """Some bits are others."""
    content = bytearray(file.read_bytes())
    for _ in range(chance.randint(1, 8) if content else 0):
        # Headers are where it matters: half of the flips are among the first bytes.
        place = chance.randrange(min(len(content), 400) if chance.random() < 0.5 else len(content))
        content[place] ^= 1 << chance.randrange(8)
    file.write_bytes(content)


def spliced(file: Path, chance: random.Random) -> None:
    """A piece stands in another place, too: in the place of what was there, or between."""
    content = file.read_bytes()
    start, place = (chance.randrange(len(content) + 1) for _ in range(2))
    piece = content[start : start + chance.randrange(1, 400)]
    file.write_bytes(content[:place] + piece + content[place + chance.choice([0, len(piece)]) :])


def overwritten(file: Path, chance: random.Random) -> None:
    """A piece is noise, or zeros."""
    content = bytearray(file.read_bytes())
    place, count = chance.randrange(len(content) + 1), chance.randrange(1, 300)
    content[place : place + count] = chance.randbytes(count) if chance.random() < 0.5 else bytes(count)
    file.write_bytes(content)


def no_file(file: Path, chance: random.Random) -> None:
    """Nothing, a folder, a link to nowhere or to itself, noise, or an empty file in its place."""
    file.unlink()
    kind = chance.randrange(6)
    if kind == 1:
        file.mkdir()
    elif kind == 2:
        file.symlink_to("/nowhere/at/all")
    elif kind == 3:
        file.symlink_to(file.name)
    elif kind == 4:
        file.write_bytes(chance.randbytes(300))
    elif kind == 5:
        file.write_bytes(b"")


ANY_FILE: tuple[Mutation, ...] = (truncated, flipped, spliced, overwritten, no_file)


def split(file: Path) -> tuple[dict[str, Any], bytes]:
    """Header and data of a safetensors file."""
    content = file.read_bytes()
    length = struct.unpack("<Q", content[:8])[0]
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def join(file: Path, header: object, data: bytes, length: int | None = None) -> None:
    """A file of them, whatever they are."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)


def wrong_length(file: Path, chance: random.Random) -> None:
    """The header's length is huge, or off."""
    header, data = split(file)
    text = json.dumps(header).encode()
    off = [0, 1, len(text) - 1, len(text) + 1, len(text) + len(data), 10**12, 2**63 - 1, 2**63, 2**64 - 1, 99_999_999]
    join(file, text, data, chance.choice(off))


def wrong_entry(file: Path, chance: random.Random) -> None:
    """One tensor's place, shape or type is another one, or none."""
    header, data = split(file)
    names = [name for name in header if name != "__metadata__"]
    name, other = chance.sample(names, 2)
    entry = header[name]
    field = chance.choice(["data_offsets", "shape", "dtype", "entry"])
    start, end = entry["data_offsets"]
    if field == "data_offsets":
        values = [
            header[other]["data_offsets"], [end, start], [start, end + 4], [start - 4, end], [-8, end], [start, 2**63], [start],
            [start, end, end], "all", None, [start, None], [0.5, end], [2**64, 2**64 + 8], [start, start], [10**400, 5],
        ]  # fmt: skip
    elif field == "shape":
        shape = [*entry["shape"], 1, 1][:2]
        values = [
            [-1, *shape[1:]], [2**40, 2**40], [2**63, 1], [*shape, 1], shape[::-1], [], [0, *shape[1:]], None, "2x3", [shape],
            [1] * 5000, [1.5, 2], [shape[0] * shape[1]], [1, *shape], [True, True], [*shape, 0],
        ]  # fmt: skip
    elif field == "dtype":
        values = [
            "I8",
            "F8_E4M3",
            "F8_E5M2",
            "BOOL",
            "U8",
            "I64",
            "C64",
            "F16",
            "BF16",
            "F64",
            "I32",
            "XX",
            "",
            None,
            5,
            ["F32"],
            "f32",
        ]
    else:
        values = [None, [], {}, 5, "x", {**entry, "more": 1}, {"dtype": "F32"}]
    value = chance.choice(values)
    header[name] = value if field == "entry" else {**entry, field: value}
    join(file, header, data)


def wrong_names(file: Path, chance: random.Random) -> None:
    """Tensors are called otherwise, are missing, are there twice, or have changed their names with others."""
    header, data = split(file)
    names = [name for name in header if name != "__metadata__"]
    name, other = chance.sample(names, 2)
    kind = chance.randrange(6)
    if kind == 0:
        header[chance.choice(NAMES)] = header.pop(name)
    elif kind == 1:
        del header[name]
    elif kind == 2:
        text = json.dumps(header)[:-1] + f", {json.dumps(name)}: {json.dumps(header[other])}}}"
        join(file, text.encode(), data)
        return
    elif kind == 3:
        header[name], header[other] = header[other], header[name]
    elif kind == 4:
        header["\ud800.lora_A.weight"] = header.pop(name)
    else:
        swap = {"lora_A": "lora_B", "lora_B": "lora_A"}
        header[next((name.replace(a, b) for a, b in swap.items() if a in name), "x") + chance.choice(["", ".x"])] = (
            header.pop(name)
        )
    join(file, header, data)


def wrong_json(file: Path, chance: random.Random) -> None:
    """The header is JSON of another kind, or none."""
    header, data = split(file)
    kinds: list[object] = [
        [], 5, None, {}, b"[" * 100_000, b'{"a":' * 100_000, b"{", b"\xff\xfe{}", b"nul", json.dumps(header).encode("utf-16"),
        {**header, "__metadata__": 5}, {**header, "__metadata__": {"a": 1}}, {**header, "__metadata__": {"dc_merge": "x" * 10**6}},
        json.dumps(header).encode() + b" " * 1000, json.dumps(header).encode() + b"\0\0", json.dumps(header).encode()[:-1] + b",}",
    ]  # fmt: skip
    join(file, chance.choice(kinds), data)


def wrong_numbers(file: Path, chance: random.Random) -> None:
    """NaN, infinities, numbers beyond all bounds, or zeros among or instead of the numbers."""
    header, data = split(file)
    content = bytearray(data)
    value = chance.choice([float("nan"), float("inf"), -float("inf"), 3e38, 1e-45, 0.0, 1e20, -1e38])
    packed = struct.pack("<f", value)
    if chance.random() < 0.5:
        place = 4 * chance.randrange(len(content) // 4)
        content[place : place + 4] = packed
    else:
        content[:] = packed * (len(content) // 4)
    join(file, header, bytes(content))


SAFETENSORS: tuple[Mutation, ...] = (
    wrong_length, wrong_entry, wrong_entry, wrong_names, wrong_names, wrong_json, wrong_numbers, *ANY_FILE,
)  # fmt: skip

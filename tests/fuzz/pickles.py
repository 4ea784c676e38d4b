"""Pickles that would run code, fill the memory, or hold other things than tensors."""

from __future__ import annotations

import pickle
import random
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from tests.fuzz.damage import ANY_FILE, Mutation

FLAG = "ran"  # the file that a pickle whose code ran would make


class Runs:
    """Runs code where it is loaded without care."""

    def __init__(self, function: Callable[..., Any], *arguments: object) -> None:
        self.made = (function, arguments)

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[object, ...]]:
        return self.made


def runs_code(file: Path, chance: random.Random) -> None:
    """As torch saves it, or as a bare pickle; by a system call, by eval, or by opening a file."""
    import os

    flag = str(file.parent / FLAG)
    evil = chance.choice([Runs(os.system, f"touch {flag}"), Runs(eval, f"open({flag!r}, 'w')"), Runs(open, flag, "w")])
    state = {**_state(file), "evil": evil}
    kind = chance.randrange(3)
    if kind == 2:
        file.write_bytes(pickle.dumps(state))
    else:
        torch.save(state, file, _use_new_zipfile_serialization=kind == 0)


def takes_memory(file: Path, chance: random.Random) -> None:
    """Terabytes, of which the file has none: by views, by sizes that are claimed, by calls, or packed."""
    state = _state(file)
    key = next(iter(state))
    kind = chance.randrange(5)
    if kind == 0:
        torch.save({**state, key: torch.ones(1).expand(10**6, 10**6)}, file)
    elif kind == 1:
        torch.save({**state, "x": Runs(bytearray, 2**44)}, file)
    elif kind == 2:
        with zipfile.ZipFile(file) as archive:
            entries = {entry.filename: archive.read(entry) for entry in archive.infolist()}
        data = next(name for name in entries if "/data/" in name)
        entries[data] += bytes(200_000_000)
        with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, content in entries.items():
                archive.writestr(name, content)
    elif kind == 3:
        torch.save({**state, key: torch.empty(10**7, 10**7, device="meta")}, file)
    else:
        torch.save(state, file, _use_new_zipfile_serialization=False)
        file.write_bytes(file.read_bytes().replace(b"K\x10", b"\x8a\x06\xff\xff\xff\xff\xff\x7f", 1))


def holds_other_things(file: Path, chance: random.Random) -> None:
    """No dict, other keys than text, and values that are no dense tensors of numbers."""
    state = _state(file)
    key = next(iter(state))
    deep: Any = ()
    for _ in range(500):
        deep = (deep, deep)
    odd: list[Any] = [
        [], 5, None, torch.ones(2), {}, {1: torch.ones(2, 2)}, {**state, key: "text"}, {**state, key: None}, {**state, key: [1.0]},
        {**state, key: state[key].to_sparse()}, {**state, key: state[key].to(torch.complex64)}, {**state, key: state[key] > 0},
        {**state, key: torch.quantize_per_tensor(state[key], 0.1, 0, torch.qint8)}, {**state, "\ud800": state[key]},
        {**state, "x": deep}, {"state_dict": state}, {**state, key: torch.ones(0)}, {**state, key: state[key].int()},
        OrderedDict(state), {**state, key: state[key][:, :0]}, {**state, key: torch.tensor(1.0)}, {**state, key: state[key] * torch.nan},
    ]  # fmt: skip
    torch.save(chance.choice(odd), file)


def _state(file: Path) -> dict[str, torch.Tensor]:
    return torch.load(file, weights_only=True)


PICKLES: tuple[Mutation, ...] = (runs_code, takes_memory, holds_other_things, holds_other_things, *ANY_FILE)

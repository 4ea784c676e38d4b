"""Merged modules on disk, one small file each, so that a merge can be interrupted or shared out among processes.

What is read back is what was written, to the last bit. A file bears the checksum of its content in its name and is put there whole:
one that was cut off or damaged is as good as none, and its module is merged again.
"""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeAlias

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from dc_merge_peft.dense import Delta, Dense
from dc_merge_peft.filed_dense import FiledDense
from dc_merge_peft.lowrank import LowRank
from dc_merge_peft.methods.rescaling import AlphaFit, Rule
from dc_merge_peft.paths import is_file
from dc_merge_peft.plan import PlannedModule
from dc_merge_peft.reading import Reader
from dc_merge_peft.sources.dora import DoraSource
from dc_merge_peft.spanned import Spanned
from dc_merge_peft.work.whole import write_whole

# Of one module: the merged delta, all its singular values (None if it is dense), its terms of alpha="auto".
Finished: TypeAlias = tuple[Delta, "Tensor | None", AlphaFit]

_FILE = re.compile(r"(?P<index>\d{6})\.(?P<checksum>[0-9a-f]{8})\.(?P<kind>module|numbers)")
_NAME = "module"  # the entry of a file's header that says of which module it is
_CHUNK = 1 << 22  # bytes of a file that are checked at a time


@dataclass(frozen=True, eq=False)
class WorkFolder:
    """The finished modules of one merge in a folder."""

    folder: Path
    reader: Reader
    lazily: bool = False  # give back deltas that were put off as they are, else multiplied out
    filed: bool = False  # leave dense deltas in their files, else read them
    _indices: Mapping[str, int] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_indices", {module.name: i for i, module in enumerate(self.reader.plan.modules)})

    def keep(self, module: PlannedModule, finished: Finished) -> Finished:
        """Write a finished module.

        Returns:
            The same; a dense delta's file is now one of this folder.

        Raises:
            OSError: there is no room, or the folder is gone.
        """
        delta, S, fit = finished
        index = self._indices[module.name]
        tensors = {"sizes": torch.tensor(fit, dtype=torch.float64), "losses": self._losses(module)}
        if S is not None:
            tensors["S"] = S
        if isinstance(delta, FiledDense):
            checksum = _checksum_of(delta.file)
            tensors["numbers"] = torch.tensor(checksum)
            delta = delta.moved(self._name(index, "numbers", checksum))
        elif isinstance(delta, Dense):
            tensors["W"] = delta.W
        elif isinstance(delta, Spanned):
            tensors |= {"left": delta.left, "right": delta.right}
            tensors["scale"] = torch.tensor([delta.scale], dtype=torch.float64)
        else:
            tensors |= {"B": delta.B, "A": delta.A}
        content = save(dict(map(_stored, tensors.items())), {_NAME: module.name})
        write_whole(self._name(index, "module", zlib.crc32(content)), content)
        return delta, S, fit

    def found(self, modules: Iterable[PlannedModule]) -> Iterator[Finished | None]:
        """For each module what is there of it; None where nothing is, or nothing whole."""
        files: dict[tuple[int, str], list[Path]] = {}
        for file in self.folder.iterdir():
            if match := _FILE.fullmatch(file.name):
                files.setdefault((int(match["index"]), match["kind"]), []).append(file)
        for module in modules:
            index = self._indices[module.name]
            of_module, numbers = (files.get((index, kind), []) for kind in ("module", "numbers"))
            found = (self._read(module, file, numbers) for file in of_module)
            yield next((finished for finished in found if finished is not None), None)

    def _read(self, module: PlannedModule, file: Path, numbers: Sequence[Path]) -> Finished | None:
        try:
            content = file.read_bytes()
            if not _names(file, zlib.crc32(content)):
                return None
            tensors = dict(map(_restored, load(content).items()))
            if _name_in(content) != module.name:  # that of another module under this one's name
                return None
            S, (asked, found, asked_fourth, found_fourth, rule) = tensors.get("S"), tensors["sizes"].tolist()
            fit = AlphaFit(asked, found, asked_fourth, found_fourth, Rule(int(rule)))
            delta = self._delta(module, tensors, numbers)
            if delta is None or delta.shape != module.shape:
                return None
            self._recall(module, tensors["losses"])
        except (OSError, SafetensorError, KeyError, ValueError, TypeError, ArithmeticError, RuntimeError):
            return None  # not one that this version has written
        return delta, None if S is None else S.to(delta.device), fit

    def _delta(self, module: PlannedModule, tensors: Mapping[str, Tensor], numbers: Sequence[Path]) -> Delta | None:
        where = self.reader.device_of(module)
        if "left" in tensors:
            left, right = tensors["left"].to(where), tensors["right"].to(where)
            read = self.reader.rereading(module)
            delta = Spanned(left, right, module.shape, read, float(tensors["scale"]))
            return delta if self.lazily else delta.to(torch.float32)
        if "B" in tensors:
            return LowRank(tensors["B"].to(where), tensors["A"].to(where))
        if "W" in tensors:
            return Dense(tensors["W"].to(where))
        for file in numbers:
            checksum = _checksum_of(file)
            if checksum == int(tensors["numbers"]) and _names(file, checksum):
                filed = FiledDense.at(file, module.shape)
                return filed if self.filed else Dense(filed.W.clone().to(where))
        return None

    def _losses(self, module: PlannedModule) -> Tensor:
        """(T, 2) float64: of each task that is DoRA what its reading lost and the whole, else zeros."""
        sources = [self.reader.sources[task] for task in module.tasks]
        losses = [source.loss(module.name) if isinstance(source, DoraSource) else (0.0, 0.0) for source in sources]
        return torch.tensor(losses, dtype=torch.float64)

    def _recall(self, module: PlannedModule, losses: Tensor) -> None:
        for task, (lost, whole) in zip(module.tasks, losses.tolist(), strict=True):
            source = self.reader.sources[task]
            if isinstance(source, DoraSource):
                source.recall(module.name, (lost, whole))

    def _name(self, index: int, kind: str, checksum: int) -> Path:
        return self.folder / f"{index:06d}.{checksum:08x}.{kind}"


def tidy(folder: Path, keep: Callable[[Path], bool]) -> None:
    """Delete what interrupted processes have left behind half-written among the finished modules."""
    for file in folder.iterdir():
        if is_file(file) and not _FILE.fullmatch(file.name) and not keep(file):
            file.unlink()


# Products of a matrix add up in an order that depends on how it lies in memory, so that it comes back as it was.
_TURNED = "^T"


def _stored(item: tuple[str, Tensor]) -> tuple[str, Tensor]:
    name, tensor = item[0], item[1].cpu()
    if tensor.ndim == 2 and not tensor.is_contiguous() and tensor.mT.is_contiguous():
        return name + _TURNED, tensor.mT
    return name, tensor.contiguous()


def _restored(item: tuple[str, Tensor]) -> tuple[str, Tensor]:
    name, tensor = item
    return (name.removesuffix(_TURNED), tensor.mT) if name.endswith(_TURNED) else (name, tensor)


def _name_in(content: bytes) -> object:
    """The name of the module, from a whole file."""
    return json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])["__metadata__"][_NAME]


def _checksum_of(file: Path) -> int:
    checksum = 0
    with file.open("rb", buffering=0) as opened:
        while chunk := opened.read(_CHUNK):
            checksum = zlib.crc32(chunk, checksum)
    return checksum


def _names(file: Path, checksum: int) -> bool:
    match = _FILE.fullmatch(file.name)
    return match is not None and match["checksum"] == f"{checksum:08x}"

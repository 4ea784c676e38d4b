"""A fused model written straight from the files of its base: some rows of a tensor at a time, several threads side by side."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor

from dc_merge_peft.dense import Delta, Dense
from dc_merge_peft.lowrank import LowRank
from dc_merge_peft.outputs.companions import copy_companions
from dc_merge_peft.outputs.directory import whole_directory
from dc_merge_peft.outputs.files import write_at
from dc_merge_peft.outputs.full_means import Mean
from dc_merge_peft.outputs.fused_changes import Changes, Edit, Group
from dc_merge_peft.outputs.fused_papers import write_papers
from dc_merge_peft.outputs.fused_targets import Target, refuse_unless_finite
from dc_merge_peft.outputs.shards import Shard, plan_shards, write_headers, write_index
from dc_merge_peft.outputs.written import Written
from dc_merge_peft.parallel import in_parallel, one_thread
from dc_merge_peft.progress import Progress, silent
from dc_merge_peft.result import MergeResult
from dc_merge_peft.sources.base_files import COMPANIONS
from dc_merge_peft.sources.base_names import FiledModel
from dc_merge_peft.sources.stored import StoredTensor

# Entries of a piece of a matrix: its product, sum and rounding take place in 2 MB that stay in the processor's cache.
PIECE = 2**19
# Bytes of a piece that is copied.
COPY = 2**22

# Changes numbers, flat, in place.
Change = Callable[[Tensor, "Scratch"], object]


class Scratch(threading.local):
    """Memory that each thread uses again: new pages for every piece would cost as much as its arithmetic."""

    def __init__(self) -> None:
        self._bytes, self._floats = bytearray(COPY), _floats(PIECE)

    def bytes(self, count: int) -> memoryview:
        """Room for so many bytes."""
        return memoryview(self._bytes if count <= len(self._bytes) else bytearray(count))[:count]

    def floats(self, like: Tensor) -> Tensor:
        """A float32 tensor of the same shape."""
        count = like.numel()
        held = self._floats if count <= len(self._floats) else _floats(count)
        return held[:count].view(like.shape)


def _floats(count: int) -> Tensor:
    """Room for float32 numbers, whatever a script has made the default."""
    with torch.inference_mode(False):  # it may outlive that of a script
        return torch.empty(count, dtype=torch.float32, device="cpu")


@dataclass(frozen=True)
class Piece:
    """Bytes of a stored tensor, what is done to them, and where they go."""

    name: str
    tensor: StoredTensor
    start: int
    count: int
    file: Path
    offset: int
    edit: Change | None = None

    def carry_out(self, scratch: Scratch) -> None:
        """Read, change, write.

        Raises:
            OutputError: a changed number is not finite.
        """
        content = scratch.bytes(self.count)
        self.tensor.read_into(content, self.start)
        if self.edit is not None and self.count:
            numbers = torch.frombuffer(content, dtype=self.tensor.torch_dtype or torch.uint8)
            self.edit(numbers, scratch)
            refuse_unless_finite(numbers, self.name)
        write_at(self.file, self.offset, content)


def stream_fused(
    model: FiledModel,
    changes: Changes,
    result: MergeResult,
    out: str | Path,
    *,
    overwrite: bool = False,
    max_shard_size: int | str | None = None,
    work: Path | None = None,
    progress: Progress = silent,
) -> Path:
    """Write the base model with the merge in its weights, whole or not at all; the files differ from the base's own in the
    tensors that change, and in how the tensors are divided over files.

    With a folder of this merge's own as ``work`` the files are made there; those that are complete stay if the writing ends early,
    and are not written again.

    Raises:
        OptionError: no size of a file.
        OutputError: the directory exists or can't be written.
        SourceError: a file of the base model can't be read.
    """
    written = None if work is None else Written(work)
    with whole_directory(out, overwrite=overwrite, kept=None if written is None else written.building) as building:
        shards = plan_shards(model.files.tensors, max_shard_size)
        left = shards if written is None else written.left(shards)
        write_headers(left, building)
        write_index(shards, building)
        places = {
            key: (building / shard.name, offset) for shard in shards for key, offset in shard.layout.places.items()
        }
        pieces = _Pieces(model, changes, result, places)
        everything: list[str | Group] = [*model.files.tensors, *changes.groups]
        rounds = list(_rounds(left, changes, model.files.tensors)) if written else [(everything, [])]
        units = iter(progress([unit for some, _ in rounds for unit in some], "fusing"))
        carry_out = partial(Piece.carry_out, scratch=Scratch())
        with one_thread() as threads:
            for some, complete in rounds:
                work_left = (piece for unit in islice(units, len(some)) for piece in pieces.of(unit))
                for _ in in_parallel(carry_out, work_left, workers=threads, on_cpu=lambda _: True):
                    pass
                for shard in complete:
                    assert written is not None
                    written.add(shard)
        model.files.copy_config(building)
        code = ("*.py",) if model.files.config.get("auto_map") else ()
        copy_companions(model.files.folder, building, (*COMPANIONS, *code))
        write_papers(result, building, model.files.base)
    return Path(out).expanduser()


def _rounds(
    left: Sequence[Shard], changes: Changes, tensors: Mapping[str, StoredTensor]
) -> Iterator[tuple[list[str | Group], list[Shard]]]:
    """The work on some files in an order that completes one after the other; which are complete after each part. Groups, which may
    reach over several, come last."""
    groups = [group for group in changes.groups if any(key in shard.tensors for shard in left for key in group.keys)]
    late = {key for group in groups for key in group.keys}
    for shard in left:
        yield [key for key in tensors if key in shard.layout.places], [shard] if late.isdisjoint(shard.tensors) else []
    yield [*groups], [shard for shard in left if not late.isdisjoint(shard.tensors)]


@dataclass(frozen=True)
class _Pieces:
    """The work to do, made as it is needed: the merged deltas of one tensor are scaled when its turn comes."""

    model: FiledModel
    changes: Changes
    result: MergeResult
    places: Mapping[str, tuple[Path, int]]  # by stored tensor: file and offset of its first byte

    def of(self, unit: str | Group) -> Iterator[Piece]:
        """All pieces of a stored tensor, or of a group of them; none of a tensor that a group has."""
        if isinstance(unit, Group):
            yield from self._of_group(unit)
        elif unit in self.changes.edits:
            yield from self._edited(unit, self.changes.edits[unit])
        elif unit in self.changes.means:
            yield from self._averaged(unit, self.changes.means[unit])
        elif unit not in self.changes.keys:
            yield from self._copied(unit, 0, self.model.files.tensors[unit].size)

    def _piece(self, key: str, start: int, count: int, edit: Change | None = None) -> Piece:
        file, offset = self.places[key]
        return Piece(key, self.model.files.tensors[key], start, count, file, offset + start, edit)

    def _copied(self, key: str, start: int, count: int) -> Iterator[Piece]:
        for first in range(start, start + count, COPY):
            yield self._piece(key, first, min(COPY, start + count - first))

    def _edited(self, key: str, edit: Edit) -> Iterator[Piece]:
        tensor = self.model.files.tensors[key]
        if edit.extras:
            yield self._piece(key, 0, tensor.size, partial(self._whole, edit, tensor.shape))
            return
        slices = {target.place.layout.number(target.name): target for target in edit.targets}
        count = tensor.shape[0] if edit.targets[0].in_stack(tensor.shape) else 1
        for number in range(count):
            size = tensor.size // count
            if number in slices:
                yield from self._rows(key, number * size, slices[number])
            else:
                yield from self._copied(key, number * size, size)

    def _averaged(self, key: str, mean: Mean) -> Iterator[Piece]:
        tensor, shares = self.model.files.tensors[key], mean.shares(self.result)
        names = [info.name for info in self.result.adapters]
        step = PIECE * tensor.itemsize
        for start in range(0, tensor.size, step):
            add = partial(mean.add, shares, names, start // tensor.itemsize)
            yield self._piece(key, start, min(step, tensor.size - start), add)

    def _rows(self, key: str, start: int, target: Target) -> Iterator[Piece]:
        """The rows of a matrix, or of one expert's, that lies at ``start``."""
        rows = _RowsOf(self.result.scaled(target.name), target.flipped)
        bytes_a_row = rows.width * self.model.files.tensors[key].itemsize
        step = max(PIECE // rows.width, 1)
        for first in range(0, rows.count, step):
            last = min(first + step, rows.count)
            yield self._piece(
                key, start + first * bytes_a_row, (last - first) * bytes_a_row, partial(rows.add, first, last)
            )

    def _whole(self, edit: Edit, shape: Sequence[int], numbers: Tensor, scratch: Scratch) -> None:
        whole = numbers.view(tuple(shape))
        for change in edit.extras:
            change.apply(whole, self.result.extras.values[change.name].value)
        for target in edit.targets:
            rows = _RowsOf(self.result.scaled(target.name), target.flipped)
            rows.add(0, rows.count, target.part_of(whole).view(-1), scratch)

    def _of_group(self, group: Group) -> Iterator[Piece]:
        deltas = {name: self._delta(name, targets) for name, targets in group.parameters.items()}
        for key, delta in self.model.to_stored(deltas).items():
            yield self._piece(key, 0, self.model.files.tensors[key].size, partial(_add_tensor, delta))

    def _delta(self, name: str, targets: Sequence[Target]) -> Tensor:
        """The float32 delta of a whole parameter, zero in experts that are not merged."""
        whole, scratch = torch.zeros(self.model.shape(name), dtype=torch.float32), Scratch()
        for target in targets:
            rows = _RowsOf(self.result.scaled(target.name), target.flipped)
            rows.add(0, rows.count, target.part_of(whole).view(-1), scratch)
        return whole


class _RowsOf:
    """A merged delta as the rows of the matrix that a weight is in memory: of its (n, m) transpose where it is flipped."""

    def __init__(self, delta: Delta, flipped: bool) -> None:
        if isinstance(delta, LowRank):
            delta = delta.to(torch.float32)  # both factors at once
            left, right = (delta.A.mT, delta.B.mT) if flipped else (delta.B, delta.A)
            self._left, self._right = left.cpu(), right.cpu()
        else:
            self._left, self._right = (delta.W.mT if flipped else delta.W).cpu(), None
        m, n = delta.shape
        self.count, self.width = (n, m) if flipped else (m, n)

    def add(self, first: int, last: int, numbers: Tensor, scratch: Scratch) -> None:
        """Add these rows to as many rows of a weight, in float32, or in float64 to such numbers, and round once."""
        weight, left = numbers.view(last - first, self.width), self._left[first:last]
        if weight.dtype == torch.float64:
            weight.add_(left if self._right is None else left @ self._right)
            return
        wide = weight if weight.dtype == torch.float32 else scratch.floats(weight).copy_(weight)
        if self._right is None:
            wide.add_(left)
        else:
            wide.addmm_(left, self._right)
        if wide is not weight:
            weight.copy_(wide)


def _add_tensor(delta: Tensor, numbers: Tensor, scratch: Scratch) -> None:
    """The same with a delta in the shape of the stored tensor."""
    whole = _RowsOf(Dense(delta.reshape(1, -1)), flipped=False)
    whole.add(0, 1, numbers, scratch)

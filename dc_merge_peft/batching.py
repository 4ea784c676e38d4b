"""Modules of equal shapes through a method as one stack, which keeps a GPU busy: merged one by one, each asks it for hundreds of tiny
pieces of work and waits for some of them. The results are the same to rounding.

What is not ordinary (dependent columns, tasks without their full rank, more directions than room) is left to be merged by itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from dc_merge_peft.budget import MOST_IN_A_BATCH, batch_room, working_bytes
from dc_merge_peft.linalg import FLOAT32_EPS, alike, null_thresholds
from dc_merge_peft.lowrank import LowRank
from dc_merge_peft.methods import Method
from dc_merge_peft.methods.base import ModuleTasks
from dc_merge_peft.methods.rescaling import AlphaFit, Rule
from dc_merge_peft.one_module import refuse_overflow
from dc_merge_peft.plan import PlannedModule
from dc_merge_peft.spanned import Spanned
from dc_merge_peft.stacked import StackedFrame, StackedMerge, StackedSVD, StackedTasks, stacked_factors, svds_of_stacks
from dc_merge_peft.work.finished import Finished

NO_ROOM: type[Exception] = getattr(torch, "OutOfMemoryError", torch.cuda.OutOfMemoryError)
# Reads the factors of a module's tasks again.
Reread: TypeAlias = Callable[[], Sequence[LowRank]]


def batches(
    modules: Iterable[PlannedModule], method: Method, together: Callable[[PlannedModule], bool]
) -> Iterator[list[PlannedModule]]:
    """Modules that follow each other and are read together, as many as have room.

    Args:
        modules: Drawn as they are needed.
        method: Which merges them.
        together: Whether a module may be with others; it is alone where not.
    """
    batch: list[PlannedModule] = []
    taken, room = 0, batch_room(None)
    for module in modules:
        size, joins = working_bytes(method, module), together(module)
        if batch and (not joins or taken + size > room or len(batch) == MOST_IN_A_BATCH):
            yield batch
            batch, taken = [], 0
        batch.append(module)
        taken += size
        if not joins:
            yield batch
            batch, taken = [], 0
    if batch:
        yield batch


@dataclass(frozen=True, eq=False)
class Stacker:
    """Merges modules of equal shapes together."""

    method: Method
    merge: StackedMerge
    svd_rank: int | None

    def merged(
        self, planned: Sequence[PlannedModule], modules: Sequence[ModuleTasks], reads: Sequence[Reread | None]
    ) -> list[Finished | None]:
        """The result of each module; None where it is to be merged by itself.

        Args:
            planned: The modules.
            modules: What was read of them.
            reads: Reads it again where the result is put off until it is looked at.

        Raises:
            MergeError: a delta beyond float32.
        """
        found: list[Finished | None] = [None] * len(modules)
        for kind, indices in alike(map(_kind, modules)).items():
            if kind is None:
                continue
            room = batch_room(modules[indices[0]].tasks[0].device)
            count = max(room // working_bytes(self.method, planned[indices[0]]), 1)
            for start in range(0, len(indices), count):
                some = indices[start : start + count]
                # One is no batch. A decomposition that fails says nothing about the others, and a stack without room nothing about its
                # members; each is tried by itself then.
                with suppress(torch.linalg.LinAlgError, NO_ROOM):
                    if len(some) > 1:
                        self._merge([modules[index] for index in some], [reads[index] for index in some], some, found)
        return found

    def _merge(
        self,
        modules: Sequence[ModuleTasks],
        reads: Sequence[Reread | None],
        places: Sequence[int],
        found: list[Finished | None],
    ) -> None:
        """Modules of one shape; what can be merged this way goes to its place in ``found``."""
        X, Y = stacked_factors([_lowranks(module) for module in modules])
        rows, columns = StackedFrame.of(X), StackedFrame.of(Y)
        weights = torch.tensor([list(module.weights) for module in modules], dtype=torch.float64, device=X.device)
        tasks, ordinary = _cores(rows, columns, modules[0], weights)
        largest = (weights.abs() * tasks.norms).amax(1)
        chosen = [index for index, fine in enumerate(ordinary.tolist()) if fine]
        if not chosen:
            return
        for index, size in zip(chosen, largest[ordinary].tolist(), strict=True):
            refuse_overflow(size, "weighted delta", modules[index].name, self.method)
        if len(chosen) < len(modules):
            rows, columns, weights, largest = (
                rows.select(ordinary), columns.select(ordinary), weights[ordinary], largest[ordinary],
            )  # fmt: skip
            tasks = _selected(tasks, ordinary)
        (U, S, Vh), fine = self.merge(tasks)
        norms = S.norm(dim=1)
        # Nothing but rounding, as of adapters that cancel: noise must not become an adapter.
        S = S.where((norms > FLOAT32_EPS * largest)[:, None], 0)
        merged = StackedSVD(U, S, Vh)
        rule, fits = _fits(tasks, merged, takes_apart=self.method.takes_apart)
        counts = (null_thresholds(S, S.shape[-1]) < S).sum(1)
        numbers = torch.stack([fine.double(), norms, *fits, counts.double()], dim=1).tolist()
        cut = merged.truncate(self.svd_rank or sum(task.rank for task in modules[0].tasks))
        # Balanced factors; a column beyond a module's own rank is left out below.
        root = cut.S.sqrt()[:, None, :]
        left = rows.transform @ (cut.U * root)  # (b, k, r)
        right = columns.transform @ (cut.Vh.mT * root)
        full = None
        for place, (index, (is_fine, norm, *terms, count)) in enumerate(zip(chosen, numbers, strict=True)):
            if not is_fine:
                continue
            refuse_overflow(norm, "merged delta", modules[index].name, self.method)
            rank, read = min(int(count), cut.S.shape[-1]), reads[index]
            if read is not None:
                shape = modules[index].tasks[0].shape
                delta: LowRank = Spanned(left[place, :, :rank].clone(), right[place, :, :rank].clone(), shape, read)
            else:
                if full is None:  # one product a side for all
                    full = (_times(rows, left), _times(columns, right))
                B, A = full[0][place, :, :rank], full[1][place, :, :rank].mT
                delta = LowRank(_own(B), _own(A))
            found[places[index]] = delta, S[place, : int(count)].clone(), AlphaFit(*terms, rule=rule)


def _times(frame: StackedFrame, coefficients: Tensor) -> Tensor:  # (b, m, r) float32
    """From coefficients of the stacked factors back to the full space."""
    return (frame.basis @ coefficients).to(torch.float32)


def _own(factor: Tensor) -> Tensor:
    """A copy, so that a kept result does not hold on to those of its whole batch."""
    return factor.clone(memory_format=torch.contiguous_format)


def _lowranks(module: ModuleTasks) -> list[LowRank]:
    return [task for task in module.tasks if isinstance(task, LowRank)]


def _kind(module: ModuleTasks) -> tuple[object, ...] | None:
    """What modules of one stack have in common; None for one that must be by itself."""
    tasks = _lowranks(module)
    k = sum(task.rank for task in tasks)
    if len(tasks) < len(module.tasks) or k > min(tasks[0].shape) or not all(task.rank for task in tasks):
        return None
    return tasks[0].device, *((task.B.shape, task.A.shape, task.B.dtype, task.A.dtype) for task in tasks)


def _cores(
    rows: StackedFrame, columns: StackedFrame, like: ModuleTasks, weights: Tensor
) -> tuple[StackedTasks, Tensor]:
    """The tasks of all modules, of which ``like`` is one, in k x k coordinates, and (b,) which modules are ordinary."""
    ranks = [task.rank for task in _lowranks(like)]
    B, A = rows.coordinates.split(ranks, dim=2), columns.coordinates.mT.split(ranks, dim=1)
    svds, full = svds_of_stacks(B, A)
    return StackedTasks(B, A, svds, weights, like.shape), rows.fine & columns.fine & full


def _selected(tasks: StackedTasks, which: Tensor) -> StackedTasks:
    """Some of the modules."""
    svds = (StackedSVD(*(part[which] for part in svd)) for svd in tasks.svds)
    B, A = (tuple(factor[which] for factor in factors) for factors in (tasks.B, tasks.A))
    return StackedTasks(B, A, tuple(svds), tasks.weights[which], tasks.shape)


def _fits(tasks: StackedTasks, merged: StackedSVD, *, takes_apart: bool) -> tuple[Rule, list[Tensor]]:
    """The terms of ``alpha="auto"`` of each module, (b,) each, as :func:`dc_merge_peft.methods.rescaling.fit_alpha` has them."""
    weights = tasks.weights.abs()
    shares = weights / weights.sum(1, keepdim=True).clamp(min=torch.finfo(weights.dtype).tiny)

    def asked(power: int) -> Tensor:
        sizes = torch.stack([svd.S.pow(power).sum(1) for svd in tasks.svds], dim=1)  # (b, T)
        return (shares * tasks.weights.pow(power) * sizes).sum(1)

    if not takes_apart:
        return Rule.SIZE, [asked(2), merged.S.pow(2).sum(1), asked(4), merged.S.pow(4).sum(1)]
    left, right = merged.U * merged.S[:, None, :], merged.Vh
    inside = [(svd.U.mT @ left) @ (right @ svd.Vh.mT) for svd in tasks.svds]  # (b, r_i, r_i) each
    found = torch.stack([block.square().sum((1, 2)) for block in inside], dim=1)
    return Rule.INSIDE, [asked(2), (shares * found).sum(1)]

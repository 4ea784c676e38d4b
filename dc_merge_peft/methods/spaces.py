"""The spaces in which task vectors are merged entry by entry: of the parameters, and the shared cover space (Section 3).

Energy smoothing and cover space are the paper's two switches (Table 6): they belong to the space, so that every element-wise
aggregation can have them.
"""

from __future__ import annotations

import dataclasses
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from dc_merge_peft.dense import Delta, Dense, Widened, leading_svd, row_blocks
from dc_merge_peft.linalg import SVD, alike
from dc_merge_peft.lowrank import LowRank
from dc_merge_peft.methods.base import MethodConfig, ModelWideMethod, ModuleMerge, ModuleTasks, Sweep
from dc_merge_peft.methods.basis import optimized_basis
from dc_merge_peft.methods.cover import cover_basis, crowding, from_cover, leading_svds
from dc_merge_peft.methods.options import option
from dc_merge_peft.methods.smoothing import Smoothing, smooth_energy


@dataclasses.dataclass(frozen=True, kw_only=True)
class SmoothingConfig(MethodConfig):
    """Options of energy smoothing, and how much of each task takes part."""

    smoothing: Smoothing = option(
        "none",
        "energy smoothing: 'linear' (Eq. 39-40), 'average' (Eq. 38) or 'none'; the sum of the singular values stays the same",
    )
    rho: float = option(
        5.0,
        "largest ratio of the first to the last singular value after linear smoothing",
        minimum=1,
        only={"smoothing": ("linear",)},
    )
    tau: float = option(
        0.0,
        "share of the original singular values mixed back in: 0 smooths fully, 1 not at all (Eq. 41)",
        minimum=0,
        maximum=1,
        only={"smoothing": ("linear", "average")},
    )
    rank: int | None = option(
        None, "singular components used of each task (the paper's r); none: all of them", minimum=1
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class CoverConfig(SmoothingConfig):
    """Options of energy smoothing and of the cover space."""

    basis: Literal["whitening", "optimized"] = option(
        "whitening",
        "how the cover basis is found: 'whitening' of the stacked bases (Eq. 25), or 'optimized', ascent on Eq. 8 "
        "(Algorithm 2)",
        only={"cover": (True,)},
    )
    basis_steps: int = option(
        500,
        "maximum number of steps of basis=optimized; it stops earlier on convergence",
        minimum=0,
        only={"basis": ("optimized",)},
    )
    basis_lr: float = option(
        0.5,
        "length of the first step of basis=optimized; later ones adapt",
        minimum=1e-6,
        maximum=1e6,
        only={"basis": ("optimized",)},
    )
    mask: bool = option(
        True, "in cover space, keep only each task's own block of the merged core (Eq. 11)", only={"cover": (True,)}
    )
    mask_size: int | None = option(
        None,
        "keep squares of this size along the diagonal instead of the tasks' blocks (Figure 5)",
        minimum=1,
        only={"mask": (True,), "cover": (True,)},
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class SpaceConfig(CoverConfig):
    """Options of an element-wise method: the paper's two switches."""

    cover: bool = option(False, "merge in the shared cover space (Section 3) instead of entry by entry of dW")


@dataclasses.dataclass(frozen=True, eq=False)
class View:
    """One module's weighted task vectors as matrices of one shape, and the way back to the module."""

    module: ModuleTasks
    matrix: Callable[[int], Tensor]  # of task i
    back: Callable[[Tensor], Delta]
    ranks: Sequence[int] = ()  # in cover space, each task's directions: their sum is k
    turned: bool = False  # the entries are those of another basis than dW's own: what is 0 there is rounding noise

    def matrices(self) -> Iterator[Tensor]:
        """One after the other: in parameter space each is m x n, and two at a time are enough."""
        return map(self.matrix, range(len(self.module.tasks)))


Views: TypeAlias = Callable[[], Iterator[View]]
Aggregate: TypeAlias = Callable[[View], Tensor]


def magnitudes(views: Views) -> Iterator[tuple[int, Tensor]]:
    """Those of every adapter's entries, module by module."""
    for view in views():
        for adapter, X in zip(view.module.adapters, view.matrices(), strict=True):
            yield adapter, X.abs()


class ElementwiseMethod(ModelWideMethod):
    """A method that is a rule on entries, in any space."""

    @abstractmethod
    def view(self, module: ModuleTasks) -> View:
        """The module's task vectors in the method's space."""

    @abstractmethod
    def survey(self, views: Views) -> Aggregate:
        """The rule; one that needs numbers of the whole model first goes through ``views()``."""

    def prepare(self, sweep: Sweep) -> ModuleMerge:
        aggregate = self.survey(lambda: map(self.view, sweep()))

        def merge(module: ModuleTasks) -> Delta:
            view = self.view(module)
            return view.back(aggregate(view))

        return merge


class SwitchedMethod(ElementwiseMethod):
    """A rule on entries with the paper's two switches: energy smoothing, and cover space or parameter space."""

    @property
    def space(self) -> SpaceConfig:
        """The options of the space; a subclass adds those of its rule."""
        assert isinstance(self.config, SpaceConfig)
        return self.config

    @property
    def equivariant(self) -> bool:
        return self.space.cover

    def view(self, module: ModuleTasks) -> View:
        return (cover_view if self.space.cover else parameter_view)(module, self.space)

    def remarks(self, shape: tuple[int, int], ranks: Sequence[int]) -> Iterable[str]:
        return crowding(shape, ranks, self.space.rank) if self.space.cover else ()


def smoothed(svds: Sequence[SVD], config: SmoothingConfig) -> list[SVD]:
    """Algorithm 1, line 6: energy smoothing of each task vector; those of one rank together."""
    found = list(svds)
    for places in alike(len(svd.S) for svd in svds).values():
        S = torch.stack([svds[place].S for place in places])
        for place, values in zip(
            places, smooth_energy(S, config.smoothing, rho=config.rho, tau=config.tau), strict=True
        ):
            found[place] = svds[place]._replace(S=values)
    return found


def smoothed_tasks(tasks: Sequence[Delta], config: SmoothingConfig) -> Sequence[Delta]:
    """The task vectors cut to ``rank`` and energy smoothed; as they are where nothing is to be done."""
    if config.smoothing == "none" and config.rank is None:
        return tasks
    return [LowRank.from_svd(svd) for svd in smoothed([leading_svd(task, config.rank) for task in tasks], config)]


def parameter_view(module: ModuleTasks, config: CoverConfig) -> View:
    """The entries of dW: float32 (m, n) matrices, made when they are looked at. The product runs in float64, which
    neither autocast nor TF32 settings reach, some rows at a time."""
    tasks = smoothed_tasks(module.tasks, config)

    def matrix(index: int) -> Tensor:
        task, weight = tasks[index], module.weights[index]
        if isinstance(task, Widened) and (product := task.weighted(weight)) is not None:
            return product
        X = torch.empty(task.shape, dtype=torch.float32, device=task.device)
        for rows in row_blocks(task.shape):
            X[rows] = task.rows(rows) * weight
        return X

    return View(module, matrix, Dense)


def cover_view(module: ModuleTasks, config: CoverConfig) -> View:
    """The cover space: k x k matrices ``M_i = U~^T dW_i V~`` (Eq. 10) through their factors, and ``U~ (M * mask) V~^T``
    (Eq. 11) as the way back."""
    # Line 5: rank-r SVD of each task vector; an orthonormal basis has room for min(m, n) directions.
    original = leading_svds(module.tasks, config.rank)
    # Line 6: smoothing; then the weights, which multiply the smoothed task vectors.
    svds = smoothed(original, config)
    S = [weight * svd.S for svd, weight in zip(svds, module.weights, strict=True)]
    # Lines 9-10: the cover basis, (m, k) and (n, k); by Algorithm 2 from the task vectors as they are.
    if config.basis == "whitening":
        U_cover, V_cover = cover_basis([svd.U for svd in svds]), cover_basis([svd.Vh.mT for svd in svds])
    else:
        U_cover, V_cover, _ = optimized_basis(original, steps=config.basis_steps, lr=config.basis_lr)

    # Line 12, Eq. 10: each smoothed task vector in cover space, k x k. T of them are more numbers than anything else here.
    ranks = [len(svd.S) for svd in svds]
    left = ((U_cover.mT @ torch.cat([svd.U for svd in svds], dim=1)) * torch.cat(S)).split(ranks, dim=1)
    right = (torch.cat([svd.Vh for svd in svds]) @ V_cover).split(ranks)

    def M(task: int) -> Tensor:
        return left[task] @ right[task]

    # Lines 15-16, Eq. 11: mask, and back to parameter space.
    def back(merged: Tensor) -> LowRank:
        return from_cover(U_cover, V_cover, merged, ranks, mask=config.mask, mask_size=config.mask_size)

    return View(module, M, back, ranks, turned=True)

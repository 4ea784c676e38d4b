"""Averages over tasks and seeds with 95 % intervals: test examples are drawn again within each task, the same ones for every
model, so that differences between models are paired."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dc_merge_peft.metrics import average_normalized_accuracy

DRAWS = 2000
LEVEL = 0.95


@dataclass(frozen=True)
class Interval:
    """An average and the bounds of its interval."""

    value: float
    low: float
    high: float

    @classmethod
    def of(cls, value: float, draws: Tensor) -> Interval:
        """The percentile interval of bootstrap draws (draws,) around the value measured."""
        low, high = torch.quantile(draws, torch.tensor([(1 - LEVEL) / 2, (1 + LEVEL) / 2], dtype=draws.dtype)).tolist()
        return cls(value, low, high)


@dataclass(frozen=True, eq=False)
class Drawn:
    """One model's accuracies, those of the data first and then those of every draw."""

    accuracy: Tensor  # (seeds, tasks, 1 + draws), float64


class Resampling:
    """Draws of the test examples of some tasks, for any number of models."""

    def __init__(self, sizes: Mapping[str, int], draws: int = DRAWS) -> None:
        """
        Args:
            sizes: Number of test examples by task.
            draws: How often they are drawn.
        """
        self.tasks = tuple(sizes)
        self._counts = {}
        for number, (task, size) in enumerate(sizes.items()):
            generator = torch.Generator().manual_seed(number)
            drawn = torch.randint(size, (draws, size), generator=generator)
            counts = torch.zeros(draws, size, dtype=torch.float64)
            counts.scatter_add_(1, drawn, torch.ones_like(drawn, dtype=torch.float64))
            self._counts[task] = torch.cat([torch.ones(1, size, dtype=torch.float64), counts]) / size

    def accuracies(self, hits: Sequence[Mapping[str, str]]) -> Drawn:
        """Of one model, from its hits by task for every seed."""
        seeds = [torch.stack([self._counts[task] @ digits(found[task]) for task in self.tasks]) for found in hits]
        return Drawn(torch.stack(seeds))


def digits(hits: str) -> Tensor:
    """(examples,) float64."""
    return torch.tensor([float(hit) for hit in hits], dtype=torch.float64)


def mean_accuracy(model: Drawn) -> Interval:
    """Average accuracy over seeds and tasks."""
    means = model.accuracy.mean(dim=(0, 1))
    return Interval.of(float(means[0]), means[1:])


def mean_normalized(model: Drawn, own: Drawn) -> Interval:
    """Average normalized accuracy (Eq. 29) over seeds and tasks; both accuracies are of the same draws."""
    means = normalized(model, own)
    return Interval.of(sum(by_seed(model, own)) / len(model.accuracy), means[1:])


def mean_difference(model: Drawn, other: Drawn, own: Drawn) -> Interval:
    """How much higher the average normalized accuracy is than another model's."""
    means = normalized(model, own) - normalized(other, own)
    return Interval.of(float(means[0]), means[1:])


def normalized(model: Drawn, own: Drawn) -> Tensor:  # (1 + draws,)
    """Average normalized accuracy of the data and of every draw.

    In a draw in which a task's own adapter is never right, it counts as right half as often as in the worst draw in which it is: few
    examples have such draws.
    """
    worst = own.accuracy.where(own.accuracy > 0, torch.inf).amin(dim=-1, keepdim=True).nan_to_num(posinf=0.0)
    return (model.accuracy / own.accuracy.maximum(worst / 2).clamp_min(1e-9)).mean(dim=(0, 1))


def by_seed(model: Drawn, own: Drawn) -> list[float]:
    """Average normalized accuracy for each seed's adapters."""
    pairs = zip(model.accuracy[..., 0].tolist(), own.accuracy[..., 0].tolist(), strict=True)
    return [average_normalized_accuracy(merged, individual) for merged, individual in pairs]

"""Methods that need statistics of the tasks' own data: what those are, and how a method gets them.

A method works on tensors alone. Where they come from, files or a model and a dataloader, is the business of
:mod:`dc_merge_peft.statistics`.
"""

from __future__ import annotations

import copy
import dataclasses
import math
import os
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from dc_merge_peft.dense import Delta
from dc_merge_peft.errors import IncompatibleAdaptersError, OptionError, SourceError, first_line
from dc_merge_peft.lowrank import LowRank, all_finite
from dc_merge_peft.methods.base import Method, MethodConfig, ModuleMerge, ModuleTasks, Sweep
from dc_merge_peft.methods.options import option

Kind = Literal["fisher", "gram"]
KINDS: dict[Kind, str] = {"fisher": "the diagonal Fisher information", "gram": "Gram matrices of inputs"}
SAME_NORM = 0.01  # up to which two norms are of one delta: it may have been rounded to bfloat16 on its way to a file
IN_MEMORY = "<in memory"  # how the name of statistics begins that are in no file
COLLECTING = "collect them with dc_merge_peft.statistics.fisher or .input_grams from each task's own model and data"


@dataclass(frozen=True, eq=False)
class Statistics:
    """Statistics of one task's data at the layers of its own fine-tuned model.

    ======== ======== ===========================================================================================
    kind     shape    what it is
    ======== ======== ===========================================================================================
    fisher   (m, n)   mean over examples of the squared gradient of the log-likelihood by each entry of the weight
    gram     (n, n)   ``X^T X / N``, X (N, n) the inputs of the layer
    ======== ======== ===========================================================================================
    """

    kind: Kind
    # by the path of the layer in the base model, float32; of a file read when looked at
    tensors: Mapping[str, Tensor] = field(repr=False)
    examples: int  # how many they are from
    rule: str = ""  # in words, how exactly they were collected
    location: str | None = None  # the file they are in
    # ||dW||_F of the task's own adapter, by the path of the layer, where it was active in a PEFT model; a merge compares them.
    delta_norms: Mapping[str, float] = dataclasses.field(default_factory=dict)

    def __str__(self) -> str:
        return self.location or f"{IN_MEMORY}: {self.kind} of {self.examples} examples>"


@dataclass(frozen=True, eq=False)
class GivenStatistics:
    """The value of the option ``statistics``: files, or statistics in memory, one an adapter."""

    parts: tuple[str | Statistics, ...] = ()

    words: ClassVar[str] = "files of statistics, one an adapter, as in a.safetensors,b.safetensors"

    @classmethod
    def parsed(cls, value: Any) -> GivenStatistics | None:
        """From what Python, YAML or the command line gives; None where it is something else."""
        if isinstance(value, cls):
            return value
        if value is None:
            return cls()
        if isinstance(value, str):
            value = [part.strip() for part in value.split(",") if part.strip()]
        if not isinstance(value, (list, tuple)):
            return None
        parts = [os.fspath(part) if isinstance(part, os.PathLike) else part for part in value]
        return cls(tuple(parts)) if all(isinstance(part, (str, Statistics)) for part in parts) else None

    def __str__(self) -> str:
        return ",".join(map(str, self.parts)) or "none"


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataMethodConfig(MethodConfig):
    """Options of methods that need statistics of the tasks' data."""

    statistics: GivenStatistics = option(
        GivenStatistics(),
        "statistics of each adapter's own data, in the adapters' order: files saved by dc_merge_peft.statistics",
    )

    def to_dict(self) -> dict[str, Any]:
        """Plain values; statistics by their files."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {**values, "statistics": [str(part) for part in self.statistics.parts]}


def statistics_places(options: Mapping[str, Any]) -> list[str]:
    """The files of statistics among a method's options, as users name them."""
    given = GivenStatistics.parsed(options.get("statistics"))
    return [] if given is None else [str(part) for part in given.parts]


class DataMethod(Method):
    """A method that gets statistics beside the deltas. The engine opens them and hands them over by :meth:`informed`."""

    kind: ClassVar[Kind]
    statistics: Sequence[Statistics] = ()  # opened, one an adapter of the merge

    @property
    def given(self) -> tuple[str | Statistics, ...]:
        """What the option ``statistics`` holds."""
        assert isinstance(self.config, DataMethodConfig)
        return self.config.statistics.parts

    def informed(self, statistics: Sequence[Statistics]) -> DataMethod:
        """The same method with opened statistics, one an adapter, all of its kind."""
        found = copy.copy(self)
        found.statistics = tuple(statistics)
        return found

    @property
    def equivariant(self) -> bool:
        return False  # statistics belong to the layers' own bases

    def shape_of(self, shape: tuple[int, int]) -> tuple[int, int]:
        """The shape of a module's statistics, from the (m, n) of its delta."""
        return shape if self.kind == "fisher" else (shape[1], shape[1])

    def merge(self, tasks: Sequence[Delta], weights: Sequence[float]) -> Delta:
        raise OptionError(
            f"method '{self.name}' merges with statistics of the tasks' data, which belong to named modules: expected a merge of "
            "adapters, or merge_with, which takes them"
        )

    def prepare(self, sweep: Sweep) -> ModuleMerge:
        if not self.statistics:
            raise missing(self)

        def merge(module: ModuleTasks) -> Delta:
            statistics = self.of(module)
            try:
                return self.merge_with(module.tasks, module.weights, statistics)
            except torch.linalg.LinAlgError as error:
                raise SourceError(
                    f"the statistics of '{module.name}' have directions of negative energy ({first_line(error)}): expected Gram matrices "
                    "X^T X of each adapter's own inputs; collect them again"
                ) from error

        return merge

    def of(self, module: ModuleTasks) -> list[Tensor]:
        """One tensor a task of the module, as it is kept, on the tasks' device.

        Raises:
            IncompatibleAdaptersError: one of them is of another adapter.
            SourceError: one of them holds what no such statistics can.
        """
        found = []
        for adapter, task in zip(module.adapters, module.tasks, strict=True):
            given = self.statistics[adapter]
            refuse_others(given, module.name, task)
            values = given.tensors[module.name].to(task.device)
            if not all_finite(values):
                raise spoilt(given, module.name, "NaN or Inf", "finite numbers")
            low = values.diagonal() if self.kind == "gram" else values
            if bool((low < 0).any()):
                raise spoilt(given, module.name, "negative squares", "sums of squares")
            if self.kind == "gram" and not torch.allclose(values, values.mT, rtol=1e-4, atol=1e-6 * float(low.amax())):
                raise spoilt(given, module.name, "a matrix that is not symmetric", "X^T X")
            if self.kind == "gram" and bool((values.abs() > _largest(low)).any()):
                raise spoilt(given, module.name, "products larger than the squares of their inputs allow", "X^T X")
            found.append(values)
        return found

    @abstractmethod
    def merge_with(self, tasks: Sequence[Delta], weights: Sequence[float], statistics: Sequence[Tensor]) -> Delta:
        """Merge the deltas of one module; see :meth:`Method.merge`.

        Args:
            tasks: (m, n) each, float64.
            weights: One factor a task.
            statistics: One tensor a task, of :meth:`shape_of`, float32 or wider.
        """


def _largest(squares: Tensor) -> Tensor:
    """(n, n): what no product of two inputs whose squares have these sums (n,) can exceed, but for rounding."""
    root = squares.to(torch.float64).sqrt()
    return root[:, None] * root * (1 + max(1e-3, 4 * torch.finfo(squares.dtype).eps)) + 1e-6 * float(squares.amax())


def missing(method: DataMethod) -> OptionError:
    """No statistics were given."""
    return OptionError(
        f"method '{method.name}' needs {KINDS[method.kind]} of each adapter's or model's own data, and found none: expected "
        f"statistics=[...], one for each (-O statistics=FILE,FILE); {COLLECTING}"
    )


def refuse_others(statistics: Statistics, module: str, task: Delta) -> None:
    """Refuse statistics that were collected with another adapter than the one that they are given for. Of a full model nothing can be told:
    once an adapter is in its weights and they are rounded, the change has another norm.

    Raises:
        IncompatibleAdaptersError: the adapter's delta had another norm then.
    """
    expected = statistics.delta_norms.get(module) if isinstance(task, LowRank) else None
    if expected is not None and not math.isclose(found := task.norm(), expected, rel_tol=SAME_NORM, abs_tol=1e-30):
        raise IncompatibleAdaptersError(
            f"the statistics {statistics} were collected with an adapter whose change of '{module}' has the norm {expected:.4g}, and stand in "
            f"the place of one that has {found:.4g}: expected one an adapter, in the adapters' order, each from that adapter as it is merged; "
            "check the order, or collect them again"
        )


def spoilt(statistics: Statistics, module: str, found: str, expected: str) -> SourceError:
    """Numbers that no statistics can have."""
    return SourceError(
        f"the statistics {statistics} hold {found} at '{module}': expected {expected}; collect them again"
    )

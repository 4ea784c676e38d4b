"""What a merging method is: a frozen config and one function from the deltas of a module to the merged one."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, ClassVar, Literal, TypeAlias

from dc_merge_peft.dense import Delta
from dc_merge_peft.methods.options import build_config, check_config, option
from dc_merge_peft.stacked import StackedMerge

ALPHA_HELP = "factor on the merged delta; 'auto' makes it as large as the tasks' deltas, without data"


@dataclasses.dataclass(frozen=True, kw_only=True)
class MethodConfig:
    """Options that every method has. Subclasses add their own fields; each field is one option everywhere."""

    alpha: float | Literal["auto"] = option(1.0, ALPHA_HELP)

    def __post_init__(self) -> None:
        check_config(self)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for YAML or JSON."""
        return dataclasses.asdict(self)


@dataclasses.dataclass(frozen=True, eq=False)
class ModuleTasks:
    """The deltas that meet in one module."""

    name: str  # path in the base model
    tasks: Sequence[Delta]  # of one (m, n), scaling folded in, float64
    weights: Sequence[float]  # w_i multiplies task i's delta
    adapters: Sequence[int]  # which adapters of the merge they are, ascending
    size: tuple[int, int] | None = None  # of the module, where the tasks are cores of it; None: that of the tasks

    @property
    def shape(self) -> tuple[int, int]:
        """(m, n) of the module itself."""
        return self.size or self.tasks[0].shape


# All modules of the merge, one after the other; each call reads them again.
Sweep: TypeAlias = Callable[[], Iterator[ModuleTasks]]
# One module's merged delta before alpha: same shape and device as the tasks.
ModuleMerge: TypeAlias = Callable[[ModuleTasks], Delta]


class Method(ABC):
    """One merging method with its options.

    A subclass names itself and its source, gives its config class, and implements :meth:`merge`. To join the library
    it takes one row in :data:`dc_merge_peft.methods.METHODS`; the command line, PEFT, the saved provenance and the
    docs read everything else from here.

    ``alpha`` is applied by the engine, after the merge, so that it can be fitted or changed without merging again.
    """

    name: ClassVar[str]
    title: ClassVar[str]  # a few words for listings
    reference: ClassVar[str]  # paper and, where there is one, equation
    link: ClassVar[str] = ""  # to the paper or the authors' code
    Config: ClassVar[type[MethodConfig]]
    # Whether a common factor on all weights is a factor on the result. Where a method compares with fixed numbers it
    # is not; alpha multiplies the result all the same.
    homogeneous: ClassVar[bool] = True
    # Whether it works on the factors A and B themselves, which full models don't have.
    needs_factors: ClassVar[bool] = False
    # Whether it bends the tasks' directions so that none answers to another, which decides what alpha="auto" compares.
    takes_apart: ClassVar[bool] = False
    # Whether its result has its strength already, as the minimiser of an objective of its own: alpha="auto" is then 1.
    fits_itself: ClassVar[bool] = False
    # Defaults that are others for full fine-tuned models.
    full_defaults: ClassVar[Mapping[str, Any]] = MappingProxyType({})

    def __init__(self, config: MethodConfig | None = None) -> None:
        self.config = config if config is not None else self.Config()

    @classmethod
    def from_options(cls, options: Mapping[str, Any]) -> Method:
        """The method with loose option values checked and parsed; raises :class:`OptionError`."""
        return cls(build_config(cls.Config, options, method=cls.name))

    @property
    def equivariant(self) -> bool:
        """Whether the method commutes with orthonormal changes of basis on both sides. Then the engine hands it k x k
        cores instead of m x n deltas; a method that looks at the entries of dW must say False."""
        return True

    @abstractmethod
    def merge(self, tasks: Sequence[Delta], weights: Sequence[float]) -> Delta:
        """Merge the deltas of one module.

        Args:
            tasks: One delta a task, all of one (m, n), scaling folded in, float64 on the compute device.
            weights: One finite factor a task; w_i multiplies task i's delta.

        Returns:
            The merged delta before ``alpha``, same shape and device: a :class:`LowRank` where the method stays in
            the span of its tasks, a :class:`Dense` where it does not.
        """

    def prepare(self, sweep: Sweep) -> ModuleMerge:
        """The function that merges each module in one run.

        A method that needs numbers of the whole model first, such as a global threshold, goes through ``sweep()`` as
        often as it must, and keeps nothing of a module but those numbers.
        """
        return lambda module: self.merge(module.tasks, module.weights)

    def stacked(self) -> StackedMerge | None:
        """The function that merges many modules of one shape at once, which spares a GPU thousands of tiny pieces of work; None
        where modules are merged one by one. It gives what :meth:`merge` gives, to rounding, and is no substitute for it."""
        return None

    def check(self, shape: tuple[int, int], ranks: Sequence[int]) -> None:  # noqa: B027 (most methods merge anything)
        """Refuse options that can't merge deltas of these ranks in a module of this shape, before any factor is read.

        Raises:
            OptionError: they can't.
        """

    def remarks(self, shape: tuple[int, int], ranks: Sequence[int]) -> Iterable[str]:
        """What a user should know about merging deltas of these ranks in a module of this shape, found before any
        factor is read. The same text for every module it concerns."""
        return ()


def stacked_merge(method: Method) -> StackedMerge | None:
    """What :meth:`Method.stacked` gives, unless a subclass merges in another way than the class that gives it."""
    for cls in type(method).__mro__:
        if "stacked" in vars(cls):
            return method.stacked()
        if any(name in vars(cls) for name in ("merge", "prepare", "view", "survey")):
            return None
    return None


class ModelWideMethod(Method):
    """A method whose :meth:`prepare` is the real thing; on a module by itself that module is the whole model."""

    def merge(self, tasks: Sequence[Delta], weights: Sequence[float]) -> Delta:
        module = ModuleTasks("", tasks, weights, range(len(tasks)))
        return self.prepare(lambda: iter([module]))(module)

    @abstractmethod
    def prepare(self, sweep: Sweep) -> ModuleMerge: ...

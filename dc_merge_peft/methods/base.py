"""What a merging method is: a frozen config and one function from the deltas of a module to the merged one."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar, Literal

from dc_merge_peft.lowrank import LowRank
from dc_merge_peft.methods.options import build_config, check_config, option

ALPHA_HELP = (
    "factor on the merged delta; 'auto' is the least-squares fit of the task deltas inside their own subspaces, "
    "without data"
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class MethodConfig:
    """Options that every method has. Subclasses add their own fields; each field is one option everywhere."""

    alpha: float | Literal["auto"] = option(1.0, ALPHA_HELP)

    def __post_init__(self) -> None:
        check_config(self)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for YAML or JSON."""
        return dataclasses.asdict(self)


class Method(ABC):
    """One merging method with its options.

    A subclass names itself and its source, gives its config class, and implements :meth:`merge`. To join the library
    it takes one row in :data:`dc_merge_peft.methods.METHODS`; the command line, PEFT, the saved provenance and the
    docs read everything else from here.

    The result must be homogeneous: it scales with a common factor on all weights. ``alpha`` is applied by the engine,
    after the merge, so that it can be fitted or changed without merging again.
    """

    name: ClassVar[str]
    title: ClassVar[str]  # a few words for listings
    reference: ClassVar[str]  # paper and, where there is one, equation
    link: ClassVar[str] = ""  # to the paper or the authors' code
    Config: ClassVar[type[MethodConfig]]
    # Whether the method commutes with orthonormal changes of basis on both sides. Then the engine hands it k x k
    # cores instead of m x n deltas; an element-wise method on the entries of dW must say False.
    equivariant: ClassVar[bool] = True

    def __init__(self, config: MethodConfig | None = None) -> None:
        self.config = config if config is not None else self.Config()

    @classmethod
    def from_options(cls, options: Mapping[str, Any]) -> Method:
        """The method with loose option values checked and parsed; raises :class:`OptionError`."""
        return cls(build_config(cls.Config, options, method=cls.name))

    @abstractmethod
    def merge(self, tasks: Sequence[LowRank], weights: Sequence[float]) -> LowRank:
        """Merge the deltas of one module.

        Args:
            tasks: One LowRank a task, all of one (m, n), scaling folded in, float64 on the compute device.
            weights: One finite factor a task; w_i multiplies task i's delta.

        Returns:
            The merged delta before ``alpha``, same shape, dtype and device.
        """

    def remarks(self, shape: tuple[int, int], ranks: Sequence[int]) -> Iterable[str]:
        """What a user should know about merging deltas of these ranks in a module of this shape, found before any
        factor is read. The same text for every module it concerns."""
        return ()

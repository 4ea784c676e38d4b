"""The modules of one merge whose results are kept: merged by this process or by others, or found finished."""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dc_merge_peft.errors import MergeError, OutputError, first_line
from dc_merge_peft.methods import Method
from dc_merge_peft.parallel import cost, dealt
from dc_merge_peft.plan import PlannedModule
from dc_merge_peft.work.finished import Finished, WorkFolder
from dc_merge_peft.work.manifest import differences, without_times
from dc_merge_peft.work.team import ShareDone, Team


@dataclass(frozen=True, eq=False)
class Modules:
    """Merges what is not there yet, this process's share of it, and gathers the rest."""

    work: WorkFolder
    method: Method
    manifest: Mapping[str, Any]
    team: Team | None = None

    def all(
        self,
        modules: Sequence[PlannedModule],
        merge: Callable[[Sequence[PlannedModule]], Iterator[Finished]],
    ) -> list[Finished]:
        """Every module's result, in order.

        Args:
            modules: All of them.
            merge: Merges those that it is given.

        Raises:
            ShareDone: in another process than the main one.
            MergeError: another process has failed.
        """
        if self.team is not None and not self.team.main:
            self._share(modules, merge)
        found = dict(zip(range(len(modules)), self.work.found(modules), strict=True))
        todo = [index for index, finished in found.items() if finished is None]
        if self.team is not None:
            shares = self._shares(modules, todo)
            self.team.start(self.manifest, shares)
            todo = shares[0]
        found |= self._merged(modules, todo, merge)
        if self.team is not None:
            self.team.wait()
            rest = [index for index, finished in found.items() if finished is None]
            found |= zip(rest, self.work.found([modules[index] for index in rest]), strict=True)
            # What could not be read back here is merged here.
            found |= self._merged(modules, [index for index in rest if found[index] is None], merge)
        return [finished for finished in found.values() if finished is not None]

    def _shares(self, modules: Sequence[PlannedModule], todo: Sequence[int]) -> list[list[int]]:
        assert self.team is not None
        costs = [cost(self.method, modules[index]) for index in todo]
        shares: list[list[int]] = [[] for _ in range(self.team.size)]
        for index, rank in zip(todo, dealt(costs, self.team.size), strict=True):
            shares[rank].append(index)
        return shares

    def _share(
        self,
        modules: Sequence[PlannedModule],
        merge: Callable[[Sequence[PlannedModule]], Iterator[Finished]],
    ) -> None:
        assert self.team is not None
        said, shares = self.team.started()
        expected, found = without_times(said), without_times(self.manifest)
        if found != expected:
            raise MergeError(
                f"process {self.team.rank} on '{platform.node()}' has other inputs or programs than process 0 "
                f"({'; '.join([*differences(expected, found)][:3])}): expected the same files and versions on all machines"
            )
        self._merged(modules, shares[self.team.rank], merge)
        self.team.done()
        raise ShareDone

    def _merged(
        self,
        modules: Sequence[PlannedModule],
        todo: Sequence[int],
        merge: Callable[[Sequence[PlannedModule]], Iterator[Finished]],
    ) -> dict[int, Finished | None]:
        chosen = [modules[index] for index in todo]
        merged: dict[int, Finished | None] = {}
        for index, module, finished in zip(todo, chosen, merge(chosen), strict=True):
            try:
                merged[index] = self.work.keep(module, finished)
            except OSError as error:
                raise OutputError(
                    f"can't keep finished modules in '{self.work.folder}' ({first_line(error)}): make room there, or choose another "
                    "place for the output"
                ) from error
            if self.team is not None:
                self.team.check()
        return merged

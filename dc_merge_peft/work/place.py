"""Where finished modules are kept while a merge runs, and what becomes of them when it ends."""

from __future__ import annotations

import json
import os
import re
import shutil
import stat
import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dc_merge_peft.errors import MergeError, OptionError, OutputError, first_line, path_in_words, warn
from dc_merge_peft.methods import Method
from dc_merge_peft.paths import exists, is_dir, is_file
from dc_merge_peft.work.finished import WorkFolder, tidy
from dc_merge_peft.work.locks import deleting, locked
from dc_merge_peft.work.manifest import differences
from dc_merge_peft.work.modules import Modules
from dc_merge_peft.work.team import ShareDone, Team
from dc_merge_peft.work.whole import write_whole
from dc_merge_peft.work.workshop import claim, prefix, workshop_of

_ENDING = "dc-merge-work"
# The manifest says that a folder is one of ours, which may be deleted: nobody else has a file of this name.
_MANIFEST, _LOCK = "dc-merge-manifest.json", "lock"
_BEFORE_IT = re.compile(rf"{_LOCK}|team-[0-9a-f]+|\.{re.escape(_MANIFEST)}\..*")  # what is made before the manifest


@dataclass(frozen=True)
class WorkPlace:
    """A folder for the finished modules of one merge, made by :meth:`opened`."""

    folder: Path
    resume: bool  # whether they are kept where the merge ends early
    team: Team | None = None  # the processes that share them
    # The output of a run whose modules nobody resumes: the next one to it removes what is left of them.
    target: Path | None = None

    @classmethod
    def beside(cls, out: str | Path, *, resume: bool, team: Team | None = None) -> WorkPlace:
        """The hidden folder beside an output; of several processes that are not to be resumed one of their own."""
        target = Path(out).expanduser().resolve()
        if resume or team is None:
            return cls(target.parent / f"{prefix(target)}{_ENDING}", resume, team)
        return cls(workshop_of(target, team.token), resume, team, target)

    @contextmanager
    def opened(self) -> Iterator[WorkPlace]:
        """The folder for as long as the merge and the writing of its result take; it is deleted when they are done, or have kept
        nothing.

        Raises:
            OutputError: it can't be made, or another run is at work in it.
            MergeError: another process has failed.
        """
        lock, done, new = None, False, list[Path]()
        try:
            if self.team is None or self.team.main:
                lock = self._made(new)
            try:
                if self.team is not None:
                    self.team.enter(self.folder)
                    if not self.team.main:
                        self.team.started()  # the main process has fetched from the Hub by then what others find in the cache
                yield self
                done = True
            except ShareDone:
                raise
            except BaseException as error:
                if self.team is not None:
                    self.team.leave(str(error) if isinstance(error, MergeError) else type(error).__name__)
                raise
        finally:
            if self.team is not None:
                self.team.leave()
            if lock is not None:
                kept = not done and self.resume and exists(self.folder / _MANIFEST)
                deleting(lock, lambda: None if kept else _delete(self.folder))
            for folder in new:
                with suppress(OSError):
                    folder.rmdir()

    def written(self, out: Path) -> int:
        """Bytes that an interrupted run has left here of a model, on the disk of its output."""
        if not _same_disk(self.folder, out):
            return 0
        files = [file.stat() for file in (self.folder / "model").glob("*.safetensors")]
        return sum(getattr(file, "st_blocks", 0) * 512 for file in files)  # what they take, not yet what they will

    def _made(self, new: list[Path]) -> int:
        """Its lock, once the folder is there; ``new`` gets those that are made for it, the innermost first."""
        try:
            new += [folder for folder in (self.folder, *self.folder.parents) if not exists(folder)]
            self.folder.mkdir(parents=True, exist_ok=True)
            self._refuse_strangers()
            if self.target is not None:
                return claim(self.folder, self.target)
            lock = os.open(self.folder / _LOCK, os.O_CREAT | os.O_RDWR, 0o600)
        except OSError as error:
            raise self._unwritable(error) from error
        if locked(lock) is False:
            os.close(lock)
            raise OutputError(
                f"another run is at work in '{self.folder}': expected one at a time; wait for it, or choose another output"
            )
        return lock

    def _unwritable(self, error: OSError) -> OutputError:
        return OutputError(
            f"can't keep finished modules in '{self.folder}' ({first_line(error)}): make room there, or choose a writable place for the "
            "output"
        )

    def _refuse_strangers(self) -> None:
        """A folder that holds anything but an interrupted merge, all of which would be deleted in the end."""
        self._refuse_others()
        children = sorted(child.name for child in self.folder.iterdir())
        stranger = next((name for name in children if not _BEFORE_IT.fullmatch(name)), None)
        if stranger is not None and _MANIFEST not in children:
            raise OutputError(
                f"the folder '{self.folder}' for finished modules holds other things ('{stranger}'): expected a new or empty folder, "
                "which is deleted in the end, or one that an interrupted merge has left; choose another"
            )

    def _refuse_others(self) -> None:
        """In a directory such as /tmp anybody may have made it, under a name that can be known, to give modules for finished ones."""
        holder = self.folder.parent.stat()
        if os.name == "posix" and holder.st_mode & stat.S_ISVTX:
            owners = {self.folder.stat().st_uid, self.folder.lstat().st_uid}
            if owners - {os.geteuid(), 0}:
                raise OutputError(
                    f"the folder '{self.folder}' for finished modules is another user's, who could put others into it: expected none there, or "
                    "your own; choose another place for the output"
                )

    def prepared(self, manifest: Mapping[str, Any], work: WorkFolder, method: Method) -> Modules:
        """The modules of a merge, of which those that were finished before are taken from here.

        Raises:
            OutputError: the folder holds modules of another merge, or can't be written to.
        """
        if self.team is None or self.team.main:
            try:
                self._check(manifest)
                for left in self.folder.glob("team-*"):
                    if self.team is None or left.name != f"team-{self.team.token}":
                        shutil.rmtree(left, ignore_errors=True)
                tidy(self.folder, keep=lambda file: file.name in (_MANIFEST, _LOCK))
            except OSError as error:
                raise self._unwritable(error) from error
        return Modules(work, method, manifest, self.team)

    def _check(self, manifest: Mapping[str, Any]) -> None:
        file = self.folder / _MANIFEST
        try:
            found = json.loads(file.read_text(encoding="utf-8"))
        except FileNotFoundError:
            write_whole(file, json.dumps(manifest, indent=1).encode())
            return
        except (OSError, ValueError, RecursionError) as error:
            raise OutputError(
                f"'{file}' can't be read ({first_line(error)}): expected what an interrupted merge had written; delete '{self.folder}' "
                "to start anew"
            ) from error
        if found != manifest:
            differing = list(differences(found, manifest)) if isinstance(found, dict) else ["its format"]
            more = f" and {len(differing) - 3} more" if len(differing) > 3 else ""
            raise OutputError(
                f"'{self.folder}' holds an unfinished merge of other inputs or settings ({'; '.join(differing[:3])}{more}): expected "
                "the same merge to resume; delete that folder to start anew, or leave out --resume (resume=False)"
            )


def _same_disk(folder: Path, out: Path) -> bool:
    holder = next(parent for parent in (out, *out.resolve().parents) if exists(parent))
    return folder.stat().st_dev == holder.stat().st_dev


def work_place(
    resume: bool | str | Path | WorkPlace | None, out: str | Path | None = None
) -> AbstractContextManager[WorkPlace | None]:
    """Where finished modules are kept, as users say it: not at all, in a folder, or for ``True`` beside the output. A place that is
    open already stays its owner's.

    Raises:
        OptionError: there is no output to be beside, or it and the folder are one, or one in the other.
        OutputError: one of them is no path on this machine.
    """
    if not resume:
        if out is not None and (left := unfinished(out)):
            warn(left)
        return nullcontext()
    if isinstance(resume, WorkPlace):
        return nullcontext(resume)
    if resume is not True:
        with path_in_words(resume, "", TypeError):
            folder = Path(resume).expanduser()
            os.path.realpath(folder)
        _refuse_nested(folder, out)
        return WorkPlace(folder, resume=True).opened()
    if out is None:
        raise OptionError(
            "resume has no output to keep finished modules beside: expected a directory, or resume as a folder"
        )
    with path_in_words(out, "", TypeError):
        place = WorkPlace.beside(out, resume=True)
    return place.opened()


def _refuse_nested(folder: Path, out: str | Path | None) -> None:
    nested = False
    if out is not None and str(out).strip():
        with suppress(OSError, RuntimeError, ValueError):  # no path here, which is said where it is to be written
            target, place = (Path(os.path.realpath(Path(path).expanduser())) for path in (out, folder))
            nested = target.is_relative_to(place) or place.is_relative_to(target)
    if nested:
        raise OptionError(
            f"the folder '{folder}' for finished modules and the output '{out}' lie in each other: expected a folder of its own, which is "
            "deleted in the end; choose another, or leave it to be made beside the output (resume=True)"
        )


def _delete(folder: Path) -> None:
    """Delete a folder, into which other processes that have not yet seen the end may write meanwhile. The manifest goes after all
    else: a run that is killed here leaves a folder that is still known. A link, as to a larger disk, stays with the empty folder
    that it leads to."""
    for _ in range(20):
        with suppress(OSError):
            for child in folder.iterdir():
                if is_dir(child) and not child.is_symlink():
                    shutil.rmtree(child, ignore_errors=True)
                elif child.name not in (_MANIFEST, _LOCK):
                    child.unlink(missing_ok=True)
        if folder.is_symlink():
            with suppress(OSError):
                for name in (_MANIFEST, _LOCK):
                    (folder / name).unlink(missing_ok=True)
        shutil.rmtree(folder, ignore_errors=True)  # not through a link
        if not exists(folder) or (folder.is_symlink() and not any(folder.iterdir())):
            return
        time.sleep(0.05)


def work_folder_around(target: Path) -> Path | None:
    """The folder of finished modules that a path is, or lies in: it is deleted with all it holds when its merge is done."""
    return next((folder for folder in (target, *target.parents) if is_file(folder / _MANIFEST)), None)


def unfinished(out: str | Path) -> str | None:
    """A sentence about an unfinished merge to this output that could be resumed."""
    folder = left_of(out)
    if folder is None:
        return None
    return f"'{folder}' holds an unfinished merge to this output: --resume (resume=True) goes on with it, or delete it"


def left_of(out: str | Path) -> Path | None:
    """The folder beside an output that holds finished modules of a merge to it, if there is one."""
    with suppress(OSError, RuntimeError, ValueError):
        folder = WorkPlace.beside(out, resume=True).folder
        if is_file(folder / _MANIFEST):
            return folder
    return None

"""Several processes at one merge, as ``accelerate launch`` starts them, on one machine or several that share a file system.

They speak through files beside the finished modules: each says that it is alive, done or failed, so that one that dies is missed
within a minute and not at the end of a network's patience.
"""

from __future__ import annotations

import json
import os
import platform
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dc_merge_peft.errors import MergeError, first_line
from dc_merge_peft.paths import is_dir
from dc_merge_peft.work.meeting import meet
from dc_merge_peft.work.whole import write_whole

BEAT = 1.0  # seconds between two signs of life
PATIENCE = 60.0  # seconds without one, after which a process counts as dead; a network's file system may be that slow to show it
_POLL = 0.05


class ShareDone(Exception):
    """This process has done its share of a merge that another one finishes."""


@dataclass(eq=False)
class Team:
    """This process among those that merge together; the first one, the main process, does all that one alone has to do."""

    rank: int
    size: int
    device: str  # where this process computes
    token: str  # of this run
    _folder: Path | None = None
    _ended: threading.Event = field(default_factory=threading.Event)
    _living: threading.Thread | None = None
    # By rank: its last sign of life, and when it came.
    _seen: dict[int, tuple[bytes, float]] = field(default_factory=dict)

    @classmethod
    def join(cls, device: str | None) -> Team:
        """Meet the other processes, as :func:`~dc_merge_peft.work.meeting.meet` has it."""
        met = meet(device)
        return cls(met.rank, met.size, met.device, met.token)

    @property
    def main(self) -> bool:
        """Whether this process plans, finishes, writes and prints."""
        return self.rank == 0

    def enter(self, folder: Path) -> None:
        """Show oneself in the common folder, which the main process makes.

        Raises:
            MergeError: this process does not see the folder, or can't write there.
        """
        own = folder / f"team-{self.token}"
        if self.main:
            with _in_words(folder):
                own.mkdir()
        deadline = time.monotonic() + PATIENCE
        while not is_dir(own):
            if time.monotonic() > deadline:
                raise MergeError(
                    f"process {self.rank} on '{platform.node()}' does not see '{folder}', which process 0 has made: expected an "
                    "output on a file system that all machines share; choose another place, or start one process"
                )
            time.sleep(_POLL)
        self._folder = own
        with _in_words(folder):
            self._say("alive", _whereabouts(0))
        self._living = threading.Thread(target=self._live, name="dc-merge-alive", daemon=True)
        self._living.start()

    def _live(self) -> None:
        beat = 0
        while not self._ended.wait(BEAT):
            beat += 1
            with suppress(OSError):
                self._say("alive", _whereabouts(beat))

    def leave(self, failure: str | None = None) -> None:
        """The last sign of this process: that it has failed, or else nothing."""
        self._end()
        if failure is not None and self._folder is not None and is_dir(self._folder):
            with suppress(OSError):
                self._say("failed", failure.encode())

    def _end(self) -> None:
        """No more signs of life: the main process may delete the folder at any time."""
        self._ended.set()
        if self._living is not None:
            self._living.join()

    def start(self, manifest: Mapping[str, Any], shares: Sequence[Sequence[int]]) -> None:
        """Of the main process: what is merged, and which modules each process does."""
        with _in_words(self._folder):
            self._say("start", json.dumps({"manifest": manifest, "shares": shares}).encode())

    def started(self) -> tuple[dict[str, Any], list[list[int]]]:
        """Wait for :meth:`start`; the manifest and all shares.

        Raises:
            MergeError: the main process has failed.
        """
        while (content := self._heard(0, "start")) is None:
            self.check([0])
            time.sleep(_POLL)
        said = json.loads(content)
        return said["manifest"], said["shares"]

    def done(self) -> None:
        """Say that this process has nothing left to do."""
        self._end()
        with _in_words(self._folder):
            self._say("done", b"")

    def wait(self) -> None:
        """Until all others are done.

        Raises:
            MergeError: one has failed.
        """
        others = [rank for rank in range(self.size) if rank != self.rank]
        while others := [rank for rank in others if self._heard(rank, "done") is None]:
            self.check(others)
            time.sleep(_POLL)

    def check(self, ranks: Sequence[int] | None = None) -> None:
        """Go on only if no other process has failed or died.

        Raises:
            MergeError: one has.
        """
        for rank in range(self.size) if ranks is None else ranks:
            if rank == self.rank or self._heard(rank, "done") is not None:
                continue
            failure = self._heard(rank, "failed")
            if failure is not None:
                raise MergeError(f"process {rank} has failed: {failure.decode(errors='replace')}")
            if not self._alive(rank) and self._heard(rank, "done") is None:
                raise MergeError(
                    f"process {rank} of {self.size} has ended, or shows no sign of life in '{self._folder}': expected all processes to "
                    "run to the end, and to share the output's file system; see its own messages, then start again"
                )

    def _alive(self, rank: int) -> bool:
        now, sign = time.monotonic(), self._heard(rank, "alive") or b""
        last, since = self._seen.setdefault(rank, (sign, now))
        if sign != last:
            self._seen[rank] = (sign, now)
            return True
        return now - since <= PATIENCE and not (sign and _is_dead(sign))

    def _say(self, what: str, content: bytes) -> None:
        assert self._folder is not None
        write_whole(self._folder / f"{self.rank}.{what}", content)

    def _heard(self, rank: int, what: str) -> bytes | None:
        assert self._folder is not None
        try:
            return (self._folder / f"{rank}.{what}").read_bytes()
        except FileNotFoundError:
            if not is_dir(self._folder):
                raise MergeError(
                    f"'{self._folder.parent}' is gone: expected it to stay until all processes are done; process 0 has ended early, see "
                    "its own messages"
                ) from None
            return None


@contextmanager
def _in_words(folder: Path | None) -> Iterator[None]:
    """What the system says of a message that it can't write, as a :class:`MergeError`."""
    try:
        yield
    except OSError as error:
        raise MergeError(
            f"can't write to '{folder}', where the processes of this launch meet ({first_line(error)}): make room there, or choose "
            "another place for the output"
        ) from error


def _system() -> str:
    """The machine and the table of its processes, in which a number means something."""
    try:
        table = os.readlink("/proc/self/ns/pid")
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {table}"
    except OSError:
        return ""


def _whereabouts(beat: int) -> bytes:
    return json.dumps({"system": _system(), "process": os.getpid(), "beat": beat}).encode()


def _is_dead(sign: bytes) -> bool:
    """Whether a process of this same system is known to have ended."""
    said = json.loads(sign)
    if not said["system"] or said["system"] != _system():
        return False
    try:
        os.kill(said["process"], 0)
    except ProcessLookupError:
        return True
    except OSError:
        return False
    try:  # ended, but not yet seen off by its parent
        return Path(f"/proc/{said['process']}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except (OSError, IndexError):
        return False

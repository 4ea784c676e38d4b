"""The program for :mod:`tests.fuzz.kill`: it tells its steps, and kills itself at one of them, or some milliseconds later.

By time alone most kills would come before the merging, or on a busy machine after the writing.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from typing import Any

from transformers import AutoModel, BertModel  # noqa: F401  what fusing imports at last

from dc_merge_peft import engine
from dc_merge_peft.cli import main
from dc_merge_peft.outputs import adapter, directory, fused_stream, placing, written
from dc_merge_peft.work import finished, place, workshop

# What a run does, and the functions whose beginnings and ends are its steps.
STEPS: dict[str, list[tuple[Any, str]]] = {
    "begin": [(workshop, "claim"), (place, "claim"), (place, "write_whole")],
    "merge": [(engine._Run, "_merge_one"), (finished, "write_whole")],
    "write": [
        *((adapter, name) for name in ("write_at", "adapter_card")),
        *((fused_stream, name) for name in ("write_at", "write_papers", "write_headers")),
        (written.Written, "add"),
    ],
    "place": [
        *((directory, name) for name in ("place", "to_disk")),
        *((module, name) for module, name in ((placing, "exchange"), (workshop, "settle"), (place, "_delete"))),
    ],
}


class Steps:
    """Counts them in the file ``trail``, a line each."""

    def __init__(self, kind: str | None, number: int, delay: float) -> None:
        self._kind, self._left, self._delay = kind, number, delay
        self._trail, self._lock, self._slowly = (
            os.open("trail", os.O_CREAT | os.O_TRUNC | os.O_WRONLY),
            threading.Lock(),
            False,
        )

    def take(self, kind: str) -> None:
        """One more of this kind: the one to be killed at, or another."""
        with self._lock:
            os.write(self._trail, f"{kind}\n".encode())
            self._left -= kind == self._kind
            if kind == self._kind and not self._left:
                if not self._delay:
                    os.kill(os.getpid(), signal.SIGKILL)
                threading.Timer(self._delay, os.kill, (os.getpid(), signal.SIGKILL)).start()
                self._slowly = True
        if self._slowly:
            time.sleep(0.001)  # the moment is somewhere in the next steps

    def count(self) -> None:
        """From now on."""
        for kind, functions in STEPS.items():
            for owner, name in functions:
                setattr(owner, name, self._counted(kind, getattr(owner, name)))

    def _counted(self, kind: str, original: Any) -> Any:
        def counts(*arguments: Any, **named: Any) -> Any:
            self.take(kind)
            made = original(*arguments, **named)
            self.take(kind)
            return made

        return counts


def run(command: list[str], *moment: Any) -> None:
    """One run, which does not return."""
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(2, 1)
    sys.argv = ["dc-merge", *command]
    Steps(*moment).count()
    try:
        main()
    except SystemExit as end:
        os._exit(end.code if isinstance(end.code, int) else 0)
    os._exit(0)


if __name__ == "__main__":
    for line in sys.stdin:  # each run in a process of its own that has imported everything already
        if not (child := os.fork()):
            run(*json.loads(line))
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)

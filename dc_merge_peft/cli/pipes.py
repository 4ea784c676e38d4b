"""Output that nobody reads, or not as it is: programs that end before it, as ``head`` does, streams that are closed from the start,
and encodings that lack a character. The work goes on."""

from __future__ import annotations

import io
import os
import sys
from contextlib import suppress
from typing import Any, TextIO


class _Pipe:
    """A text stream that may lose its reader."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except BrokenPipeError:
            print_no_more(self._stream)
            return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except BrokenPipeError:
            print_no_more(self._stream)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def outlive_readers() -> None:
    """Let this program's output and errors be closed, or of an encoding that lacks a character, without an error of its own."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # closed by who started this program
            stream = open(os.devnull, "w")  # noqa: SIM115  for as long as the program lasts
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
        setattr(sys, name, _Pipe(stream))


def print_no_more(stream: TextIO) -> None:
    """Let what is left to print go nowhere: Python prints it when it ends, and would fail once more."""
    with suppress(OSError), open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), stream.fileno())

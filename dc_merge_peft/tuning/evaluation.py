"""What a candidate is worth: a number from a function, or from a program that prints it."""

from __future__ import annotations

import difflib
import numbers
import os
import re
import shlex
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeAlias

from dc_merge_peft.errors import EvaluationError, OptionError, first_line, unknown_name
from dc_merge_peft.merged import MergedAdapter
from dc_merge_peft.outputs.directory import hidden_beside
from dc_merge_peft.together import is_finite

PLACEHOLDER = "{adapter}"
VARIABLE = "DC_MERGE_ADAPTER"  # in the environment of the command
_GRACE = 5.0  # seconds that a program has to end before it is killed
_LOOK = 0.5  # seconds between two looks whether it has ended
# A word may hold digits (epoch3, top@5, 12.5s) and is no number for it.
_NUMBER = re.compile(
    r"(?<![\w.@])[-+]?(?:(?:\d+\.?\d*|\.\d+)(?:e[-+]?\d+)?|nan|inf|infinity)(?!\.?[\w@])", re.IGNORECASE
)
# Whole digits before the comma of 0,85 or 12,345; in 3,0.85 there are two numbers beyond doubt.
_WHOLE_AND_COMMA = re.compile(r"(?<![\w.,@])\d+,\Z")
# Colours, which some programs print without a terminal, too, have numbers in them.
_COLOUR = re.compile(r"\x1b\[[0-?]*[ -/]*[@-~]")

# A word with a name in braces that is neither code nor of a shell, and such names in code.
_BRACED, _IN_CODE = re.compile(r"[\w=/.:~-]*\{(\w+)\}[\w/.-]*"), re.compile(r"(?<!\$)\{(\w+)\}")

# Takes the merged adapter, or the PEFT model with the candidate active.
Evaluate: TypeAlias = Callable[[Any], float]


class CommandEvaluation:
    """A program that is run on each candidate and prints a number: the last one on its standard output is the score.

    Examples:
        >>> evaluate = CommandEvaluation("python evaluate.py {adapter}", beside="tuned.yaml", timeout=600)
    """

    def __init__(self, command: str, *, beside: str | Path, timeout: float | None = None) -> None:
        """
        Args:
            command: Its words as in a shell, but without one: no pipes, no variables. ``{adapter}`` becomes the directory of
                the candidate, which is also in the environment variable ``DC_MERGE_ADAPTER``.
            beside: A path beside which that directory is made, hidden, and deleted after each trial.
            timeout: Seconds that one run may take; without end by default.

        Raises:
            OptionError: no words, a placeholder of another name, or a timeout that is no time.
        """
        try:
            self.words = _words(command)
        except ValueError as error:
            raise OptionError(
                f"the command '{command}' can't be split into words ({error}): close its quotes"
            ) from error
        if not self.words:
            raise OptionError("the command is empty: expected a program, as in 'python evaluate.py {adapter}'")
        _check_placeholders(command, self.words)
        if timeout is not None and (isinstance(timeout, bool) or not is_finite(timeout) or timeout <= 0):
            raise OptionError(f"the timeout is {timeout!r}: expected a number of seconds above 0")
        self.command, self.timeout = command, timeout
        self._beside = Path(beside)

    def __call__(self, merged: MergedAdapter) -> float:
        """The number of one candidate.

        Raises:
            EvaluationError: the program can't be started, fails, takes too long, or prints no finite number.
            OutputError: the candidate can't be written.
        """
        with hidden_beside(self._beside) as folder:
            candidate = (folder / "candidate").resolve()
            merged.save_pretrained(candidate)
            return last_number(self._output(str(candidate)), self.command)

    def _output(self, adapter: str) -> str:
        words = [word.replace(PLACEHOLDER, adapter) for word in self.words]
        try:
            # A session of its own, so that whatever it starts can be ended with it.
            process = subprocess.Popen(
                words, env={**os.environ, VARIABLE: adapter}, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                stderr=subprocess.PIPE, encoding="utf-8", errors="replace", start_new_session=True,
            )  # fmt: skip
        except (OSError, ValueError) as error:
            raise EvaluationError(
                f"the command '{self.command}' can't be started ({first_line(error)}): expected a program and its arguments; a shell's "
                "own words need one, as in sh -c '...'"
            ) from error
        try:
            stdout, stderr = _communicated(process, self.timeout)
        except subprocess.TimeoutExpired as error:
            raise EvaluationError(
                f"the command '{self.command}' was ended after {self.timeout:g} s: expected a number by then; allow more (timeout, --timeout), or "
                "evaluate on less"
            ) from error
        finally:
            _end(process)
        if process.returncode:
            said = next((line.strip() for line in reversed((stderr or stdout).splitlines()) if line.strip()), "")
            raise EvaluationError(
                f"the command '{self.command}' ended with exit code {process.returncode}{f' ({said[:300]})' if said else ''}: expected 0; "
                "run it by hand on an adapter of your own"
            )
        return stdout


def _check_placeholders(command: str, words: Sequence[str]) -> None:
    """Refuse a command that names no candidate but something like it; one that names nothing may read the variable."""
    if PLACEHOLDER in command or VARIABLE in command:
        return
    whole = (found[1] for word in words if (found := _BRACED.fullmatch(word)))
    inside = (name for name in _IN_CODE.findall(command) if difflib.get_close_matches(name.lower(), ["adapter"]))
    for name in (*whole, *inside):
        raise OptionError(
            f"the command '{command}' has an {unknown_name('placeholder', f'{{{name}}}', [PLACEHOLDER])}; the directory of the "
            f"candidate is also in the environment variable {VARIABLE}"
        )


def last_number(text: str, command: str) -> float:
    """The last number in what a command has printed.

    Raises:
        EvaluationError: there is none, it is not finite, or a comma makes it doubtful which one it is.
    """
    text = _COLOUR.sub("", text)
    found = list(_NUMBER.finditer(text))
    if not found:
        last = next((line.strip() for line in reversed(text.splitlines()) if line.strip()), None)
        said = "nothing" if last is None else f"no number, at last '{last[:200]}',"
        raise EvaluationError(
            f"the command '{command}' printed {said} on its standard output: expected the score as the last number there; print it at the end"
        )
    number = found[-1]
    whole, before = number[0].rstrip("."), _WHOLE_AND_COMMA.search(text, 0, number.start())
    if before and whole.isdigit() and not text.startswith(",", number.end()):
        raise EvaluationError(
            f"the command '{command}' printed '{before[0]}{whole}', which may be one number or two: expected the score with a decimal "
            "point and without other commas; print it by itself"
        )
    return checked_score(float(number[0]), f"the command '{command}' printed")


def checked_score(score: Any, who: str) -> float:
    """A finite number, which a tensor or array of one element is, too.

    Args:
        score: What an evaluation has given.
        who: How a sentence about it begins.

    Raises:
        EvaluationError: it is none.
    """
    one = score
    if hasattr(score, "item"):  # of torch or numpy
        with suppress(ValueError, RuntimeError):
            one = score.item()
    if isinstance(one, bool) or not isinstance(one, numbers.Real):
        raise EvaluationError(f"{who} {score!r:.100}: expected a number, such as an accuracy or a loss")
    if not is_finite(one):
        raise EvaluationError(
            f"{who} {one!r:.100}: expected a finite number; a candidate that breaks the model should score badly, not nothing"
        )
    return float(one)


def _communicated(process: subprocess.Popen[str], timeout: float | None) -> tuple[str, str]:
    """What a program prints until it has ended. What it leaves running with its output open is ended, or left alone where it has made
    itself a session of its own.

    Raises:
        TimeoutExpired: it has not ended by then.
    """
    start, over = time.monotonic(), None
    while True:
        try:
            return process.communicate(timeout=_LOOK if timeout is None else min(_LOOK, timeout))
        except subprocess.TimeoutExpired as waiting:
            now = time.monotonic()
            if process.poll() is None:
                if timeout is not None and now - start > timeout:
                    raise subprocess.TimeoutExpired(process.args, timeout) from None
                continue
            over = over or now
            if now - over > 2 * _GRACE:
                return _text(waiting.output), _text(waiting.stderr)
            if now - over > _GRACE:
                _signal(process, getattr(signal, "SIGKILL", signal.SIGTERM))


def _words(command: str) -> list[str]:
    """Its words as a shell has them; on Windows a backslash is part of a path.

    Raises:
        ValueError: a quotation is not closed.
    """
    if os.name != "nt":
        return shlex.split(command)
    words = shlex.split(command, posix=False)
    return [word[1:-1] if len(word) > 1 and word[0] == word[-1] in "\"'" else word for word in words]


def _text(part: str | bytes | None) -> str:
    return part.decode("utf-8", "replace") if isinstance(part, bytes) else part or ""


def _end(process: subprocess.Popen[str]) -> None:
    """End a program and what it has started, politely first; nothing is left of one that has ended by itself."""
    if process.poll() is None or process.stdout is None or not process.stdout.closed:
        _signal(process, signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            process.wait(_GRACE)
        _signal(process, getattr(signal, "SIGKILL", signal.SIGTERM))
        process.wait()
    for stream in (process.stdout, process.stderr):
        if stream is not None:
            stream.close()


def _signal(process: subprocess.Popen[str], number: int) -> None:
    with suppress(ProcessLookupError, PermissionError):
        if hasattr(os, "killpg"):
            os.killpg(process.pid, number)
        else:
            process.send_signal(number)

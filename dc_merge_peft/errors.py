"""Every error this library raises on purpose.

::

    Exception
     └─ MergeError                      anything below; catch this one to catch them all
         ├─ OptionError                 (ValueError)           an option, weight or argument is wrong
         ├─ SourceError                 (ValueError)           an adapter can't be read, or holds bad numbers
         ├─ IncompatibleAdaptersError   (ValueError)           adapters that don't belong together
         ├─ UnsupportedAdapterError     (NotImplementedError)  an adapter whose delta is not ``scaling * B @ A``
         ├─ OutputError                 (ValueError)           the result can't be written where it was asked for
         └─ EvaluationError             (RuntimeError)         a user's evaluation fails, or gives no number

Each message is one sentence or two with what was found, what was expected, and what to do next. Names in it may come
from files of strangers and from the Hub: it is one printable line without access tokens, whatever they hold.
``UserWarning``'s child :class:`MergeWarning` is for merges that are right but that the user should know something about.
"""

from __future__ import annotations

import difflib
import re
import sys
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

HIDDEN = "<hidden>"
_BETWEEN = {"dc_merge_peft", "torch", "contextlib"}  # what may stand between a warning and the line of its user

# What gives access in a text: user and password of a URL, its query (signatures of storage addresses), tokens of the Hub. Each
# looks at a letter of a text, which may be a stranger's and long, a few times at most.
_SECRETS = (
    (re.compile(r"(://)[^/?#\s'\"]*@"), rf"\1{HIDDEN}@"),
    (re.compile(r"(://(?:(?!://)[^?\s'\"])+\?)[^\s'\"]+"), rf"\1{HIDDEN}"),
    (re.compile(r"(\bBearer )[^\s'\"]+"), rf"\1{HIDDEN}"),
    (re.compile(r"\b(?:hf|api_org)_[A-Za-z0-9]{30,}|\bhf_(?:oauth|jwt)_[\w.-]{20,}"), HIDDEN),
)


def without_secrets(text: object, *known: str) -> str:
    """The text with ``known`` secrets, and what looks like one, replaced."""
    plain = str(text)
    for secret in filter(None, known):
        plain = plain.replace(secret, HIDDEN)
    for pattern, replacement in _SECRETS:
        plain = pattern.sub(replacement, plain)
    return plain


def printable(text: object) -> str:
    """One line without control characters, which could move a terminal's cursor, or turn the direction of the text."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in str(text))


def message(text: object, limit: int = 2000) -> str:
    """The text of an error or note: one printable line without secrets. A longer one loses its middle, since its end says
    what to do."""
    plain = printable(without_secrets(text))
    return plain if len(plain) <= limit else f"{plain[: limit // 2]} ... {plain[-limit // 2 :]}"


class MergeError(Exception):
    """Base class of the errors of this library."""

    def __init__(self, text: object = "") -> None:
        super().__init__(message(text))


class OptionError(MergeError, ValueError):
    """An option, a weight or an argument is unknown, of the wrong type or out of range."""


class SourceError(MergeError, ValueError):
    """An adapter is missing, corrupt, incomplete, no LoRA, or holds NaN, Inf or only zeros."""


class IncompatibleAdaptersError(MergeError, ValueError):
    """Adapters that can't be merged with each other: other base models, shapes or modules."""


class UnsupportedAdapterError(MergeError, NotImplementedError):
    """An adapter whose delta is not ``scaling * B @ A`` alone, or a layer type that is not supported."""


class OutputError(MergeError, ValueError):
    """The merged adapter can't be written: the target exists, or a name or dtype can't hold it."""


class EvaluationError(MergeError, RuntimeError):
    """The user's evaluation of a candidate fails, takes too long, or gives no finite number."""


class MergeWarning(UserWarning):
    """The merge is right, but there is something to know about it."""

    def __init__(self, text: object = "") -> None:
        super().__init__(message(text))


def warn(text: str) -> None:
    """A :class:`MergeWarning` at the line that called the library. Python shows the same one once a line: said at a line of torch's
    decorators it would be shown for the first merge alone."""
    frame, level = sys._getframe(1), 2
    while frame.f_back is not None and str(frame.f_globals.get("__name__")).partition(".")[0] in _BETWEEN:
        frame, level = frame.f_back, level + 1
    warnings.warn(text, MergeWarning, stacklevel=level)


@contextmanager
def path_in_words(path: object, what: str = "the output ", *more: type[Exception]) -> Iterator[None]:
    """What the system says of a path that it can't look at, as an :class:`OutputError`; so are errors of ``more`` types."""
    try:
        yield
    except OutputError:
        raise
    except (OSError, RuntimeError, ValueError, *more) as error:
        raise OutputError(
            f"{what}{str(path)[:200]!r} can't be used ({first_line(error)}): choose another path"
        ) from error


def unknown_name(kind: str, found: str, valid: Iterable[str]) -> str:
    """One sentence for a name that is not in a list: what was found, the closest match, and the whole list."""
    valid = list(valid)
    lower = {name.lower(): name for name in valid}
    close = difflib.get_close_matches(str(found).lower(), lower, n=1)
    hint = f"did you mean '{lower[close[0]]}'? " if close else ""
    listing = ", ".join(valid) if valid else "there are none"
    return f"unknown {kind} '{found}': {hint}valid names are: {listing}"


def preview(names: Iterable[str], limit: int = 3) -> str:
    """The first ``limit`` names, quoted, and how many more there are: for error texts."""
    names = list(names)
    shown = ", ".join(f"'{name}'" for name in names[:limit])
    return shown + (f" and {len(names) - limit} more" if len(names) > limit else "")


def first_line(error: BaseException) -> str:
    """What an error of the system or of another library says, in one line, with the cause that it may hide."""
    text = getattr(error, "strerror", None) or (str(error).strip().splitlines() or [type(error).__name__])[0]
    cause = error.__cause__
    reason = first_line(cause) if cause is not None else ""
    return f"{text} ({reason})" if reason and reason not in text else text

"""Regular expressions from the configs of strangers: PEFT's rules, with the answers of Python's ``re``, in bounded time.

``re`` tries one way after the other, of which a short pattern can have more than there are atoms, and can't be told to stop. The
``regex`` library, which transformers brings along, can.
"""

from __future__ import annotations

import functools
import math
import re
import time
import warnings
from typing import Any

from dc_merge_peft.errors import SourceError

LONGEST_PATTERN = 50_000  # characters
_SECONDS, _SLOW = 1.0, 1e-3  # that all slow matches of a pattern may take; ordinary ones take microseconds
_REPEATS = 10_000  # product of all counts in braces: counted parts are unrolled
_DIGITS = 1000  # of a layer's number; Python makes no number of more than 4300
_CACHED = 20_000  # patterns: adapters with a rank of their own for each module have thousands

# Nothing in it can be tried in two ways. Most patterns are names of modules.
_PLAIN = re.compile(r"\^?(?:[\w-]|\.(?![*+?{])|\\\.)*\$?")
_COUNT = re.compile(r"\{(\d*)(?:,(\d*))?\}")
# What the two libraries read differently: fuzzy matching and named sets in braces, sets within sets, classes by name.
_DISPUTED = re.compile(r"(?<!\\)\{(?!\d*,?\d*\})|\[\[|\[:|&&|--|\|\||~~")


def check_pattern(pattern: str, field: str, adapter: str) -> None:
    """Refuse what is no regular expression, by itself or where PEFT puts it, or none that can be matched in bounded time.

    Raises:
        SourceError: it is.
    """
    if len(pattern) > LONGEST_PATTERN:
        raise SourceError(
            f"adapter '{adapter}' has a pattern of {len(pattern)} characters in {field}: expected at most {LONGEST_PATTERN}; correct its "
            "adapter_config.json"
        )
    if _is_plain(pattern):
        return  # compiling thousands of names takes seconds
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of sets within sets, which are refused below
            _compiled(pattern)
            _compiled(_ending(pattern))
        _bounded(pattern)
    # ValueError: a count of 5000 digits
    except (re.error, RecursionError, OverflowError, MemoryError, ValueError) as error:
        raise SourceError(
            f"adapter '{adapter}' has the pattern '{pattern[:200]}' in {field}, which is no regular expression ({error}): "
            "correct its adapter_config.json"
        ) from error


def fits(pattern: str, name: str) -> bool:
    """Whether a pattern matches a whole name.

    Raises:
        SourceError: that would take too long.
    """
    return _match(pattern, name, plain=_is_plain(pattern), whole=True) is not None


def fits_ending(pattern: str, name: str) -> bool:
    """Whether it matches a whole path or its trailing parts: PEFT's rule for ranks and alphas.

    Raises:
        SourceError: that would take too long.
    """
    return _match(_ending(pattern), name, plain=_is_plain(pattern)) is not None


def layer_number(pattern: str | None, name: str) -> str | None:
    """The number that follows a layer's name in a path, by PEFT's rule for ``layers_pattern``; None where there is none.

    Args:
        pattern: The layer's name; any part of a path by default.
        name: The path.

    Raises:
        SourceError: that would take too long, the pattern has a group, which PEFT would take for the number, or the number is
            endless.
    """
    rule = r".*?\.[^.]*\.(\d+)\." if pattern is None else rf"(?:^|.*?\.){pattern}\.(\d+)\."
    if _compiled(rule).groups != 1:
        raise SourceError(
            f"the layers_pattern {pattern!r} of an adapter has groups: expected none, since PEFT takes the first group for the "
            "layer's number; write (?:...) in its adapter_config.json"
        )
    found = _match(rule, name, plain=pattern is None or _is_plain(pattern))
    if found is not None and len(found[1]) > _DIGITS:
        raise SourceError(
            f"the module '{name[:200]}' of an adapter has a layer's number of {len(found[1])} digits: expected one of a layer of the base "
            "model; the checkpoint is damaged, save or download it again"
        )
    return None if found is None else found[1]


@functools.lru_cache(_CACHED)
def _compiled(pattern: str) -> re.Pattern[str]:
    """Python's own cache holds some hundred, and a config has more."""
    return re.compile(pattern)


class _Bounded:
    """A pattern in the library that can stop."""

    def __init__(self, pattern: str) -> None:
        """
        Raises:
            re.error: the two libraries would not agree on it, or it takes too much memory.
        """
        import regex

        if (found := _DISPUTED.search(pattern)) is not None:
            raise re.error(f"'{found[0]}' in it can be read in several ways")
        counts = [max(int(count or 1) for count in match.groups("1")) for match in _COUNT.finditer(pattern)]
        if math.prod(max(count, 1) for count in counts) > _REPEATS:
            raise re.error(f"its counts in braces multiply to more than {_REPEATS}")
        try:
            self._pattern = regex.compile(pattern, regex.V0)
        except regex.error as error:
            raise re.error(str(error)) from error
        self._spent = 0.0  # seconds in slow matches

    def match(self, name: str, *, whole: bool) -> Any:
        """
        Raises:
            TimeoutError: all matches together have taken too long.
        """
        start, left = time.perf_counter(), max(_SECONDS - self._spent, 0.01)
        try:
            return self._pattern.fullmatch(name, timeout=left) if whole else self._pattern.match(name, timeout=left)
        finally:
            took = time.perf_counter() - start
            self._spent += took if took > _SLOW else 0


@functools.lru_cache(_CACHED)
def _bounded(pattern: str) -> _Bounded:
    return _Bounded(pattern)


def _match(pattern: str, name: str, *, plain: bool, whole: bool = False) -> Any:
    if plain:
        compiled = _compiled(pattern)
        return compiled.fullmatch(name) if whole else compiled.match(name)
    try:
        return _bounded(pattern).match(name, whole=whole)
    except TimeoutError as error:
        raise SourceError(
            f"the pattern '{pattern[:200]}' in the config of an adapter takes too long to match against '{name[:200]}': expected one "
            "without repetitions of repetitions; correct its adapter_config.json"
        ) from error
    except re.error as error:
        raise SourceError(
            f"the pattern '{pattern[:200]}' in the config of an adapter can't be matched ({error}): expected a plain regular "
            "expression; correct its adapter_config.json"
        ) from error


def _is_plain(pattern: str) -> bool:
    return _PLAIN.fullmatch(pattern) is not None


def _ending(pattern: str) -> str:
    return rf"(.*\.)?({pattern})$"

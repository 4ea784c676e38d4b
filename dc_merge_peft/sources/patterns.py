"""Regular expressions from configs of strangers: matched as PEFT does, but for those that would take for ever.

Python's ``re`` tries one way after the other, of which a short pattern can have more than there are atoms. Before a pattern is
matched its ways are counted; where there are too many, the places that its parts can end at are followed instead, all ways at a
time. That is slower for ordinary patterns, has the same answer, and its steps are limited.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Collection, Iterable
from typing import Any

from dc_merge_peft.errors import SourceError, preview

try:
    from re import _constants as sre  # type: ignore[attr-defined]
    from re import _parser as parser  # type: ignore[attr-defined]
except ImportError:  # Python 3.10
    import sre_constants as sre
    import sre_parse as parser

# Ways times characters that `re` may try: some milliseconds. Places that are followed: some tenths of a second.
_FEW, _STEPS = 10**6, 5 * 10**5
_LONGEST = 200_000  # characters; a path for each module of a large model has half of that
_CACHED = 20_000  # patterns; adapters with a rank of their own for each module have thousands

_FLAGS = re.UNICODE | re.DOTALL | re.VERBOSE
_WORD: Callable[[str], bool] = lambda c: c.isalnum() or c == "_"  # noqa: E731 (stands in the table below)
_CATEGORIES = {
    sre.CATEGORY_DIGIT: str.isdecimal, sre.CATEGORY_NOT_DIGIT: lambda c: not c.isdecimal(),
    sre.CATEGORY_SPACE: str.isspace, sre.CATEGORY_NOT_SPACE: lambda c: not c.isspace(),
    sre.CATEGORY_WORD: _WORD, sre.CATEGORY_NOT_WORD: lambda c: not _WORD(c),
}  # fmt: skip


class _TooHard(Exception):
    """A pattern that can't be matched in reasonable time."""


def check_pattern(pattern: str, field: str, adapter: str) -> None:
    """Refuse what is no regular expression, by itself or where PEFT puts it.

    Raises:
        SourceError: it is none, or longer than any that says something.
    """
    if len(pattern) > _LONGEST:
        raise SourceError(
            f"adapter '{adapter}' has a pattern of {len(pattern)} characters in {field}: expected at most {_LONGEST}; correct its "
            "adapter_config.json"
        )
    try:
        compiled(pattern)
        compiled(_ending(pattern))
    except (re.error, RecursionError, OverflowError, MemoryError) as error:
        raise SourceError(
            f"adapter '{adapter}' has the pattern '{pattern[:200]}' in {field}, which is no regular expression ({error}): "
            "correct its adapter_config.json"
        ) from error


def fits(pattern: str, name: str) -> bool:
    """Whether a pattern matches a whole name.

    Raises:
        SourceError: that would take too long.
    """
    try:
        if _ways(pattern, len(name)) * (len(name) + 1) <= _FEW:
            return compiled(pattern).fullmatch(name) is not None
        return len(name) in _Places(name).after(_parsed(pattern), {0})
    except (_TooHard, RecursionError) as error:
        raise _refusal(pattern, name) from error


def fits_ending(pattern: str, name: str) -> bool:
    """Whether it matches a whole path or its trailing parts: PEFT's rule for ranks and alphas.

    Raises:
        SourceError: that would take too long.
    """
    return fits(_ending(pattern), name)


def first_match(pattern: str, name: str) -> re.Match[str] | None:
    """The match of a pattern at the beginning of a name.

    Raises:
        SourceError: it would take too long to find.
    """
    try:
        if _ways(pattern, len(name)) * (len(name) + 1) > _FEW:
            raise _TooHard
    except (_TooHard, RecursionError) as error:
        raise _refusal(pattern, name) from error
    return compiled(pattern).match(name)


@functools.lru_cache(_CACHED)
def compiled(pattern: str) -> re.Pattern[str]:
    """Python's own cache holds some hundred, and a config has more."""
    return re.compile(pattern)


def _ending(pattern: str) -> str:
    return rf"(.*\.)?({pattern})\n?"  # PEFT says "$", which a line's end may follow


def _refusal(pattern: str, name: str) -> SourceError:
    return SourceError(
        f"the pattern {preview([pattern[:200]])} in the config of an adapter takes too long to match against '{name[:200]}': "
        "expected one without repetitions of repetitions; correct its adapter_config.json"
    )


@functools.lru_cache(_CACHED)
def _parsed(pattern: str) -> Any:
    return parser.parse(pattern)


@functools.lru_cache(_CACHED)
def _ways(pattern: str, length: int) -> float:
    """How many ways `re` may have to try on a name of this length; infinite where that is not easily said."""
    return _ways_of(_parsed(pattern), length)


def _ways_of(nodes: Iterable[tuple[Any, Any]], length: int) -> float:
    ways = 1.0
    for operation, argument in nodes:
        if operation is sre.SUBPATTERN:
            ways *= _ways_of(argument[-1], length)
        elif operation is sre.BRANCH:
            ways *= sum(_ways_of(branch, length) for branch in argument[1])
        elif operation in (sre.ASSERT, sre.ASSERT_NOT):
            ways *= 1 + _ways_of(argument[1], length)
        elif operation in (sre.MAX_REPEAT, sre.MIN_REPEAT):
            fewest, most, body = argument
            ways *= _ways_to_repeat(fewest, most, body, length)
        elif operation not in _SIMPLE:
            return float("inf")
    return ways


def _ways_to_repeat(fewest: int, most: int, body: Any, length: int) -> float:
    once = _ways_of(body, length)
    if int(most) <= 1:
        return 1 + once
    shortest, longest = body.getwidth()
    if once > 1 or shortest != longest or not shortest:
        return float("inf")
    return min(int(most) - fewest, length) + 1


_SIMPLE = (sre.LITERAL, sre.NOT_LITERAL, sre.ANY, sre.IN, sre.AT)


class _Places:
    """A name, and the places in it that parts of a pattern can end at."""

    def __init__(self, name: str) -> None:
        self._name, self._steps = name, 0

    def after(self, nodes: Any, starts: Collection[int]) -> set[int]:
        """Where a sequence can end that begins at one of these places."""
        flags = getattr(getattr(nodes, "state", None), "flags", 0)
        if flags & ~_FLAGS:
            raise _TooHard
        ends = set(starts)
        for operation, argument in nodes:
            self._steps += 1 + len(ends)
            if self._steps > _STEPS:
                raise _TooHard
            if not ends:
                break
            ends = self._after_one(operation, argument, ends, dotall=bool(flags & re.DOTALL))
        return ends

    def _after_one(self, operation: Any, argument: Any, starts: set[int], *, dotall: bool) -> set[int]:
        if operation in _SIMPLE and operation is not sre.AT:
            fits_here = functools.partial(_is_one, operation, argument, dotall=dotall)
            return {p + 1 for p in starts if p < len(self._name) and fits_here(self._name[p])}
        if operation is sre.AT:
            return {p for p in starts if self._stands_at(argument, p)}
        if operation is sre.SUBPATTERN:
            _, added, taken, body = argument
            if added or taken:  # in a part alone
                raise _TooHard
            return self.after(body, starts)
        if operation is sre.BRANCH:
            return set().union(*(self.after(branch, starts) for branch in argument[1]))
        if operation in (sre.MAX_REPEAT, sre.MIN_REPEAT):
            fewest, most, body = argument
            return self._repeated(fewest, most, body, starts)
        if operation in (sre.ASSERT, sre.ASSERT_NOT):
            direction, body = argument
            return {p for p in starts if self._sees(direction, body, p) is (operation is sre.ASSERT)}
        raise _TooHard  # a reference to a group, or one that is not tried twice

    def _repeated(self, fewest: int, most: int, body: Any, starts: set[int]) -> set[int]:
        ends = starts
        for _ in range(fewest):
            before, ends = ends, self.after(body, ends)
            if ends == before:
                break
        found, new, count = set(ends), ends, fewest
        while new and count < int(most):
            new = self.after(body, new) - found
            found |= new
            count += 1
        return found

    def _sees(self, direction: int, body: Any, place: int) -> bool:
        if direction > 0:
            return bool(self.after(body, {place}))
        start = place - body.getwidth()[0]
        return start >= 0 and place in self.after(body, {start})

    def _stands_at(self, where: Any, place: int) -> bool:
        name = self._name
        before = place > 0 and _WORD(name[place - 1])
        after = place < len(name) and _WORD(name[place])
        if where in (sre.AT_BEGINNING, sre.AT_BEGINNING_STRING):
            return place == 0
        if where is sre.AT_END:
            return name[place:] in ("", "\n")
        if where is sre.AT_END_STRING:
            return place == len(name)
        return (before != after) is (where is sre.AT_BOUNDARY)


def _is_one(operation: Any, argument: Any, character: str, *, dotall: bool) -> bool:
    """Whether a part that stands for one character stands for this one."""
    if operation is sre.ANY:
        return dotall or character != "\n"
    if operation is sre.LITERAL:
        return ord(character) == argument
    if operation is sre.NOT_LITERAL:
        return ord(character) != argument
    negated = argument[0][0] is sre.NEGATE
    return any(_in(kind, value, character) for kind, value in argument[negated:]) is not negated


def _in(operation: Any, argument: Any, character: str) -> bool:
    if operation is sre.LITERAL:
        return ord(character) == argument
    if operation is sre.RANGE:
        return argument[0] <= ord(character) <= argument[1]
    return _CATEGORIES[argument](character)

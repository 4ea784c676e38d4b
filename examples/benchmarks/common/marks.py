"""Parts of pages that programs write, each between two marks with its name: ``<!-- NAME: written by ... -->`` and ``<!-- /NAME -->``."""

from __future__ import annotations

import re
from collections.abc import Callable

_MARKED = re.compile(r"(<!-- ([\w-]+): written by [^\n]*-->\n).*?(<!-- /\2 -->)", re.DOTALL)


def rewritten(page: str, name: str, text: str) -> str:
    """A page with one part made anew.

    Raises:
        ValueError: the page has no marks of that name.
    """
    if not any(found[2] == name for found in _MARKED.finditer(page)):
        raise ValueError(
            f"found no marks of {name!r} in the page: expected '<!-- {name}: written by ... -->' and its end"
        )
    return _MARKED.sub(lambda found: _filled(found, text) if found[2] == name else found[0], page)


def all_rewritten(page: str, text_of: Callable[[str], str]) -> str:
    """A page with every part made anew, each from its name."""
    return _MARKED.sub(lambda found: _filled(found, text_of(found[2])), page)


def _filled(found: re.Match[str], text: str) -> str:
    return f"{found[1]}\n{text}\n\n{found[3]}"

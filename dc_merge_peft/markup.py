"""Markup from values: whatever is not markup already is escaped, so that no name of a stranger can become any."""

from __future__ import annotations

import html
from typing import Any, TypeAlias

from dc_merge_peft.errors import printable

_VOID = {"col", "input", "meta"}


class Html(str):
    """Text that is markup."""

    __slots__ = ()


# What an element may hold: markup as it is, anything else as text; None is nothing.
Child: TypeAlias = Any


def element(name: str, /, *children: Child, **attributes: Child) -> Html:
    """``<name attributes>children</name>``.

    Args:
        name: Of the element.
        *children: Markup, text, or lists of these.
        **attributes: By name, with ``_`` for ``-``, and one at the end left out (``class_``). None leaves one out, True gives
            it without a value.
    """
    written = "".join(_attribute(key, value) for key, value in attributes.items() if value is not None)
    if name in _VOID:
        return Html(f"<{name}{written}>")
    return Html(f"<{name}{written}>{joined(*children)}</{name}>")


def joined(*children: Child) -> Html:
    """Children of no element."""
    return Html("".join(map(_child, children)))


def _child(child: Child) -> str:
    if child is None:
        return ""
    if isinstance(child, Html):
        return child
    if isinstance(child, (list, tuple)):
        return joined(*child)
    return html.escape(printable(child), quote=False)


def _attribute(key: str, value: Child) -> str:
    name = key.rstrip("_").replace("_", "-")
    return f" {name}" if value is True else f' {name}="{html.escape(printable(value))}"'

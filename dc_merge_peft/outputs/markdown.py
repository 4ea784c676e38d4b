"""Text from strangers in Markdown, where it must stay text."""

from __future__ import annotations

import re

from dc_merge_peft.errors import printable

# What Markdown, HTML or the Hub's renderer could take for more than text: emphasis, links, tags, entities, formulas,
# mentions, addresses that become links by themselves.
_ACTIVE = re.compile(r"[\\`*_\[\]<>|#~!&$:@^{}]|(?<=[wW]{3})\.")
# What would be a list, a rule or the underlining of a title there.
_AT_THE_START = re.compile(r"^(\d{1,9}(?=[.)](?: |$))|(?=[-+=]))(.)")


def text(value: object) -> str:
    """A value in running text or a table cell: one line, nothing in it is markup."""
    escaped = _ACTIVE.sub(lambda match: "\\" + match[0], printable(_joined(value)))
    return _AT_THE_START.sub(r"\1\\\2", escaped)


def code(value: object) -> str:
    """What stands between backticks or in quotes inside a code block: one line, no backticks, quotes or cell borders."""
    return re.sub(r"[`\"|\\]", "'", printable(_joined(value)))


def fenced(content: str, language: str = "") -> str:
    """A code block whose fence is longer than any in its content."""
    longest = max((len(run) for run in re.findall(r"`+", content)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{content}\n{fence}"


def _joined(value: object) -> str:
    """Line ends and tabs as spaces, before what can't be printed is spelled out."""
    return " ".join(str(value).split())

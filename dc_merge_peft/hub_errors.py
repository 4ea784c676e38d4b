"""Failures of the Hub and of its client: what they were, when to try again, and never a token.

The client lets the errors of its HTTP library through, whose names change with its versions. So they are looked at by what
they carry (a status, headers, a cause), not by their class.
"""

from __future__ import annotations

import re
import traceback
from collections.abc import Callable
from contextlib import suppress
from time import monotonic, sleep
from typing import Any, TypeVar

from dc_merge_peft.errors import HIDDEN, first_line, without_secrets

T = TypeVar("T")

# The client repeats most requests by itself, for some 23 s, but not all of them: it creates a repository, commits and
# lists files once. Those are repeated here, unless the client has already spent its patience.
TRIES = 3
PATIENCE_S = 15.0
LONGEST_WAIT_S = 60.0  # that the Hub may ask for
LONGEST_TEXT = 300  # of what others say
# 412 is the answer to a commit while someone else's is being made.
_PASSING = (408, 412, 429, 500, 502, 503, 504)
# In the header "RateLimit": none of the requests of a span of time remain, and it ends in so many seconds.
_LIMIT_SPENT = re.compile(r";\s*r\s*=\s*0\s*;\s*t\s*=\s*(\d{1,9})\b")
_NETWORK_LIBRARIES = ("httpx", "httpcore", "requests", "urllib3")
# Names of errors in these libraries which say that there is no way to the Hub at all.
_NO_CONNECTION = (
    "ConnectError",
    "ConnectTimeout",
    "ConnectionError",
    "ProxyError",
    "UnsupportedProtocol",
    "InvalidURL",
)


def causes(error: BaseException) -> list[BaseException]:
    """The error, what caused it, what caused that: the client hides the Hub's answer behind what it says of its cache."""
    chain = [error]
    while (cause := chain[-1].__cause__) is not None and cause not in chain:
        chain.append(cause)
    return chain


def own_file(error: BaseException) -> str | None:
    """Which file here the client could not read or write, its token or its cache, in words and with what to do; None where it was
    nothing of the kind."""
    failed = (e for e in causes(error) if isinstance(e, OSError) and e.filename is not None and http_status(e) is None)
    return next(
        (
            f"the Hub's client can't use '{e.filename}' ({e.strerror}): expected its token and its cache to be yours to read and to write, "
            "and room there; see to that, or name another folder in the environment variable HF_HOME"
            for e in failed
        ),
        None,
    )


def http_status(error: BaseException) -> int | None:
    """The status of the Hub's answer, if it answered."""
    return getattr(_response(error), "status_code", None)


def retry_after(error: BaseException) -> float | None:
    """The seconds that the Hub asks to wait: those after which its limit of requests starts anew, or what is in its way does."""
    headers = getattr(_response(error), "headers", None) or {}
    if spent := _LIMIT_SPENT.search(str(headers.get("RateLimit", ""))):
        return float(spent[1])
    text = str(headers.get("Retry-After", ""))
    return float(text) if text.isdecimal() else None


def try_again(error: BaseException) -> str:
    """When, in words: after the seconds that the Hub asks to wait, or later."""
    wait = retry_after(error)
    return f"try again {f'in {wait:.0f} seconds' if wait else 'later'}"


def connection_broke(error: BaseException) -> bool:
    """Whether the network failed on the way, so that the Hub may or may not have done what it was asked."""
    return any(
        _of_network(e) and http_status(e) is None and type(e).__name__ not in _NO_CONNECTION for e in causes(error)
    )


def patiently(call: Callable[[], T], repeatable: Callable[[BaseException], bool] = lambda _: True) -> T:
    """What ``call`` returns; it is called again, after a wait, where it failed in a way that passes.

    Args:
        call: Something that may be done twice.
        repeatable: Says after which of these failures it may not.
    """
    start, wait = monotonic(), 1.0
    for attempt in range(1, TRIES + 1):
        try:
            return call()
        except Exception as error:
            passing = http_status(error) in _PASSING or connection_broke(error)
            pause = retry_after(error) or wait
            over = attempt == TRIES or monotonic() - start > PATIENCE_S or pause > LONGEST_WAIT_S
            if not passing or over or not repeatable(error):
                raise
            sleep(pause)
            wait *= 2
    raise AssertionError


def secrets(token: str | bool | None) -> tuple[str, ...]:
    """The tokens in use, to be kept out of texts: the one given, and that of the environment or login."""
    import huggingface_hub

    stored = None
    with suppress(OSError):  # one that nobody here can read is not in use; the client says so where it needs it
        stored = huggingface_hub.get_token()
    return tuple(secret for secret in (token, stored) if isinstance(secret, str) and secret.strip())


def in_words(error: BaseException, known: tuple[str, ...]) -> str:
    """What went wrong: the Hub's own words where it answered, else the error's, without secrets."""
    status = http_status(error)
    if status is not None:
        said = words_of_the_hub(error, known)
        text = f"the Hub answered {status}" + (f" ({said})" if said else "")
    else:
        text = " ".join(str(error).split()) if isinstance(error, ValueError) else first_line(error)
    return without_secrets(text, *known)[:LONGEST_TEXT]


def words_of_the_hub(error: BaseException, known: tuple[str, ...]) -> str:
    """What the Hub wrote to its answer, without secrets; often nothing."""
    said = next((e.server_message for e in causes(error) if getattr(e, "server_message", None)), "")  # type: ignore[attr-defined]
    return without_secrets(" ".join(str(said).split()), *known)[:LONGEST_TEXT]


def harmless(error: Exception, known: tuple[str, ...]) -> Exception | None:
    """The error, to be named as the cause of another one; None where it or a cause of it repeats a secret."""
    text = "".join(traceback.format_exception(error))
    return error if without_secrets(text, *known).count(HIDDEN) == text.count(HIDDEN) else None


def _response(error: BaseException) -> Any:
    found = (getattr(e, "response", None) for e in causes(error))
    return next((response for response in found if response is not None), None)


def _of_network(error: BaseException) -> bool:
    return any(base.__module__.startswith(_NETWORK_LIBRARIES) for base in type(error).__mro__)

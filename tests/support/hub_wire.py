"""Requests and answers of the loopback Hub, as values, and the forms its answers take."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import parse_qs

from .hub_store import HubError

DATE = "2024-01-01T00:00:00.000Z"


@dataclass(frozen=True)
class Request:
    """One request; `path` is still percent-encoded (a revision may contain an encoded slash)."""

    method: str
    path: str
    query: str
    headers: dict[str, str] = field(repr=False)
    body: bytes = field(repr=False)

    def json(self) -> Any:
        """The body as JSON."""
        return json.loads(self.body or b"{}")

    def flag(self, name: str) -> bool:
        """Whether a query parameter is set to something true."""
        return parse_qs(self.query).get(name, ["0"])[0].lower() in {"1", "true"}


@dataclass
class Response:
    """One answer; the body is left out by the server on HEAD, its length is still announced."""

    status: int = 200
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)


def as_json(data: object, status: int = 200) -> Response:
    """A JSON answer."""
    return Response(status, json.dumps(data).encode(), {"Content-Type": "application/json"})


def as_error(error: HubError) -> Response:
    """The answer to a refused operation, in the Hub's form."""
    response = as_json({"error": error.message, **error.body}, error.status)
    response.headers |= {"X-Error-Message": error.message, **error.headers}
    if error.code:
        response.headers["X-Error-Code"] = error.code
    return response


def as_content(request: Request, data: bytes, headers: dict[str, str]) -> Response:
    """A file's bytes, or the asked-for range of them."""
    headers = {"Accept-Ranges": "bytes", "Content-Type": "application/octet-stream", **headers}
    wanted = re.fullmatch(r"bytes=(\d*)-(\d*)", request.headers.get("range", ""))
    if wanted is None or wanted.groups() == ("", ""):
        return Response(200, data, headers)
    first, last = wanted.groups()
    start = int(first) if first else max(len(data) - int(last), 0)
    end = min(int(last), len(data) - 1) if first and last else len(data) - 1
    if start > end:
        return Response(416, b"", {**headers, "Content-Range": f"bytes */{len(data)}"})
    return Response(206, data[start : end + 1], {**headers, "Content-Range": f"bytes {start}-{end}/{len(data)}"})

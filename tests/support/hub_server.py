"""A Hugging Face Hub on the loopback interface, for tests with the real `huggingface_hub` client.

    with hub_server() as server:
        server.add_repo("someone/model", {"config.json": b"{}"})
        point_client_at(monkeypatch, server, tmp_path, token=server.token)
        snapshot_download("someone/model")

Repositories live in memory. Large files (`.safetensors`, `.bin`, or over 10 MiB) are uploaded through
LFS and downloaded through a redirect to a second address of the same server (`localhost` instead of
`127.0.0.1`), as the Hub redirects to its CDN, so that a leak of the token to it is visible. Answers can
be made to fail with `HubServer.fail`. Every request is recorded, the token itself never.
"""

from __future__ import annotations

import re
import socket
import struct
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote

from .hub_client import close_client, point_client_at
from .hub_routes import Routes
from .hub_store import GITATTRIBUTES, Commit, HubError, PullRequest, Repo, Store, User
from .hub_wire import Request, Response, as_error

__all__ = ["Commit", "HubServer", "PullRequest", "RequestRecord", "User", "hub_server", "point_client_at"]


@dataclass
class RequestRecord:
    """One request that arrived. `status` is the answer's, 0 as long as none was sent (connection cut)."""

    method: str
    path: str
    query: str
    authorized: bool
    byte_range: str | None = None
    status: int = 0


@dataclass
class Failure:
    """A rule that makes matching requests fail; see `HubServer.fail`."""

    method: str | None
    path_regex: str
    status: int
    times: int
    skip: int = 0
    cut: bool | str = False
    after_bytes: int = 0
    reset: bool = False
    retry_after: int | None = None
    delay: float = 0.0
    error: HubError = field(default_factory=lambda: HubError(500, ""))

    def applies(self, method: str, path: str) -> bool:
        """Whether the request is to fail, counting it if so."""
        if self.method not in {None, method} or not re.search(self.path_regex, path):
            return False
        if self.skip > 0:
            self.skip -= 1
            return False
        self.times -= 1
        return self.times >= 0


class HubServer:
    """The server's state, and what a test does with it. `token` owns every namespace as user `tester`."""

    token = "hf_loopback_owner"

    def __init__(self, port: int) -> None:
        """A Hub without repositories at a port of the loopback interface."""
        self.endpoint = f"http://127.0.0.1:{port}"
        self.store = Store(tokens={self.token: User("tester")})
        self.routes = Routes(self.store, self.endpoint, f"http://localhost:{port}")
        self.requests: list[RequestRecord] = []
        self.sleeps: list[float] = []
        self.bugs: list[BaseException] = []
        self._failures: list[Failure] = []
        self._lock = threading.RLock()

    def add_token(self, token: str, user: str, *, write: bool = True, orgs: tuple[str, ...] = ()) -> str:
        """Know another token: of a user who owns the namespaces `user` and `orgs` only."""
        self.store.tokens[token] = User(user, frozenset(orgs), write)
        return token

    def add_repo(self, repo_id: str, files: Mapping[str, bytes], private: bool = False, revision: str = "main") -> str:
        """Put a repository, or another revision (branch) or commit of one, with exactly `files`.

        Returns the commit id. A new repository gets a `main` without files if `revision` is another branch.
        """
        with self._lock:
            repo = self.store.repos.setdefault(repo_id, Repo(repo_id, private))
            if revision != "main" and "main" not in repo.branches:
                repo.commit("main", {}, "initial commit")
            base = None if revision in repo.branches else repo.branches.get("main")
            return repo.commit(revision, self.store.blobs(files), "test files", base=base).sha

    def add_tag(self, repo_id: str, tag: str, revision: str = "main") -> None:
        """Tag a revision."""
        self.store.repos[repo_id].tags[tag] = self.store.repos[repo_id].resolve(revision).sha

    def files(self, repo_id: str, revision: str | None = "main") -> dict[str, bytes]:
        """The files at a revision, without the `.gitattributes` that the Hub itself put there."""
        found = {path: blob.data for path, blob in self.store.repos[repo_id].resolve(revision or "main").files.items()}
        return {path: data for path, data in found.items() if (path, data) != (".gitattributes", GITATTRIBUTES)}

    def commits(self, repo_id: str, revision: str | None = None) -> list[Commit]:
        """The commits of a revision, or of the whole repository, the oldest first."""
        repo = self.store.repos[repo_id]
        return repo.history(revision) if revision else list(repo.commits.values())

    def pull_requests(self, repo_id: str) -> list[PullRequest]:
        """The pull requests of a repository."""
        return list(self.store.repos[repo_id].pulls.values())

    def made(self, method: str | None = None, path_regex: str = "") -> list[RequestRecord]:
        """The recorded requests with this method and a path that the pattern is found in."""
        return [r for r in self.requests if method in {None, r.method} and re.search(path_regex, r.path)]

    def fail(
        self,
        method: str | None = None,
        path_regex: str = "",
        status: int = 500,
        times: int = 1,
        *,
        skip: int = 0,
        cut: bool | str = False,
        after_bytes: int = 0,
        reset: bool = False,
        retry_after: int | None = None,
        rate_limit: int | None = None,
        delay: float = 0.0,
        error_code: str | None = None,
        message: str | None = None,
    ) -> None:
        """Make the next `times` requests fail that match, after letting `skip` of them pass.

        `path_regex` is searched in the decoded path without the query. `status` is answered without
        doing anything; 401 says that the token is wrong (set `error_code="RepoNotFound"` for the answer
        to a missing token), 404 that the repository is missing. `retry_after` adds that header, `rate_limit` the one
        by which the Hub itself says after how many seconds its limit of requests starts anew.

        `cut=True` breaks the connection instead: of a PUT or POST after reading `after_bytes` of its
        body, of a GET after sending `after_bytes` of the answer's (0: before any answer). `cut="response"`
        carries the request out and then breaks the connection without an answer. `reset=True` breaks it
        by a TCP reset, otherwise by an orderly close. `delay` waits that many seconds before all this;
        with `status=200` that is all that happens.
        """
        defaults = {401: "Invalid credentials in Authorization header", 404: "Repository not found"}
        code = error_code or ("RepoNotFound" if status == 404 else None)
        error = HubError(status, message or defaults.get(status, f"injected failure {status}"), code)
        if retry_after is not None:
            error.headers["Retry-After"] = str(retry_after)
        if rate_limit is not None:
            error.headers |= {
                "RateLimit": f'"api";r=0;t={rate_limit}',
                "RateLimit-Policy": '"fixed window";"api";q=500;w=300',
            }
        with self._lock:
            self._failures.append(
                Failure(method, path_regex, status, times, skip, cut, after_bytes, reset, retry_after, delay, error)
            )

    def recover(self) -> None:
        """Let no further request fail."""
        with self._lock:
            self._failures.clear()

    def record(self, record: RequestRecord) -> Failure | None:
        """Note a request that arrived; the rule that it is to fail by, if any."""
        with self._lock:
            self.requests.append(record)
            return next((rule for rule in self._failures if rule.applies(record.method, record.path)), None)

    def answer(self, request: Request) -> Response:
        """The answer to a request; a fault of this server's own fails the test at the end."""
        with self._lock:
            try:
                return self.routes.answer(request)
            except Exception as bug:
                self.bugs.append(bug)
                return as_error(HubError(501, f"the test server failed: {bug!r}"))


class _Handler(BaseHTTPRequestHandler):
    """One connection."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    timeout = 30
    hub: HubServer

    def _body(self, limit: int | None = None) -> bytes:
        """The request's body, or its first `limit` bytes."""
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            length = int(self.headers.get("Content-Length") or 0)
            return self.rfile.read(length if limit is None else min(length, limit))
        parts: list[bytes] = []
        while limit is None or sum(map(len, parts)) < limit:
            size = int(self.rfile.readline().split(b";")[0], 16)
            parts.append(self.rfile.read(size))
            self.rfile.readline()
            if size == 0:
                break
        return b"".join(parts)

    def _cut(self, reset: bool) -> None:
        """Break the connection."""
        self.close_connection = True
        with suppress(OSError):
            if reset:
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                socket.close(self.connection.detach())
            else:
                self.connection.shutdown(socket.SHUT_RDWR)

    def _serve(self) -> None:
        path, _, query = self.path.partition("?")
        authorized, byte_range = "Authorization" in self.headers, self.headers.get("Range")
        record = RequestRecord(self.command, unquote(path), query, authorized, byte_range)
        rule = self.hub.record(record)
        if rule is not None:
            time.sleep(rule.delay)
        sending = self.command in {"PUT", "POST"}
        if rule is not None and rule.cut is True and (sending or rule.after_bytes == 0):
            self._body(rule.after_bytes)
            return self._cut(rule.reset)
        headers = {name.lower(): value for name, value in self.headers.items()}
        request = Request(self.command, path, query, headers, self._body())
        if rule is not None and not rule.cut and rule.status != 200:
            response = as_error(rule.error)
        else:
            response = self.hub.answer(request)
        if rule is not None and rule.cut == "response":
            return self._cut(rule.reset)
        record.status = response.status
        self.send_response_only(response.status)
        for name, value in response.headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(response.body)))
        self.end_headers()
        if self.command == "HEAD":
            return None
        if rule is not None and rule.cut is True:
            self.wfile.write(response.body[: rule.after_bytes])
            return self._cut(rule.reset)
        self.wfile.write(response.body)
        return None

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = _serve


class _Server(ThreadingHTTPServer):
    """The listening socket; connections that the client or a rule broke are no news."""

    daemon_threads = True

    def handle_error(self, request: object, client_address: object) -> None:
        """Say nothing about a broken connection."""


@contextmanager
def hub_server() -> Iterator[HubServer]:
    """A running server; raises at the end if it could not carry out some request for a fault of its own."""
    handler = type("Handler", (_Handler,), {})
    listener = _Server(("127.0.0.1", 0), handler)
    server = HubServer(listener.server_address[1])
    handler.hub = server  # type: ignore[attr-defined]
    thread = threading.Thread(target=listener.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        close_client()
        listener.shutdown()
        listener.server_close()
        thread.join()
    if server.bugs:
        raise AssertionError("the loopback Hub failed") from server.bugs[0]

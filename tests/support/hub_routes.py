"""The Hub's HTTP interface on top of `hub_store`: what each request of `huggingface_hub` is answered.

Only model repositories with a namespace (`owner/name`) are served, and only what the client needs to
create, describe, list, upload, commit and download. Nothing offers Xet storage: `preupload` says
"lfs" or "regular" and no answer carries Xet headers.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from urllib.parse import parse_qs, unquote

from .hub_store import Blob, Commit, HubError, Store, User
from .hub_wire import DATE, Request, Response, as_content, as_error, as_json
from .hub_write import WriteRoutes


def _file_entry(path: str, blob: Blob) -> dict[str, object]:
    entry: dict[str, object] = {"type": "file", "path": path, "size": len(blob.data), "oid": blob.git_oid}
    if blob.lfs:
        entry["lfs"] = {"oid": blob.sha256, "size": len(blob.data), "pointerSize": len(blob.pointer)}
    return entry


def _entries(commit: Commit, folder: str, recursive: bool) -> list[dict[str, object]]:
    prefix = f"{folder.strip('/')}/" if folder else ""
    inside = {path: blob for path, blob in sorted(commit.files.items()) if path.startswith(prefix)}
    if prefix and not inside:
        raise HubError(404, f"{folder} does not exist on this revision", "EntryNotFound")
    folders: dict[str, dict[str, object]] = {}
    files: list[dict[str, object]] = []
    for path, blob in inside.items():
        parts = path.removeprefix(prefix).split("/")
        for depth in range(1, len(parts) if recursive else min(len(parts), 2)):
            name = prefix + "/".join(parts[:depth])
            folders[name] = {"type": "directory", "path": name, "size": 0, "oid": "0" * 40}
        if recursive or len(parts) == 1:
            files.append(_file_entry(path, blob))
    return [*folders.values(), *files]


class Routes(WriteRoutes):
    """Answers every request that the test server knows."""

    def __init__(self, store: Store, endpoint: str, cdn: str) -> None:
        """Build the table of requests, tried in order."""
        super().__init__(store, endpoint, cdn)
        self.yaml_errors: list[str] = []  # what the check of a card's metadata finds
        self.moved: dict[str, str] = {}  # old ids without an owner, and what they are today
        repo, rest = r"(?P<repo>[^/]+/[^/]+)", r"(?:/(?P<rest>.*))?"
        self._table: list[tuple[str, re.Pattern[str], Callable[..., Response]]] = [
            (method, re.compile(pattern), handler)
            for method, pattern, handler in (
                ("GET", r"/api/whoami-v2", self._whoami),
                ("POST", r"/api/validate-yaml", self._validate_yaml),
                ("POST", r"/api/repos/create", self.create),
                ("DELETE", r"/api/repos/delete", self.delete),
                ("GET|HEAD", rf"/{repo}/resolve/(?P<rev>[^/]+)/(?P<rest>.+)", self._resolve),
                ("GET|HEAD", rf"/_cdn/{repo}/(?P<oid>[0-9a-f]{{64}})/.*", self._cdn_get),
                ("PUT", rf"/_lfs/{repo}/(?P<oid>[0-9a-f]{{64}})", self.lfs_put),
                ("POST", rf"/{repo}\.git/info/lfs/objects/batch", self.lfs_batch),
                ("POST", rf"/{repo}\.git/info/lfs/verify", self.lfs_verify),
                ("GET", rf"/api/models/{repo}(?:/revision/(?P<rev>[^/]+))?", self._info),
                ("GET", r"/api/models/(?P<name>[^/]+)", self._moved),
                ("GET", rf"/api/models/{repo}/tree/(?P<rev>[^/]+){rest}", self._tree),
                ("POST", rf"/api/models/{repo}/paths-info/(?P<rev>[^/]+)", self._paths_info),
                ("GET", rf"/api/models/{repo}/refs", self._refs),
                ("GET", rf"/api/models/{repo}/commits/(?P<rev>[^/]+)", self._commits),
                ("POST", rf"/api/models/{repo}/(?P<kind>branch|tag)/(?P<rev>[^/]+)", self.add_ref),
                ("POST", rf"/api/models/{repo}/preupload/(?P<rev>[^/]+)", self.preupload),
                ("POST", rf"/api/models/{repo}/commit/(?P<rev>[^/]+)", self.commit),
                ("POST", rf"/api/models/{repo}/discussions", self.open_discussion),
                ("GET", rf"/api/models/{repo}/discussions/(?P<num>\d+)", self.discussion),
            )
        ]

    def answer(self, request: Request) -> Response:
        """The answer to a request, errors included."""
        try:
            for methods, pattern, handler in self._table:
                match = pattern.fullmatch(request.path)
                if match and request.method in methods.split("|"):
                    storage = request.path.startswith(("/_cdn/", "/_lfs/"))  # signed addresses: no token
                    user = None if storage else self.store.user(request.headers.get("authorization"))
                    parts = {name: unquote(part or "") for name, part in match.groupdict().items()}
                    return handler(request, user, **parts)
            raise HubError(404, "Sorry, we can't find the page you are looking for.")
        except HubError as error:
            return as_error(error)

    def _validate_yaml(self, request: Request, user: User | None) -> Response:
        """Whether the Hub takes a card's metadata; it answers 400 where not."""
        errors = [{"message": message} for message in self.yaml_errors]
        return as_json({"errors": errors, "warnings": []}, 400 if errors else 200)

    def _whoami(self, request: Request, user: User | None) -> Response:
        if user is None:
            raise HubError(401, "Invalid username or password.")
        auth = {
            "type": "access_token",
            "accessToken": {"displayName": "test", "role": ["read", "write"][user.write]},
        }
        orgs = [{"name": name} for name in sorted(user.namespaces or ())]
        return as_json({"type": "user", "name": user.name, "fullname": user.name, "orgs": orgs, "auth": auth})

    def _resolve(self, request: Request, user: User | None, repo: str, rev: str, rest: str) -> Response:
        """A small file as it is; a large one by a redirect to other storage, which must not get the token."""
        commit, blob = self.store.open(repo, user).blob(rev, rest)
        headers = {"ETag": f'"{blob.oid}"', "X-Repo-Commit": commit.sha}
        if not blob.lfs:
            return as_content(request, blob.data, headers)
        headers |= {"X-Linked-Etag": f'"{blob.sha256}"', "X-Linked-Size": str(len(blob.data))}
        path = request.path.split("/resolve/")[1].split("/", 1)[1]
        return Response(302, b"", {**headers, "Location": f"{self.cdn}/_cdn/{repo}/{blob.sha256}/{path}"})

    def _cdn_get(self, request: Request, user: User | None, repo: str, oid: str) -> Response:
        stored = self.store.repos.get(repo)
        if stored is None or oid not in stored.lfs_objects:
            raise HubError(403, "Access denied")
        return as_content(request, stored.lfs_objects[oid], {"ETag": f'"{oid}"'})

    def _info(self, request: Request, user: User | None, repo: str, rev: str) -> Response:
        opened = self.store.open(repo, user)
        commit = opened.resolve(rev or "main")
        siblings: list[dict[str, object]] = []
        for path, blob in sorted(commit.files.items()):
            entry: dict[str, object] = {"rfilename": path}
            if request.flag("blobs"):
                entry |= {"size": len(blob.data), "blobId": blob.git_oid}
                if blob.lfs:
                    entry["lfs"] = {
                        "sha256": blob.sha256,
                        "size": len(blob.data),
                        "pointerSize": len(blob.pointer),
                    }
            siblings.append(entry)
        about = {
            "id": repo,
            "modelId": repo,
            "author": opened.namespace,
            "sha": commit.sha,
            "private": opened.private,
        }
        about |= {"lastModified": DATE, "createdAt": DATE, "gated": False, "disabled": False, "tags": []}
        return as_json({**about, "siblings": siblings})

    def _moved(self, request: Request, user: User | None, name: str) -> Response:
        """An old id is answered by the way to the new one."""
        if name not in self.moved:
            raise HubError(404 if user else 401, "Repository not found", "RepoNotFound")
        return Response(307, b"", {"Location": f"/api/models/{self.moved[name]}"})

    def _tree(self, request: Request, user: User | None, repo: str, rev: str, rest: str) -> Response:
        return as_json(_entries(self.store.open(repo, user).resolve(rev), rest, request.flag("recursive")))

    def _paths_info(self, request: Request, user: User | None, repo: str, rev: str) -> Response:
        paths = parse_qs(request.body.decode()).get("paths", [])
        every = _entries(self.store.open(repo, user).resolve(rev), "", True)
        return as_json([entry for entry in every if entry["path"] in paths])

    def _refs(self, request: Request, user: User | None, repo: str) -> Response:
        opened = self.store.open(repo, user)
        heads = {name: sha for name, sha in opened.branches.items() if not name.startswith("refs/pr/")}
        pulls = {name: sha for name, sha in opened.branches.items() if name.startswith("refs/pr/")}
        kinds = (
            ("branches", "refs/heads/", heads),
            ("tags", "refs/tags/", opened.tags),
            ("pullRequests", "", pulls),
        )
        refs: dict[str, object] = {"converts": []}
        for kind, prefix, names in kinds:
            refs[kind] = [{"name": n, "ref": prefix + n, "targetCommit": sha} for n, sha in names.items()]
        return as_json(refs)

    def _commits(self, request: Request, user: User | None, repo: str, rev: str) -> Response:
        return as_json(
            [
                {
                    "id": c.sha,
                    "title": c.title,
                    "message": c.description,
                    "date": DATE,
                    "authors": [{"user": c.author}],
                }
                for c in self.store.open(repo, user).history(rev)[::-1]
            ]
        )

"""The requests that change something: create a repository, upload large files, commit, open pull requests."""

from __future__ import annotations

import base64
import json
from typing import Any

from .hub_store import Blob, HubError, Repo, Store, User
from .hub_wire import DATE, Request, Response, as_json


def _apply(repo: Repo, files: dict[str, Blob], line: dict[str, Any], limit: int) -> None:
    """Do one operation of a commit on a tree, in place."""
    key, value = line["key"], line["value"]
    path = value.get("path", "")
    if key == "file":
        data = base64.b64decode(value["content"])
        if len(data) > limit:
            raise HubError(400, f"{path} is too large for a regular file, use LFS")
        files[path] = Blob(data, lfs=False)
    elif key == "lfsFile":
        if value["oid"] not in repo.lfs_objects:
            raise HubError(400, f"LFS pointer of {path} points to a file that was not uploaded")
        files[path] = Blob(repo.lfs_objects[value["oid"]], lfs=True)
    elif key in {"deletedFile", "deletedFolder"}:
        folder = path.rstrip("/") + "/"
        gone = [name for name in files if name == path or (key == "deletedFolder" and name.startswith(folder))]
        if not gone:
            raise HubError(404, "A file with this name doesn't exist", "EntryNotFound")
        for name in gone:
            del files[name]
    elif key != "header":
        raise HubError(400, f"unknown operation {key}")


class WriteRoutes:
    """Handlers of the changing requests.

    `endpoint` and `cdn` are the server's two addresses: the Hub itself and the storage of large files.
    """

    def __init__(self, store: Store, endpoint: str, cdn: str) -> None:
        """Answer from `store` and point the client to these addresses."""
        self.store = store
        self.endpoint = endpoint
        self.cdn = cdn

    def create(self, request: Request, user: User | None) -> Response:
        """A new repository, refused with 409 when it exists."""
        if user is None:
            raise HubError(401, "Invalid username or password.")
        wanted = request.json()
        if wanted.get("type", "model") != "model":
            raise HubError(400, "this test server holds model repositories only")
        namespace = wanted.get("organization") or user.name
        repo_id = f"{namespace}/{wanted['name']}"
        if not user.may_write(namespace):
            raise HubError(403, f'You don\'t have the rights to create a model under the namespace "{namespace}"')
        if repo_id in self.store.repos:
            raise HubError(409, "You already created this model repo", url=f"{self.endpoint}/{repo_id}")
        self.store.create(repo_id, wanted.get("visibility") == "private" or bool(wanted.get("private")))
        return as_json({"url": f"{self.endpoint}/{repo_id}", "name": repo_id})

    def delete(self, request: Request, user: User | None) -> Response:
        """Remove a repository."""
        wanted = request.json()
        namespace = wanted.get("organization") or (user.name if user else "")
        del self.store.repos[self.store.open(f"{namespace}/{wanted['name']}", user, write=True).repo_id]
        return as_json({})

    def add_ref(self, request: Request, user: User | None, repo: str, kind: str, rev: str) -> Response:
        """A new branch or tag, refused with 409 when it exists."""
        opened, wanted = self.store.open(repo, user, write=True), request.json()
        names, name, target = (
            (opened.tags, wanted["tag"], rev)
            if kind == "tag"
            else (opened.branches, rev, wanted.get("startingPoint", "main"))
        )
        if name in names:
            raise HubError(409, f"Reference {name} already exists")
        names[name] = opened.resolve(target).sha
        return as_json({})

    def lfs_batch(self, request: Request, user: User | None, repo: str) -> Response:
        """Where to upload each large file; no address for one that the repository already has."""
        wanted = request.json()
        opened = self.store.open(repo, user, write="ref" in wanted)  # a pull request needs no right to write
        objects: list[dict[str, object]] = []
        for item in wanted["objects"]:
            entry: dict[str, object] = {"oid": item["oid"], "size": item["size"]}
            if item["oid"] not in opened.lfs_objects:
                upload = {"href": f"{self.cdn}/_lfs/{repo}/{item['oid']}"}
                entry["actions"] = {
                    "upload": upload,
                    "verify": {"href": f"{self.endpoint}/{repo}.git/info/lfs/verify"},
                }
            objects.append(entry)
        return as_json({"transfer": "basic", "objects": objects})

    def lfs_put(self, request: Request, user: User | None, repo: str, oid: str) -> Response:
        """Take in a large file, refused when it does not have the announced sha256."""
        if repo not in self.store.repos or Blob(request.body, lfs=True).sha256 != oid:
            raise HubError(400, "The content does not have the announced sha256")
        self.store.repos[repo].lfs_objects[oid] = request.body
        return Response(200, b"", {"ETag": f'"{oid}"'})

    def lfs_verify(self, request: Request, user: User | None, repo: str) -> Response:
        """Whether an uploaded large file has arrived whole."""
        wanted = request.json()
        if len(self.store.open(repo, user).lfs_objects.get(wanted["oid"], b"")) != wanted["size"]:
            raise HubError(404, "LFS object not found")
        return as_json({})

    def preupload(self, request: Request, user: User | None, repo: str, rev: str) -> Response:
        """How to upload each file ("lfs" or "regular"), and the identity of what is there under its name."""
        opened = self.store.open(repo, user, write=not request.flag("create_pr"))
        now = opened.resolve(rev).files
        files: list[dict[str, object]] = []
        for item in request.json()["files"]:
            path = item["path"]
            mode = "lfs" if self.store.is_lfs(path, item["size"]) else "regular"
            entry: dict[str, object] = {"path": path, "uploadMode": mode, "shouldIgnore": False}
            if path in now:
                entry["oid"] = now[path].oid
            files.append(entry)
        return as_json({"files": files})

    def commit(self, request: Request, user: User | None, repo: str, rev: str) -> Response:
        """All operations of a commit or none, on a branch or (`create_pr`) on a new pull request."""
        create_pr = request.flag("create_pr")
        opened = self.store.open(repo, user, write=not create_pr)
        if user is None:
            raise HubError(401, "Invalid username or password.", "RepoNotFound")
        tip = opened.resolve(rev)
        lines = [json.loads(line) for line in request.body.splitlines() if line.strip()]
        header = lines[0]["value"]
        if header.get("parentCommit") not in {None, tip.sha}:
            raise HubError(412, "A commit has happened since. Please refresh and try again.")
        if rev not in opened.branches:
            raise HubError(400, f"{rev} is not a branch")
        files = dict(tip.files)
        for line in lines:
            _apply(opened, files, line, self.store.lfs_threshold)
        title, description = header["summary"], header.get("description", "")
        branch, answer = rev, {}
        if create_pr:
            pull = opened.open_pull_request(title, description, user.name, base=rev)
            branch = f"refs/pr/{pull.num}"
            answer = {"pullRequestUrl": f"{self.endpoint}/{repo}/discussions/{pull.num}"}
        made = opened.commit(branch, files, title, description=description, author=user.name)
        url = f"{self.endpoint}/{repo}/commit/{made.sha}"
        return as_json({"success": True, "commitOid": made.sha, "commitUrl": url, "hookOutput": "", **answer})

    def open_discussion(self, request: Request, user: User | None, repo: str) -> Response:
        """A new pull request without commits (an upload with `hf_xet` opens it this way)."""
        opened, wanted = self.store.open(repo, user), request.json()
        if user is None:
            raise HubError(401, "Invalid username or password.", "RepoNotFound")
        if not wanted.get("pullRequest"):
            raise HubError(400, "this test server opens pull requests only")
        pull = opened.open_pull_request(wanted["title"], wanted.get("description", ""), user.name)
        return as_json({"num": pull.num, "pullRequest": True})

    def discussion(self, request: Request, user: User | None, repo: str, num: str) -> Response:
        """What the client reads back about a pull request."""
        pull = self.store.open(repo, user).pulls.get(int(num))
        if pull is None:
            raise HubError(404, "Discussion not found")
        about = {"title": pull.title, "num": pull.num, "author": {"name": pull.author}, "createdAt": DATE}
        about |= {"status": "draft", "isPullRequest": True, "repo": {"name": repo, "type": "model"}}
        about |= {"events": [], "filesWithConflicts": [], "changes": {"base": "refs/heads/main"}}
        return as_json(about)

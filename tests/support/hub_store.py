"""What the loopback Hub keeps: repositories, commits, refs, large files and the users who may touch them.

Nothing here knows about HTTP. A refused operation raises `HubError`, which carries what the Hub's
answer to it looks like (status, `X-Error-Code`, message).
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

GITATTRIBUTES = b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n*.bin filter=lfs diff=lfs merge=lfs -text\n"


class HubError(Exception):
    """An operation that the Hub refuses, with the answer it gives."""

    def __init__(self, status: int, message: str, code: str | None = None, **body: object) -> None:
        """Answer `status` with a message, the `X-Error-Code` and more fields of the JSON body."""
        super().__init__(message)
        self.status = status
        self.message = message
        self.code = code
        self.body = body
        self.headers: dict[str, str] = {}


@dataclass(frozen=True)
class User:
    """The owner of a token. `namespaces=None` owns every namespace; `write=False` is a read-only token."""

    name: str
    namespaces: frozenset[str] | None = None
    write: bool = True

    def belongs_to(self, namespace: str) -> bool:
        """Whether the user sees the private repositories of `namespace`."""
        return self.namespaces is None or namespace == self.name or namespace in self.namespaces

    def may_write(self, namespace: str) -> bool:
        """Whether the token may create and change repositories of `namespace`."""
        return self.write and self.belongs_to(namespace)


@dataclass(frozen=True)
class Blob:
    """The content of one file, stored in git (`lfs=False`) or as a large file."""

    data: bytes
    lfs: bool

    @cached_property
    def sha256(self) -> str:
        """The identity of a large file."""
        return hashlib.sha256(self.data).hexdigest()

    @property
    def pointer(self) -> bytes:
        """The text that git holds in place of a large file."""
        text = f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {len(self.data)}\n"
        return text.encode()

    @cached_property
    def git_oid(self) -> str:
        """The git object id: of the content, or of the pointer for a large file."""
        content = self.pointer if self.lfs else self.data
        return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()

    @property
    def oid(self) -> str:
        """The ETag, which the client compares with its file: sha256 of a large file, else the git id."""
        return self.sha256 if self.lfs else self.git_oid


@dataclass(frozen=True)
class Commit:
    """One commit; `files` is the whole tree after it."""

    sha: str
    title: str
    description: str
    parent: str | None
    files: Mapping[str, Blob] = field(repr=False)
    author: str = "tester"


@dataclass(frozen=True)
class PullRequest:
    """A pull request; its commits are on the ref `refs/pr/<num>`."""

    num: int
    title: str
    description: str
    author: str


@dataclass
class Repo:
    """A model repository with its history."""

    repo_id: str
    private: bool = False
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    pulls: dict[int, PullRequest] = field(default_factory=dict)
    commits: dict[str, Commit] = field(default_factory=dict)
    lfs_objects: dict[str, bytes] = field(default_factory=dict, repr=False)

    @property
    def namespace(self) -> str:
        """The part of the id before the slash."""
        return self.repo_id.split("/")[0]

    def resolve(self, revision: str) -> Commit:
        """The commit that a branch, tag, pull request ref, full or abbreviated commit id names."""
        sha = self.branches.get(revision) or self.tags.get(revision)
        if sha is None and revision.startswith("refs/heads/"):
            sha = self.branches.get(revision.removeprefix("refs/heads/"))
        if sha is None and len(revision) >= 7:
            found = [known for known in self.commits if known.startswith(revision)]
            sha = found[0] if len(found) == 1 else None
        if sha is None:
            raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return self.commits[sha]

    def blob(self, revision: str, path: str) -> tuple[Commit, Blob]:
        """A file at a revision, with the commit it was read from."""
        commit = self.resolve(revision)
        if path not in commit.files:
            error = HubError(404, "Entry not found", "EntryNotFound")
            error.headers["X-Repo-Commit"] = commit.sha
            raise error
        return commit, commit.files[path]

    def commit(
        self,
        branch: str,
        files: Mapping[str, Blob],
        title: str,
        *,
        description: str = "",
        author: str = "tester",
        base: str | None = None,
    ) -> Commit:
        """Put a commit with the tree `files` on `branch`, on top of `base` (default: the branch's tip)."""
        parent = base or self.branches.get(branch)
        digest = hashlib.sha1(f"{self.repo_id}\0{branch}\0{parent}\0{title}\0{len(self.commits)}".encode())
        for path in sorted(files):
            digest.update(f"{path}\0{files[path].git_oid}\0".encode())
        commit = Commit(digest.hexdigest(), title, description, parent, dict(files), author)
        self.commits[commit.sha] = commit
        self.branches[branch] = commit.sha
        self.lfs_objects.update({blob.sha256: blob.data for blob in files.values() if blob.lfs})
        return commit

    def history(self, revision: str) -> list[Commit]:
        """The commits that lead to a revision, the oldest first."""
        chain: list[Commit] = []
        sha: str | None = self.resolve(revision).sha
        while sha is not None:
            chain.append(self.commits[sha])
            sha = self.commits[sha].parent
        return chain[::-1]

    def open_pull_request(self, title: str, description: str, author: str, base: str = "main") -> PullRequest:
        """Open a pull request whose ref starts at `base`."""
        pull = PullRequest(len(self.pulls) + 1, title, description, author)
        self.branches[f"refs/pr/{pull.num}"] = self.resolve(base).sha
        self.pulls[pull.num] = pull
        return pull


@dataclass
class Store:
    """All repositories and tokens of one server, and the rule for what is a large file."""

    repos: dict[str, Repo] = field(default_factory=dict)
    tokens: dict[str, User] = field(default_factory=dict, repr=False)
    lfs_suffixes: tuple[str, ...] = (".safetensors", ".bin", ".pt", ".gguf")
    lfs_threshold: int = 10 * 1024 * 1024

    def is_lfs(self, path: str, size: int) -> bool:
        """Whether a file of this name and size is stored as a large file (an empty one never is)."""
        return size > 0 and (path.endswith(self.lfs_suffixes) or size > self.lfs_threshold)

    def blobs(self, files: Mapping[str, bytes]) -> dict[str, Blob]:
        """A tree of plain contents as blobs."""
        return {path: Blob(data, self.is_lfs(path, len(data))) for path, data in files.items()}

    def user(self, authorization: str | None) -> User | None:
        """The user behind an Authorization header; an unknown token is refused, as the Hub does."""
        if authorization is None:
            return None
        user = self.tokens.get(authorization.removeprefix("Bearer "))
        if user is None:
            raise HubError(401, "Invalid credentials in Authorization header")
        return user

    def create(self, repo_id: str, private: bool) -> Repo:
        """A new repository with the Hub's initial commit, which holds only `.gitattributes`."""
        repo = self.repos[repo_id] = Repo(repo_id, private)
        repo.commit("main", {".gitattributes": Blob(GITATTRIBUTES, lfs=False)}, "initial commit")
        return repo

    def open(self, repo_id: str, user: User | None, write: bool = False) -> Repo:
        """A repository that `user` may read (or write), refused otherwise as the Hub refuses it.

        Without a token the Hub answers 401 for a missing and for a private repository alike; with one
        it answers 404. The real 401 has no `X-Error-Code`: the client recognises it by its https://
        address, which a loopback address is not, so the code is sent here to get the same exception.
        """
        repo = self.repos.get(repo_id)
        if repo is None or (repo.private and not (user and user.belongs_to(repo.namespace))):
            if user is None:
                raise HubError(401, "Invalid username or password.", "RepoNotFound")
            raise HubError(404, "Repository not found", "RepoNotFound")
        if write and user is None:
            raise HubError(401, "Invalid username or password.", "RepoNotFound")
        if write and user is not None and not user.may_write(repo.namespace):
            raise HubError(403, f"You don't have the rights to write to {repo_id}")
        return repo

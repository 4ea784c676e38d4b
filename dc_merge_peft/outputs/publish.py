"""Files to the root of a Hub repository: one commit, or nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from dc_merge_peft.errors import OutputError
from dc_merge_peft.hub_errors import (
    causes,
    connection_broke,
    harmless,
    http_status,
    in_words,
    own_file,
    patiently,
    try_again,
)
from dc_merge_peft.hub_errors import secrets as tokens_in_use
from dc_merge_peft.work.standing import note_upload

if TYPE_CHECKING:
    from huggingface_hub import CommitInfo, HfApi
    from huggingface_hub.hf_api import CommitOperation


def publish(
    files: Mapping[str, Path | bytes],
    repo_id: str,
    *,
    commit_message: str,
    private: bool | None = None,
    token: str | bool | None = None,
    create_pr: bool = False,
    stale: Callable[[str], bool] = lambda _: False,
    rival: str | None = None,
) -> str:
    """Upload files in one commit, to a repository that is created if need be.

    Not by the client's ``upload_folder``, which splits what is large into several commits. Large files are uploaded
    first and belong to no revision until the commit names them, so that whatever fails, the repository's files are as
    before. A repository that was created for it stays, empty: deleting it could delete what someone else has put there.

    Args:
        files: What to upload, by path in the repository.
        repo_id: ``owner/name``, or a name under the user's own account.
        commit_message: Title of the commit or pull request.
        private: Of a new repository; the account's default if ``None``.
        token: By default that of the environment (``HF_TOKEN``) or of the login.
        create_pr: Propose a pull request instead of committing to the main branch.
        stale: Says of a file of the repository that it is part of what was pushed before, and would be taken for a part of
            this. The commit deletes it unless it brings another one of that name.
        rival: A file for which what is pushed would not be loaded.

    Returns:
        The URL of the commit or pull request.

    Raises:
        OutputError: a repository that was to be private exists and is public, or holds ``rival``, the Hub refuses or fails,
            or can't be reached.
    """
    import huggingface_hub

    check_repository(repo_id)
    known = tokens_in_use(token)
    api = huggingface_hub.HfApi(token=token)
    created = False
    note_upload(repo_id)
    try:
        repo, created = patiently(lambda: _open_repository(api, repo_id, private))
        if private and not created and not patiently(lambda: api.model_info(repo)).private:
            raise OutputError(
                f"can't push to '{repo}' privately: it exists and is public; expected a private repository or a new name: "
                "make it private on its page, or leave private out"
            )

        def commit_once() -> CommitInfo:
            # New operations for each try: they remember what the repository held, and a commit whose answer was lost has
            # deleted already. What is uploaded the Hub remembers.
            held = set() if created else {file.rfilename for file in api.model_info(repo).siblings or ()}
            if rival in held:
                raise OutputError(
                    f"can't push to '{repo}': it holds an {rival}, for which transformers would load that adapter on its base model "
                    "in place of this model; expected a repository without an adapter: delete it there, or give a new name"
                )
            gone = [path for path in sorted(held - files.keys()) if stale(path)]
            return api.create_commit(repo, _operations(files, gone), commit_message=commit_message, create_pr=create_pr)

        commit = patiently(
            commit_once,
            # To the main branch the same commit twice is one. A pull request, whose answer was lost, would be two.
            repeatable=lambda error: not create_pr or http_status(error) in (412, 429, 503),
        )
    except OutputError:
        raise
    except Exception as error:  # the client lets its HTTP library's errors through, whose names change with versions
        raise OutputError(_reason(error, repo_id, known, created=created, create_pr=create_pr)) from harmless(
            error, known
        )
    url = commit.pr_url or commit.commit_url
    note_upload(repo_id, url)
    return url


def _operations(files: Mapping[str, Path | bytes], gone: Iterable[str]) -> list[CommitOperation]:
    """The parts of a commit."""
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    added = [
        CommitOperationAdd(path, content if isinstance(content, bytes) else str(content))
        for path, content in sorted(files.items())
    ]
    return [*added, *map(CommitOperationDelete, gone)]


def check_repository(repo_id: str) -> None:
    """Refuse what can't be pushed to whatever the Hub says; called before any work is done.

    Raises:
        OutputError: the id is no repository's, or the client is told to stay offline.
    """
    from huggingface_hub import constants, errors
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo_id)
        if constants.HF_HUB_OFFLINE:
            raise errors.OfflineModeIsEnabled("offline mode is enabled")
    except (errors.HFValidationError, errors.OfflineModeIsEnabled) as error:
        raise OutputError(_reason(error, repo_id, (), created=False, create_pr=False)) from error


def _open_repository(api: HfApi, repo_id: str, private: bool | None) -> tuple[str, bool]:
    """The repository's whole id, and whether it was created just now."""
    try:
        return api.create_repo(repo_id, private=private).repo_id, True
    except Exception as error:
        # It exists; or the token may not create any, but perhaps write to this one.
        if http_status(error) not in (401, 402, 403, 409):
            raise
        return api.create_repo(repo_id, private=private, exist_ok=True).repo_id, False


def _reason(error: Exception, repo_id: str, known: tuple[str, ...], *, created: bool, create_pr: bool) -> str:
    """Why nothing was published, and what to do."""
    left = "; the new repository was created and stays empty: push again to fill it, or delete it" if created else ""
    if create_pr and connection_broke(error):
        left += "; look whether the pull request is there before you try again"
    why = own_file(error) or f"{in_words(error, known)}; {_remedy(error)}"
    return f"can't push to '{repo_id}': {why}{left}"


def _remedy(error: Exception) -> str:
    from huggingface_hub import errors

    status = http_status(error)
    if any(isinstance(e, errors.HFValidationError) for e in causes(error)):
        return "expected a repository id such as me/merged: check the name"
    if any(isinstance(e, errors.OfflineModeIsEnabled) for e in causes(error)):
        return "expected a connection: unset HF_HUB_OFFLINE and try again"
    if status == 401:
        return "expected write access to it by a valid token: log in with `hf auth login`, or pass token="
    if status in (402, 403, 404):
        return (
            "expected write access to it: check the name and `hf auth login`, or propose a pull request (create_pr=True, "
            "--create-pr)"
        )
    if status == 429:
        return f"the Hub asks to slow down: {try_again(error)}"
    if status is None or status >= 500:
        return "expected the Hub to answer: nothing was changed, try again later"
    return "expected the Hub to take the files: nothing was changed"

"""From what a user calls an adapter to a directory: a path, or a Hub id with a revision and a subfolder."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from dc_merge_peft.errors import SourceError, first_line, preview
from dc_merge_peft.hub_errors import (
    causes,
    connection_broke,
    harmless,
    http_status,
    in_words,
    own_file,
    patiently,
    secrets,
    try_again,
    words_of_the_hub,
)
from dc_merge_peft.paths import is_dir, is_file
from dc_merge_peft.sources.contents import CONFIG_FILE, WEIGHT_FILES, instead_of_directory

MODEL_CONFIG_FILE = "config.json"  # of a full model
CARD_FILE = "README.md"
RECORD_FILE = "dc_merge.yaml"  # of an adapter that was merged: what from, and how
# Of the original LLaVA repository: see dc_merge_peft.sources.llava.
TRAINABLES_FILE = "non_lora_trainables.bin"

# "org/name", "org/name@revision", "org/name/sub/folder@revision". No part begins with a dot and none holds two, since
# subfolders and revisions become parts of paths in the local cache.
_PATH = r"\w[\w.+-]*(?:/\w[\w.+-]*)*"
_HUB_ID = re.compile(
    rf"(?!.*\.\.)(?P<repo>[A-Za-z0-9][\w.-]*/\w[\w.-]*)(?:/(?P<subfolder>{_PATH}))?(?:@(?P<revision>{_PATH}))?"
)


@dataclass(frozen=True)
class HubId:
    """A repository of the Hub, and what of it."""

    repo: str
    subfolder: str | None = None
    revision: str | None = None

    @classmethod
    def parse(cls, text: str) -> HubId | None:
        """``org/name[/sub/folder][@revision]``, or None where the text is spelled otherwise."""
        match = _HUB_ID.fullmatch(text)
        return cls(match["repo"], match["subfolder"], match["revision"]) if match else None

    def __str__(self) -> str:
        """For errors."""
        return f"'{self.repo}'" + (f" at revision '{self.revision}'" if self.revision else "")


@dataclass(frozen=True)
class AdapterFiles:
    """A directory that should hold an adapter, and how to name it to people."""

    directory: Path
    location: str  # as given, without the revision
    revision: str | None = None  # commit hash of a Hub snapshot


def locate(source: str | Path, token: str | bool | None = None) -> AdapterFiles:
    """Find an adapter: an existing directory wins, then a Hub id is downloaded (or found in the local cache).

    Args:
        source: A directory or a Hub id.
        token: For the Hub; by default that of the environment (``HF_TOKEN``) or of the login.

    Raises:
        SourceError: neither, or the Hub can't deliver it.
    """
    try:
        path = Path(source).expanduser()
        directory, file = bool(str(source)) and is_dir(path), is_file(path)
    except (OSError, RuntimeError, ValueError) as error:
        raise SourceError(
            f"there is no adapter {str(source)[:200]!r} ({first_line(error)}): expected an existing directory or a Hub id"
        ) from error
    if directory:
        return AdapterFiles(path, str(source))
    if file:
        raise SourceError(f"'{source}' is a file: expected an adapter directory; {instead_of_directory(path)}")
    hub_id = HubId.parse(source) if isinstance(source, str) else None
    if hub_id is None:
        raise SourceError(
            f"there is no adapter directory '{str(source)[:200]}': expected an existing directory or a Hub id such as "
            "'org/name', 'org/name@revision' or 'org/name/subfolder'"
        )
    return _download(hub_id, token)


def _download(wanted: HubId, token: str | bool | None) -> AdapterFiles:
    """A snapshot of one adapter's config, weights and card, nothing else of the repository."""
    prefix = f"{wanted.subfolder}/" if wanted.subfolder else ""
    patterns = [prefix + name for name in (CONFIG_FILE, *WEIGHT_FILES, CARD_FILE, RECORD_FILE, TRAINABLES_FILE)]
    snapshot = fetch_files(wanted, patterns, token, fallback=lambda: _from_cache(wanted, prefix))
    if not is_file(snapshot / prefix / CONFIG_FILE):
        raise _no_adapter(wanted, snapshot.name, token)
    return AdapterFiles(snapshot / prefix, f"{wanted.repo}/{prefix}".rstrip("/"), snapshot.name)


def _no_adapter(wanted: HubId, commit: str, token: str | bool | None) -> SourceError:
    """Why a snapshot has no adapter: it lies elsewhere in the repository, or the cache holds other files only."""
    import huggingface_hub

    place = "/".join(filter(None, (wanted.repo, wanted.subfolder)))
    try:
        files = patiently(lambda: huggingface_hub.HfApi(token=token).list_repo_files(wanted.repo, revision=commit))
    except Exception as error:
        if failed_at_the_hub(error):
            return SourceError(
                f"of '{place}' the local cache holds other files, but no {CONFIG_FILE}, while the Hub can't be reached: connect (and "
                "unset HF_HUB_OFFLINE) and try again later"
            )
        files = []
    holders = sorted(file.removesuffix(CONFIG_FILE) for file in files if f"/{file}".endswith(f"/{CONFIG_FILE}"))
    at = f"@{wanted.revision}" if wanted.revision else ""
    found = [f"{wanted.repo}/{folder}".rstrip("/") + at for folder in holders]
    hint = f"the repository has {preview(found)}" if found else "is it a full model?"
    return SourceError(f"'{place}' has no {CONFIG_FILE}: expected a PEFT adapter directory; {hint}")


def fetch_files(
    wanted: HubId,
    patterns: Sequence[str],
    token: str | bool | None = None,
    *,
    fallback: Callable[[], Path | None] | None = None,
) -> Path:
    """A snapshot of those files of a repository that match, or ``fallback`` where the Hub can't be reached: by default what the
    cache has of a full model, of which other programs leave out small files.

    Raises:
        SourceError: the Hub can't deliver it.
    """
    import huggingface_hub
    from huggingface_hub import errors

    def fetch() -> str:
        return huggingface_hub.snapshot_download(
            wanted.repo, revision=wanted.revision, allow_patterns=list(patterns), token=token
        )

    try:
        return Path(patiently(fetch))
    except Exception as error:
        fallback = fallback or (lambda: cached_snapshot(wanted, MODEL_CONFIG_FILE))
        cached = fallback() if isinstance(error, errors.LocalEntryNotFoundError) else None
        if cached is not None:
            return cached
        known = secrets(token)
        raise SourceError(failure_in_words(error, wanted, known)) from harmless(error, known)


def _from_cache(wanted: HubId, prefix: str) -> Path | None:
    """The cached snapshot that holds config and weights, though not all that would have been asked for: other programs,
    PEFT among them, download these two and no card."""
    snapshot = cached_snapshot(wanted, prefix + CONFIG_FILE)
    if snapshot is None or not any(is_file(snapshot / prefix / name) for name in WEIGHT_FILES):
        return None
    return snapshot


def cached_snapshot(wanted: HubId, file: str) -> Path | None:
    """The snapshot in the local cache, if that file of it is there."""
    import huggingface_hub

    cached = huggingface_hub.try_to_load_from_cache(wanted.repo, file, revision=wanted.revision or "main")
    return Path(cached).parents[file.count("/")] if isinstance(cached, str) else None


def failed_at_the_hub(error: BaseException) -> bool:
    """Whether the Hub or the way to it is what failed."""
    from huggingface_hub import errors

    missing = (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled)
    return (
        http_status(error) is not None or connection_broke(error) or any(isinstance(e, missing) for e in causes(error))
    )


def failure_in_words(error: BaseException, wanted: HubId, known: tuple[str, ...]) -> str:
    """Why the Hub gave nothing, in a sentence. What the client says about its cache may hide the Hub's own answer, which
    is then its cause."""
    from huggingface_hub import errors

    chain, status = causes(error), http_status(error)
    place = "/".join(filter(None, (wanted.repo, wanted.subfolder)))  # as a directory it would be all of this
    if any(isinstance(e, errors.GatedRepoError) for e in chain):
        return f"the Hub repository {wanted} is gated: ask for access on its page, then log in with `hf auth login`"
    if any(isinstance(e, errors.RepositoryNotFoundError) for e in chain):
        return (
            f"found no directory '{place}' and no Hub repository {wanted}: check the name, or log in with `hf auth login` if it is "
            "private"
        )
    if any(isinstance(e, errors.RevisionNotFoundError) for e in chain):
        return f"found no {wanted} on the Hub: expected a branch, tag or commit of it"
    if status is not None:
        said = words_of_the_hub(error, known)
        words = f"(status {status})" + (f", saying '{said}'" if said else "")
        if status in (401, 403):
            return f"the Hub refuses {wanted} {words}: log in with `hf auth login`, with a token that may read it"
        return f"the Hub could not deliver {wanted} {words}: {try_again(error)}"
    if (reason := own_file(error)) is not None:
        return f"the Hub repository {wanted} can't be read: {reason}"
    if any(isinstance(e, (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled)) for e in chain):
        return (
            f"found no directory '{place}', and {wanted} is not in the local cache while the Hub can't be reached: check the "
            "path, or connect (and unset HF_HUB_OFFLINE) and try again later"
        )
    remedy = "use another repository" if isinstance(error, ValueError) else "try again later"
    return f"the Hub could not deliver {wanted}: {in_words(error, known)}; {remedy}"

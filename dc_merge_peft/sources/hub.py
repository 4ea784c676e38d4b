"""From what a user calls an adapter to a directory: a path, or a Hub id with a revision and a subfolder."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from dc_merge_peft.errors import SourceError, first_line

CONFIG_FILE = "adapter_config.json"
WEIGHT_FILES = ("adapter_model.safetensors", "adapter_model.bin")
# Of the original LLaVA repository: see dc_merge_peft.sources.llava.
TRAINABLES_FILE = "non_lora_trainables.bin"

# "org/name", "org/name@revision", "org/name/sub/folder@revision"
_HUB_ID = re.compile(
    r"(?P<repo>[A-Za-z0-9][\w.-]*/\w[\w.-]*)(?:/(?P<subfolder>\w[\w.-]*(?:/\w[\w.-]*)*))?(?:@(?P<revision>[\w./-]+))?"
)


@dataclass(frozen=True)
class AdapterFiles:
    """A directory that should hold an adapter, and how to name it to people."""

    directory: Path
    location: str  # as given, without the revision
    revision: str | None = None  # commit hash of a Hub snapshot


def locate(source: str | Path) -> AdapterFiles:
    """Find an adapter: an existing directory wins, then a Hub id is downloaded (or found in the local cache).

    Raises:
        SourceError: neither, or the Hub can't deliver it.
    """
    try:
        path = Path(source).expanduser()
        is_directory, is_file = bool(str(source)) and path.is_dir(), path.is_file()
    except (OSError, RuntimeError, ValueError) as error:
        raise SourceError(
            f"there is no adapter {str(source)[:200]!r} ({first_line(error)}): expected an existing directory or a Hub id"
        ) from error
    if is_directory:
        return AdapterFiles(path, str(source))
    if is_file:
        raise SourceError(f"'{source}' is a file: expected an adapter directory; give the folder '{path.parent}'")
    match = _HUB_ID.fullmatch(str(source)) if isinstance(source, str) else None
    if match is None:
        raise SourceError(
            f"there is no adapter directory '{str(source)[:200]}': expected an existing directory or a Hub id such as "
            "'org/name', 'org/name@revision' or 'org/name/subfolder'"
        )
    return _download(match["repo"], match["subfolder"], match["revision"])


def _download(repo: str, subfolder: str | None, revision: str | None) -> AdapterFiles:
    """A snapshot of one adapter's config and weights, nothing else of the repository."""
    import huggingface_hub

    prefix = f"{subfolder}/" if subfolder else ""
    wanted = f"'{repo}'" + (f" at revision '{revision}'" if revision else "")
    try:
        patterns = [prefix + name for name in (CONFIG_FILE, *WEIGHT_FILES, TRAINABLES_FILE)]
        snapshot = Path(huggingface_hub.snapshot_download(repo, revision=revision, allow_patterns=patterns))
    except Exception as error:  # the client lets its HTTP library's errors through, whose names change with versions
        raise SourceError(_reason(error, repo, wanted)) from error
    location = repo + (f"/{subfolder}" if subfolder else "")
    return AdapterFiles(snapshot / prefix if prefix else snapshot, location, snapshot.name)


def _reason(error: BaseException, repo: str, wanted: str) -> str:
    """Why the Hub gave nothing, in a sentence. What the client says about its cache may hide the Hub's own answer, which
    is then its cause."""
    from huggingface_hub import errors

    chain = [error]
    while chain[-1].__cause__ is not None:
        chain.append(chain[-1].__cause__)
    status = next((s for s in (getattr(getattr(e, "response", None), "status_code", None) for e in chain) if s), None)
    if any(isinstance(e, errors.GatedRepoError) for e in chain):
        return f"the Hub repository {wanted} is gated: ask for access on its page, then log in with `hf auth login`"
    if any(isinstance(e, errors.RepositoryNotFoundError) for e in chain):
        return (
            f"found no directory and no Hub repository {wanted}: check the name, or log in with `hf auth login` if it is "
            "private"
        )
    if any(isinstance(e, errors.RevisionNotFoundError) for e in chain):
        return f"found no {wanted} on the Hub: expected a branch, tag or commit of it"
    if status in (401, 403):
        return f"the Hub refuses {wanted} (status {status}): log in with `hf auth login`, with a token that may read it"
    if status is not None:
        return f"the Hub could not deliver {wanted} (status {status}): try again later"
    if isinstance(error, (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled)):
        return (
            f"found no directory '{repo}', and {wanted} is not in the local cache while the Hub can't be reached: check the "
            "path, or connect (and unset HF_HUB_OFFLINE) and try again later"
        )
    return f"the Hub could not deliver {wanted}: {first_line(error)}; try again later"

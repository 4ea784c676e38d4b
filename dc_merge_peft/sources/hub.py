"""From what a user calls an adapter to a directory: a path, or a Hub id with a revision and a subfolder."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from dc_merge_peft.errors import SourceError, first_line

CONFIG_FILE = "adapter_config.json"
WEIGHT_FILES = ("adapter_model.safetensors", "adapter_model.bin")

# "org/name", "org/name@revision", "org/name/sub/folder@revision"
_HUB_ID = re.compile(
    r"(?P<repo>[A-Za-z0-9][\w.-]*/[\w.-]+)(?:/(?P<subfolder>[\w.-]+(?:/[\w.-]+)*))?(?:@(?P<revision>[\w./-]+))?"
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
    path = Path(source).expanduser()
    if path.is_dir():
        return AdapterFiles(path, str(source))
    if path.is_file():
        raise SourceError(f"'{source}' is a file: expected an adapter directory; give the folder '{path.parent}'")
    match = _HUB_ID.fullmatch(str(source)) if isinstance(source, str) else None
    if match is None:
        raise SourceError(
            f"there is no adapter directory '{source}': expected an existing directory or a Hub id such as "
            "'org/name', 'org/name@revision' or 'org/name/subfolder'"
        )
    return _download(match["repo"], match["subfolder"], match["revision"])


def _download(repo: str, subfolder: str | None, revision: str | None) -> AdapterFiles:
    """A snapshot of one adapter's config and weights, nothing else of the repository."""
    import huggingface_hub
    from huggingface_hub import errors

    prefix = f"{subfolder}/" if subfolder else ""
    wanted = f"'{repo}'" + (f" at revision '{revision}'" if revision else "")
    try:
        patterns = [prefix + name for name in (CONFIG_FILE, *WEIGHT_FILES)]
        snapshot = Path(huggingface_hub.snapshot_download(repo, revision=revision, allow_patterns=patterns))
    except errors.RepositoryNotFoundError as error:
        raise SourceError(
            f"found no directory and no Hub repository {wanted}: check the name, or log in with `hf auth login` if it "
            "is private"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise SourceError(f"found no {wanted} on the Hub: expected a branch, tag or commit of it") from error
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled) as error:
        raise SourceError(
            f"found no directory '{repo}', and {wanted} is not in the local cache while the Hub can't be reached: "
            "check the path, or connect and unset HF_HUB_OFFLINE"
        ) from error
    except Exception as error:  # the client lets its HTTP library's errors through, whose names change with versions
        raise SourceError(f"the Hub could not deliver {wanted}: {first_line(error)}; try again later") from error
    location = repo + (f"/{subfolder}" if subfolder else "")
    return AdapterFiles(snapshot / prefix if prefix else snapshot, location, snapshot.name)

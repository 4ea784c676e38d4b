"""Which state of a repository of the Hub is taken: ``ID@REVISION`` names one, ``ID`` alone is the newest; and the commits, for the record."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from reproduce.files import read_json

COMMIT = re.compile(r"[0-9a-f]{40}")
FILE = "revisions.json"  # beside a report: the commits, in the form that --revisions takes


def parts(place: str | Path) -> tuple[str, str | None]:
    """A Hub id and its revision; of files and folders there are none."""
    text = str(place)
    name, _, revision = text.partition("@")
    return (text, None) if Path(text).exists() else (name, revision or None)


def loadable(place: str | Path) -> tuple[str, str]:
    """A Hub id, file or folder, and the revision, as ``from_pretrained`` takes them."""
    name, revision = parts(place)
    return name, revision or "main"


def pinned(place: str, revisions: Mapping[str, str]) -> str:
    """A Hub id at the revision that is listed for it; as it is where there is none, or where it names its own."""
    name, revision = parts(place)
    return place if revision or Path(place).exists() or name not in revisions else f"{name}@{revisions[name]}"


def at_commit(place: str) -> str:
    """A model's Hub id at the commit that its revision stands for now, so that whatever is loaded later is of the same; files and
    folders as they are.

    Raises:
        SystemExit: there is no such repository or revision, or no way to it.
    """
    if Path(place).exists():
        return place
    name, revision = parts(place)
    return f"{name}@{snapshot(name, revision, ['*config.json']).name}"


def snapshot(name: str, revision: str | None, files: list[str]) -> Path:
    """The Hub's files in its cache, in the folder of their commit.

    Raises:
        SystemExit: they can't be fetched.
    """
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=files))
    except Exception as error:
        # The client raises many kinds of errors, of the network's as well.
        at = f" at the revision {revision!r}" if revision else ""
        raise SystemExit(
            f"{name}: found neither here nor on the Hub{at} ({type(error).__name__}: {str(error).partition(chr(10))[0]}): expected a checkpoint"
        ) from error


def commit_of(data: Any, what: str, revision: str | None) -> str | None:
    """The commit of a loaded part of a data set, which the package ``datasets`` has in the names of its files; none of local files.

    Raises:
        SystemExit: it is another one than was asked for: without a way to the Hub the package takes what it has.
    """
    found = {name for file in getattr(data, "cache_files", ()) for name in Path(file["filename"]).parts}
    commit = next((name for name in sorted(found) if COMMIT.fullmatch(name)), None)
    if revision and COMMIT.fullmatch(revision) and commit != revision:
        raise SystemExit(f"{what}: found the commit {commit}: expected {revision}; see whether the Hub can be reached")
    return commit


def listed(file: Path | None) -> dict[str, str]:
    """Revisions by Hub id from a JSON file.

    Raises:
        SystemExit: it is not one.
    """
    if file is None:
        return {}
    read = read_json(file, "revisions by Hub id")
    if not isinstance(read, dict) or not all(isinstance(value, str) and value for value in read.values()):
        raise SystemExit(
            f"{file}: found no revisions by Hub id: expected text by text, as {FILE} beside a report has it"
        )
    return read


def idle(revisions: Mapping[str, str], places: Iterable[str]) -> list[str]:
    """A remark on revisions that are of nothing in a run."""
    used = {parts(place)[0] for place in places}
    others = sorted(revisions.keys() - used)
    return [f"--revisions has ids that this run does not use: {', '.join(others)}"] if others else []


def record(used: Mapping[str, str | None], folder: Path) -> list[str]:
    """Write the commits beside a report; a note on each.

    Args:
        used: Commits by Hub id; none where it is not known.
        folder: Of the report.
    """
    folder.mkdir(parents=True, exist_ok=True)
    known = {name: commit for name, commit in sorted(used.items()) if commit}
    (folder / FILE).write_text(json.dumps(known, indent=1) + "\n", encoding="utf-8")
    return [f"{name} on the Hub: commit {commit or 'not known'}" for name, commit in sorted(used.items())]

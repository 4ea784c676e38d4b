"""What a merge is made of: its inputs by their content, its settings, and the programs that compute it.

A finished module is used again, or taken from another process, only where all of this is the same.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeGuard

import torch

from dc_merge_peft._version import __version__
from dc_merge_peft.errors import OptionError, SourceError, first_line
from dc_merge_peft.methods import Method
from dc_merge_peft.paths import is_dir, is_file
from dc_merge_peft.plan import MergePlan
from dc_merge_peft.sources.base import Source
from dc_merge_peft.sources.base_files import CONFIG, BaseFiles
from dc_merge_peft.sources.base_model import BaseModel
from dc_merge_peft.sources.base_names import FiledModel
from dc_merge_peft.sources.dora import DoraSource
from dc_merge_peft.sources.finetuned import FullModelSource
from dc_merge_peft.sources.fingerprint import fingerprint
from dc_merge_peft.sources.hub import CARD_FILE, CONFIG_FILE, TRAINABLES_FILE, WEIGHT_FILES
from dc_merge_peft.statistics.opening import statistics_files

_ADAPTER_FILES = (CONFIG_FILE, *WEIGHT_FILES, TRAINABLES_FILE, CARD_FILE)
_CHUNK = 1 << 22
# A model is not read as a whole only to know it again: this much at the start of every so many bytes, beside size and time.
_CHANGED = "changed"
_SAMPLE, _STEP = 1 << 16, 1 << 26


def manifest(
    plan: MergePlan,
    sources: Sequence[Source],
    method: Method,
    base: BaseModel | None,
    *,
    devices: Sequence[torch.device],
    allow_zero: bool,
    keep_dense: bool,
) -> dict[str, Any]:
    """Everything that the merged modules depend on, as plain values.

    Args:
        plan: The merge.
        sources: Its adapters, or full models.
        method: Its method.
        base: The base model, where one is at hand.
        devices: Where it is computed.
        allow_zero: As for the merge.
        keep_dense: Whether dense results stay dense.

    Raises:
        OptionError: an adapter, or statistics of its data, are not in files.
        SourceError: a file can't be read.
    """
    readings = [source.reading for source in sources if isinstance(source, DoraSource)]
    needs_base = bool(readings) or isinstance(base, FiledModel)
    values = {
        "dc_merge_peft": __version__,
        "torch": torch.__version__,
        "method": method.name,
        "options": dict(method.config.to_dict()),
        "weights": list(plan.weights),
        "svd_rank": plan.svd_rank,
        "dtype": str(plan.dtype).removeprefix("torch."),
        "rename": next((info.rename for info in plan.adapters), None),
        "dora_rank": readings[0].rank if readings else None,
        "extras": plan.extras.policy,
        "allow_zero": allow_zero,
        "keep_dense": keep_dense,
        "device": sorted({device.type for device in devices}) or ["cpu"],
        "modules": len(plan.modules),
        "adapters": [
            {"location": info.whole_location, "files": _files(source)}
            for info, source in zip(plan.adapters, sources, strict=True)
        ],
        "base": _base(base) if base is not None and needs_base else None,
        "statistics": [_whole(file)["sha256"] for file in statistics_files(method)],
    }
    return json.loads(json.dumps(values))  # what a file of it gives back


def differences(found: Mapping[str, Any], expected: Mapping[str, Any]) -> Iterator[str]:
    """What differs between a manifest that was found and the one of this merge, in words."""
    for key in dict.fromkeys([*expected, *found]):
        one, other = found.get(key), expected.get(key)
        if one == other:
            continue
        if key == "base" and _names_files(one) and _names_files(other):
            yield from _of_files(one, other)
        elif key == "adapters" and _all_name_files(one) and _all_name_files(other) and len(one) == len(other):
            for its, ours in zip(one, other, strict=True):
                yield from _of_files(its, ours)
        elif isinstance(one, dict) and isinstance(other, dict):
            yield from differences(one, other)
        else:
            yield f"{key} {_short(one)} there, {_short(other)} here"


def without_times(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """The manifest without the times of files, which differ where each machine has its own copy."""

    def plain(values: dict[str, Any]) -> dict[str, Any]:
        return {name: value for name, value in values.items() if name != _CHANGED}

    return json.loads(json.dumps(manifest), object_hook=plain)


def _names_files(value: Any) -> TypeGuard[dict[str, Any]]:
    """Whether it is what this version says of an adapter or a model; a file of another one may hold anything."""
    return isinstance(value, dict) and "location" in value and isinstance(value.get("files", {}), dict)


def _all_name_files(values: Any) -> TypeGuard[list[dict[str, Any]]]:
    return isinstance(values, list) and all(map(_names_files, values))


def _of_files(found: Mapping[str, Any], expected: Mapping[str, Any]) -> Iterator[str]:
    if found["location"] != expected["location"]:
        yield f"'{found['location']}' there, '{expected['location']}' here"
        return
    one, other = found.get("files", {}), expected.get("files", {})
    changed = [name for name in dict.fromkeys([*other, *one]) if one.get(name) != other.get(name)]
    yield from (f"'{name}' of '{expected['location']}' has changed" for name in changed)
    if not changed and found != expected:
        yield f"'{expected['location']}' has changed"


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:60]}..."


def _files(source: Source) -> dict[str, Any]:
    """What an adapter, or a full model, is read from."""
    if isinstance(source, FullModelSource):
        return _model_files(source.files)
    if source.directory is None:
        raise OptionError(
            f"adapter '{source.info.name}' is in memory: expected adapters in files, so that finished modules can be used again; save "
            "it, or merge without a work folder"
        )
    files = [source.directory / name for name in _ADAPTER_FILES]
    files = [file for file in files if is_file(file)]
    with ThreadPoolExecutor() as pool:
        found = {file.name: content for file, content in zip(files, pool.map(_whole, files), strict=True)}
    # An adapter that is open is read to its end, whatever stands in its place now.
    if fingerprint(source.directory) != source.info.fingerprint:
        raise SourceError(
            f"adapter '{source.info.name}' was changed after it had been opened: expected the same weights until finished modules "
            "are noted as theirs; merge again"
        )
    return found


def _model_files(model: BaseFiles) -> dict[str, Any]:
    used = {tensor.file for tensor in model.tensors.values()}
    return {file.name: _sampled(file) for file in sorted({*used, model.folder / CONFIG})}


def _base(base: BaseModel) -> dict[str, Any]:
    """The base model's place, and its files or its commit."""
    if isinstance(base, FiledModel):
        return {"location": base.location, "files": _model_files(base.files)}
    if base.location is not None and is_dir(Path(base.location).expanduser()):
        folder = Path(base.location).expanduser()
        files = sorted(file for ending in ("json", "safetensors", "bin") for file in folder.glob(f"*.{ending}"))
    else:
        commit = getattr(getattr(base.model, "config", None), "_commit_hash", None)
        if base.location is None or commit is None:
            raise OptionError(
                "the base model has no files of its own: expected a directory or a Hub id, so that finished modules can be used again; "
                "merge without a work folder"
            )
        return {"location": base.location, "commit": commit}
    return {"location": base.location, "files": {file.name: _sampled(file) for file in files}}


def _whole(file: Path) -> Mapping[str, Any]:
    """Size and checksum of all of a file."""
    digest, size = hashlib.sha256(), 0
    try:
        with file.open("rb", buffering=0) as opened:
            while chunk := opened.read(_CHUNK):
                digest.update(chunk)
                size += len(chunk)
    except OSError as error:
        raise _unreadable(file, error) from error
    return {"size": size, "sha256": digest.hexdigest()}


def _sampled(file: Path) -> Mapping[str, Any]:
    """Size, time of the last change, and a checksum of parts of a large file."""
    digest = hashlib.sha256()
    try:
        with file.open("rb", buffering=0) as opened:
            about = file.stat()
            for start in range(0, about.st_size, _STEP):
                opened.seek(start)
                digest.update(opened.read(_SAMPLE))
    except OSError as error:
        raise _unreadable(file, error) from error
    return {"size": about.st_size, _CHANGED: about.st_mtime_ns, "samples": digest.hexdigest()}


def _unreadable(file: Path, error: OSError) -> SourceError:
    return SourceError(
        f"'{file}' can't be read ({first_line(error)}): expected a whole file; save or download it again"
    )

"""A fused model on the Hub."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from torch import nn

from dc_merge_peft.errors import OutputError
from dc_merge_peft.outputs.beside import FOLDER
from dc_merge_peft.outputs.card import fused_card
from dc_merge_peft.outputs.card_facts import base_facts
from dc_merge_peft.outputs.fused import save_fused
from dc_merge_peft.outputs.fused_papers import fused_record
from dc_merge_peft.outputs.public import is_hub_id, public_copy, with_owned_base
from dc_merge_peft.outputs.publish import publish
from dc_merge_peft.outputs.room import scratch
from dc_merge_peft.paths import exists, is_file
from dc_merge_peft.result import MergeResult
from dc_merge_peft.runconfig import FILE_NAME, as_yaml
from dc_merge_peft.sources.hub import CONFIG_FILE, HubId

# Where transformers, of any version, notes from which directory something was loaded; in configs of parts, too.
_NOTED_IN = ("config.json", "tokenizer_config.json", "processor_config.json", "preprocessor_config.json")
_PLACES = ("_name_or_path", "name_or_path", "tokenizer_file", "special_tokens_map_file")
_WEIGHTS = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?")


def push_fused(
    model: nn.Module | None,
    result: MergeResult,
    repo_id: str,
    *,
    base: str | Path | None,
    saved: Path | None = None,
    keeps: bool = True,
    private: bool | None = None,
    token: str | bool | None = None,
    commit_message: str | None = None,
    create_pr: bool = False,
) -> str:
    """Upload a fused model to the root of a Hub repository in one commit; returns the commit's URL.

    Local paths of adapters and base model are left out of what is published.

    Args:
        model: A transformers model that holds the merged delta; none where it is saved already.
        result: What was merged.
        repo_id: The repository, created if need be.
        base: The base model, whose tokenizer and processor files come along.
        saved: Where the model has been saved by :func:`save_fused` already; by default it is saved for the upload.
        keeps: Whether what is saved stays there, so that an error may say where the model is.
        private: Of a new repository.
        token: For the Hub; by default that of the environment or login.
        commit_message: Title of the commit.
        create_pr: Propose a pull request instead.

    Raises:
        OutputError: see :func:`dc_merge_peft.outputs.publish.publish`; it says where the saved model is.
    """
    owned = with_owned_base(result, token)
    facts = base_facts(owned, token=token, ask_hub=True)
    public = public_copy(owned)
    known = base is not None and HubId.parse(str(base)) is not None and not exists(base)
    record = fused_record(public, base if known else None)
    card = fused_card(public, record, facts, repo_id if is_hub_id(repo_id) else None)
    own: dict[str, Path | bytes] = {
        "README.md": card.encode(),
        FILE_NAME: as_yaml(record).encode(),
    }
    with scratch() as folder:
        place = saved
        if place is None:
            assert model is not None, "neither a model nor where it is saved"
            place = save_fused(model, result, folder / "model", base=base, token=token)
        files = {file.relative_to(place).as_posix(): _public(file) for file in place.rglob("*") if is_file(file)}
        try:
            return publish(
                {**files, **own},
                repo_id,
                commit_message=commit_message or _title(result),
                private=private,
                token=token,
                create_pr=create_pr,
                stale=_of_an_earlier_model,
                rival=CONFIG_FILE,
            )
        except OutputError as error:
            raise OutputError(
                f"{error}; the {'merged' if result.full else 'fused'} model is in '{saved}'"
                if saved and keeps
                else str(error)
            ) from error.__cause__


def _of_an_earlier_model(path: str) -> bool:
    """Whether it holds weights, in one file or several, which transformers could take for this model's, or a report."""
    return _WEIGHTS.fullmatch(path) is not None or path.startswith(f"{FOLDER}/")


def _title(result: MergeResult) -> str:
    if result.full:
        return f"Merge of {len(result.adapters)} fine-tuned models with {result.method}"
    return f"Base model with {len(result.adapters)} adapters, merged with {result.method}"


def _public(file: Path) -> Path | bytes:
    """The file, or its content without the local directories that it names."""
    if file.name not in _NOTED_IN:
        return file
    values = json.loads(file.read_text(encoding="utf-8"))
    public = _without_places(values)
    return file if public == values else (json.dumps(public, indent=2) + "\n").encode()


def _without_places(value: Any) -> Any:
    """A value of a config without local directories, at any depth."""
    if isinstance(value, list):
        return [_without_places(item) for item in value]
    if not isinstance(value, dict):
        return value
    kept = {
        key: item for key, item in value.items() if key not in _PLACES or not isinstance(item, str) or is_hub_id(item)
    }
    return {key: _without_places(item) for key, item in kept.items()}

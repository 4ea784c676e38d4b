"""A merged adapter as an ordinary PEFT adapter directory, and on the Hub."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import torch
import yaml

from dc_merge_peft.errors import OutputError, first_line
from dc_merge_peft.outputs.card import adapter_card
from dc_merge_peft.outputs.directory import whole_directory
from dc_merge_peft.outputs.extras import extra_tensors, without_trainables
from dc_merge_peft.outputs.files import save_reproducibly
from dc_merge_peft.outputs.lora_config import lora_fields, stored_factors
from dc_merge_peft.outputs.public import public_copy
from dc_merge_peft.result import MergeResult
from dc_merge_peft.runconfig import FILE_NAME, run_record
from dc_merge_peft.sources.hub import TRAINABLES_FILE
from dc_merge_peft.sources.keys import PREFIX


def write_adapter(result: MergeResult, directory: str | Path, *, overwrite: bool = False) -> Path:
    """Write ``adapter_config.json``, ``adapter_model.safetensors``, a model card and the configuration of the run.

    ``PeftModel.from_pretrained(base, directory)`` loads it with scaling 1 and the exact delta. The directory appears
    whole or not at all.

    Raises:
        OutputError: the directory exists and is not to be overwritten, can't be written, or the dtype can't hold the
            numbers.
    """
    with whole_directory(directory, overwrite=overwrite) as building:
        _write_files(result, building)
    return Path(directory).expanduser()


def push_adapter(
    result: MergeResult,
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | bool | None = None,
    commit_message: str | None = None,
    create_pr: bool = False,
) -> str:
    """Upload the adapter to the root of a Hub repository, created if need be, in one commit; returns the commit's URL.

    Local paths of adapters are left out of what is published.

    Raises:
        OutputError: the Hub refuses; nothing is half-published, since files land in one commit.
    """
    import huggingface_hub

    api = huggingface_hub.HfApi(token=token)
    message = commit_message or f"Merge of {len(result.adapters)} adapters with {result.method}"
    with tempfile.TemporaryDirectory() as folder:
        _write_files(public_copy(result), Path(folder))
        try:
            repo = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
            commit = api.upload_folder(
                repo_id=repo, folder_path=folder, commit_message=message, create_pr=create_pr or None
            )
        except (
            Exception
        ) as error:  # the client lets its HTTP library's errors through, whose names change with versions
            raise OutputError(
                f"can't push to '{repo_id}': {first_line(error)}; expected write access to it: check the name and "
                "`hf auth login`"
            ) from error
    return commit.pr_url or commit.commit_url


def _write_files(result: MergeResult, folder: Path) -> None:
    """The four files of an adapter, and the original LLaVA's fifth one."""
    record = run_record(result)
    (folder / FILE_NAME).write_text(yaml.safe_dump(record, sort_keys=False, allow_unicode=True), encoding="utf-8")
    (folder / "README.md").write_text(adapter_card(result, record), encoding="utf-8")
    result, beside = without_trainables(result)
    if beside:
        torch.save({PREFIX + name: value.cpu() for name, value in beside.items()}, folder / TRAINABLES_FILE)
    tensors = {}
    for module, A, B in stored_factors(result):
        ending = "" if result.modules[module].layout.kind == "embedding" else ".weight"
        for name, factor in zip(result.modules[module].layout.factor_names, (A, B), strict=True):
            tensors[f"{PREFIX}{module}.{name}{ending}"] = factor.cpu()
    tensors |= {PREFIX + key: value.cpu() for key, value in extra_tensors(result).items()}
    # PEFT and transformers look for "format"; the provenance goes beside it, not into a config that others parse.
    save_reproducibly(
        tensors, folder / "adapter_model.safetensors", {"format": "pt", "dc_merge": json.dumps(record, sort_keys=True)}
    )
    config = json.dumps(lora_fields(result), indent=2, sort_keys=True)
    (folder / "adapter_config.json").write_text(config + "\n", encoding="utf-8")

"""A merged adapter as an ordinary PEFT adapter directory, and on the Hub."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch

from dc_merge_peft.methods.data import statistics_places
from dc_merge_peft.outputs.beside import FOLDER, Beside
from dc_merge_peft.outputs.card import adapter_card
from dc_merge_peft.outputs.card_facts import base_facts
from dc_merge_peft.outputs.directory import whole_directory
from dc_merge_peft.outputs.extras import extra_tensors, without_trainables
from dc_merge_peft.outputs.files import PlannedTensor, bytes_of, early_to_disk, lay_out, write_at
from dc_merge_peft.outputs.lora_config import StoredLayer, lora_fields, stored_layers
from dc_merge_peft.outputs.public import is_hub_id, public_copy, with_owned_base
from dc_merge_peft.outputs.publish import publish
from dc_merge_peft.outputs.room import scratch
from dc_merge_peft.parallel import in_parallel, one_thread
from dc_merge_peft.paths import is_file
from dc_merge_peft.progress import Progress, silent
from dc_merge_peft.result import MergeResult
from dc_merge_peft.runconfig import FILE_NAME, as_yaml, run_record
from dc_merge_peft.sources.base import CardFacts
from dc_merge_peft.sources.hub import TRAINABLES_FILE, WEIGHT_FILES
from dc_merge_peft.sources.keys import PREFIX


def write_adapter(
    result: MergeResult,
    directory: str | Path,
    *,
    overwrite: bool = False,
    beside: Beside | None = None,
    progress: Progress = silent,
) -> Path:
    """Write ``adapter_config.json``, ``adapter_model.safetensors``, a model card and the configuration of the run.

    ``PeftModel.from_pretrained(base, directory)`` loads it with scaling 1 and the exact delta. The directory appears
    whole or not at all.

    Raises:
        OutputError: the directory exists and is not to be overwritten, can't be written, or the dtype can't hold the
            numbers.
    """
    with whole_directory(directory, overwrite=overwrite, inputs=inputs_of(result)) as building:
        _write_files(result, building, base=base_facts(result), beside=beside, progress=progress)
    return Path(directory).expanduser()


def inputs_of(result: MergeResult) -> list[str]:
    """What a merge is made from, as users name it."""
    bases = [result.dora.base] if result.dora is not None and result.dora.base is not None else []
    return [*(info.location for info in result.adapters), *bases, *statistics_places(result.options)]


def push_adapter(
    result: MergeResult,
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | bool | None = None,
    commit_message: str | None = None,
    create_pr: bool = False,
    beside: Beside | None = None,
) -> str:
    """Upload the adapter to the root of a Hub repository, created if need be, in one commit; returns the commit's URL.

    Local paths of adapters are left out of what is published.

    Raises:
        OutputError: see :func:`dc_merge_peft.outputs.publish.publish`.
    """
    result = with_owned_base(result, token)
    base = base_facts(result, token=token, ask_hub=True)
    with scratch() as folder:
        _write_files(
            public_copy(result), folder, base=base, place=repo_id if is_hub_id(repo_id) else None, beside=beside
        )
        return publish(
            {file.relative_to(folder).as_posix(): file for file in folder.rglob("*") if is_file(file)},
            repo_id,
            commit_message=commit_message or f"Merge of {len(result.adapters)} adapters with {result.method}",
            private=private,
            token=token,
            create_pr=create_pr,
            stale=lambda path: path in (*WEIGHT_FILES, TRAINABLES_FILE) or path.startswith(f"{FOLDER}/"),
        )


def _write_files(
    result: MergeResult,
    folder: Path,
    *,
    base: CardFacts,
    place: str | None = None,
    beside: Beside | None = None,
    progress: Progress = silent,
) -> None:
    """The four files of an adapter, the original LLaVA's fifth one, and what lies beside the card."""
    beside = beside or Beside()
    beside.write(folder)
    record = run_record(result)
    (folder / FILE_NAME).write_text(as_yaml(record), encoding="utf-8")
    (folder / "README.md").write_text(adapter_card(result, record, base, place, beside), encoding="utf-8")
    result, trainables = without_trainables(result)
    if trainables:
        torch.save({PREFIX + name: value.cpu() for name, value in trainables.items()}, folder / TRAINABLES_FILE)
    # PEFT and transformers look for "format"; the provenance goes beside it, not into a config that others parse.
    metadata = {"format": "pt", "dc_merge": json.dumps(record, sort_keys=True)}
    write_weights(result, folder / "adapter_model.safetensors", metadata, progress)
    config = json.dumps(lora_fields(result), indent=2, sort_keys=True)
    (folder / "adapter_config.json").write_text(config + "\n", encoding="utf-8")


def write_weights(result: MergeResult, file: Path, metadata: Mapping[str, str], progress: Progress = silent) -> None:
    """The weight file of an adapter, one layer at a time, several side by side.

    Raises:
        OutputError: a factor does not fit into the dtype.
    """
    extras = {PREFIX + key: value.cpu() for key, value in extra_tensors(result).items()}
    planned = {key: PlannedTensor(value.dtype, tuple(value.shape)) for key, value in extras.items()}
    layers = stored_layers(result)
    for stored in layers:
        for key, shape in zip(_keys(stored), stored.shapes, strict=True):
            planned[key] = PlannedTensor(result.dtype, shape)
    layout = lay_out(dict(sorted(planned.items())), metadata)
    layout.create(file)

    def write(stored: StoredLayer) -> None:
        for key, factor in zip(_keys(stored), stored.factors(result), strict=True):
            write_at(file, layout.places[key], bytes_of(factor.cpu()))

    for key, value in extras.items():
        write_at(file, layout.places[key], bytes_of(value))
    with one_thread() as threads, early_to_disk([file]):
        for _ in in_parallel(write, progress(layers, "writing"), workers=threads, on_cpu=lambda _: True):
            pass


def _keys(stored: StoredLayer) -> tuple[str, str]:
    """The keys of A and B in a checkpoint."""
    ending = "" if stored.layout.kind == "embedding" else ".weight"
    A, B = (f"{PREFIX}{stored.layer}.{name}{ending}" for name in stored.layout.factor_names)
    return A, B

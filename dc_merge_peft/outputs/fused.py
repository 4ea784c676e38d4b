"""A merged adapter added to the weights of its base model: a full model that needs no PEFT. In memory."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatch
from functools import partial
from pathlib import Path

import torch
import yaml
from torch import nn

from dc_merge_peft.errors import OutputError, UnsupportedAdapterError, preview
from dc_merge_peft.layers import Place, place_of
from dc_merge_peft.offload import Offloading, unreadable
from dc_merge_peft.outputs.card import fused_card
from dc_merge_peft.outputs.card_facts import base_facts
from dc_merge_peft.outputs.directory import whole_directory
from dc_merge_peft.outputs.fused_extras import extra_writes
from dc_merge_peft.result import MergeResult
from dc_merge_peft.runconfig import FILE_NAME, run_record
from dc_merge_peft.sources.base_model import injected_layer, path_in_model
from dc_merge_peft.sources.hub import HubId, fetch_files
from dc_merge_peft.sources.renames import fitting_rename

# What belongs to a model beside its weights and configs, which save_pretrained writes: tokenizers and processors.
COMPANIONS = (
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "spiece.model",
    "sentencepiece*.model", "*processor_config.json", "chat_template*",
)  # fmt: skip


@torch.no_grad()
def fuse_into(model: nn.Module, result: MergeResult) -> None:
    """Add every merged delta to its weight, in float32 and back to the weight's dtype, and put what stands outside B and A in
    its place; everything is checked first.

    Weights that are offloaded, to disk too, are in CPU memory afterwards: the files may be the base model's own.

    Raises:
        OutputError: a module is missing, has another shape or layer type, or shares its weight with another module; a layer
            without a bias, for a bias on lora_B.
        SourceError: an offloaded weight is not where accelerate has put it.
        UnsupportedAdapterError: a weight that is quantised, sharded, or on the meta device without an offload hook.
    """
    injected = injected_layer(model)
    if injected is not None:
        raise OutputError(
            f"the base model has adapters of its own, as in '{injected}': expected a plain model; call unload() or "
            "merge_and_unload() on its PeftModel first"
        )
    offloading, shared = Offloading(model), _sharing(model)
    targets = list(_targets(model, result, offloading, shared))
    writes = list(extra_writes(model, result, shared))
    for write in writes:  # before the deltas: a value of the base model may be what a delta is added to
        write()
    copied: set[tuple[int, str]] = set()
    for name, module, place in targets:
        parameter = module.get_parameter(place.parameter)
        stored = offloading.find(module, place.parameter) if parameter.is_meta else None
        whole = stored.read(parameter, f"the weight of '{name}'") if stored else parameter
        if stored and (id(module), place.parameter) not in copied:
            # What is offloaded is changed in a copy: its numbers may be those of a file. Experts share one.
            whole = whole.clone()
            copied.add((id(module), place.parameter))
        expert = place.layout.kind == "expert" and whole.dim() == 3
        weight = whole[place.layout.number(name)] if expert else whole
        delta = place.layout.to_weight(result.delta(name).to(weight.device), weight, transposed=place.transposed)
        wide = torch.promote_types(weight.dtype, torch.float32)
        weight.copy_((weight.to(wide) + delta).to(weight.dtype))
        if stored:
            stored.write(whole)


def save_fused(
    model: nn.Module,
    result: MergeResult,
    out: str | Path,
    *,
    base: str | Path | None,
    overwrite: bool = False,
    token: str | bool | None = None,
) -> Path:
    """Save a fused transformers model with the tokenizer and processor files of its base, whole or not at all.

    Raises:
        OutputError: the directory exists, can't be written, or transformers can't save the model.
    """
    if not hasattr(model, "save_pretrained"):
        raise OutputError(
            f"a {type(model).__name__} can't be saved: expected a transformers model; use model.state_dict()"
        )
    if not hasattr(model, "hf_device_map") and any(parameter.is_meta for parameter in model.parameters()):
        raise OutputError(
            f"the {type(model).__name__} is offloaded without a device map, and transformers can't save it: expected one loaded with "
            "device_map=...; or take the hooks off first, with accelerate.hooks.remove_hook_from_submodules(model)"
        )
    with whole_directory(out, overwrite=overwrite) as building:
        model.save_pretrained(building)  # type: ignore[operator]
        for file in _companions(base, token) if base is not None else ():
            if not (building / file.name).exists():
                shutil.copyfile(file, building / file.name)
        record = run_record(result)
        (building / FILE_NAME).write_text(yaml.safe_dump(record, sort_keys=False, allow_unicode=True), encoding="utf-8")
        (building / "README.md").write_text(fused_card(result, record, base_facts(result)), encoding="utf-8")
    return Path(out).expanduser()


def _targets(
    model: nn.Module, result: MergeResult, offloading: Offloading, shared: Mapping[str, Sequence[str]]
) -> Iterator[tuple[str, nn.Module, Place]]:
    """The layer of every merged module and the place of its delta there, checked."""
    for name, merged in result.modules.items():
        base_path = merged.layout.base_path(name)
        path = path_in_model(model, base_path)
        if path is None:
            raise OutputError(
                f"the base model, a {type(model).__name__}, has no module {preview([base_path])}: expected the base model of the "
                "adapters; give the model object of the class they were trained with"
                + fitting_rename(result.modules, partial(path_in_model, model), result.rename)
            )
        module = model.get_submodule(path)
        place = place_of(name, module, merged.layout, merged.delta.shape)
        weight = getattr(module, place.parameter, None)
        if place.layout != merged.layout or place.shape != merged.delta.shape or weight is None:
            raise OutputError(
                f"'{name}' is of type {place.layout} and shape {place.shape} in the base model, {merged.layout} and {merged.delta.shape} in the merged "
                "adapter: expected the base model of the adapters"
            )
        reason = unreadable(weight, offloading.find(module, place.parameter), path)
        if reason is not None:
            raise UnsupportedAdapterError(
                f"the weight of '{name}' {reason}: expected a whole one; load the model without that, or keep the merged adapter"
            )
        if place.layout.kind == "out_proj":
            raise UnsupportedAdapterError(
                f"'{name}' is the output projection of a MultiheadAttention, to which PEFT's forward pass adds the delta twice, so "
                "that base + delta is not the model that was trained: expected other layers; load the merged adapter with "
                "PeftModel.from_pretrained and call merge_and_unload(), which does as the forward pass"
            )
        if not weight.is_floating_point():
            raise UnsupportedAdapterError(
                f"'{name}' is quantised ({weight.dtype}): expected floating-point base weights"
            )
        if others := [other for other in shared.get(path, ()) if other != path]:
            raise OutputError(
                f"'{name}' shares its weight with {preview(others)}: fusing "
                "would change both, the adapter changes one; untie them first, or keep the merged adapter"
            )
        yield name, module, place


def _sharing(model: nn.Module) -> dict[str, list[str]]:
    """For the paths of modules that share a parameter all those that hold it.

    Offloaded parameters are meta tensors of their own, shared or not; there it counts what transformers declares.
    """
    holders: dict[object, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        holders.setdefault(id(parameter), []).append(name.rpartition(".")[0])
    for group in _declared_ties(model):
        if all(model.get_parameter(name).is_meta for name in group):
            holders[group] = [name.rpartition(".")[0] for name in group]
    return {path: paths for paths in holders.values() if len(paths) > 1 for path in paths}


def _declared_ties(model: nn.Module) -> Iterator[tuple[str, ...]]:
    """Groups of parameters that a transformers model ties, by name."""
    ties = getattr(model, "all_tied_weights_keys", None)  # transformers 5: {target: source}
    if ties is not None:
        yield from ((target, source) for target, source in ties.items())
    elif getattr(getattr(model, "config", None), "tie_word_embeddings", False):
        embeddings = (model.get_input_embeddings(), model.get_output_embeddings())  # type: ignore[operator]
        paths = {id(module): path for path, module in model.named_modules()}
        names = tuple(f"{paths[id(module)]}.weight" for module in embeddings if module is not None)
        yield names


def _companions(base: str | Path, token: str | bool | None) -> list[Path]:
    """Tokenizer and processor files of a base model directory or Hub snapshot.

    Raises:
        OutputError: one of them is a link to a file elsewhere, which would be copied and perhaps published.
    """
    folder = Path(base)
    if not folder.is_dir():
        folder = fetch_files(HubId.parse(str(base)) or HubId(str(base)), COMPANIONS, token)
    found = sorted(
        file for file in folder.iterdir() if file.is_file() and any(fnmatch(file.name, p) for p in COMPANIONS)
    )
    root = folder.resolve()
    # The Hub's cache keeps content beside its snapshots, and links to it.
    inside = root.parent.parent / "blobs" if root.parent.name == "snapshots" else root
    for file in found:
        real = file.resolve()
        if not real.is_relative_to(root) and not real.is_relative_to(inside):
            raise OutputError(
                f"'{file.name}' of the base model is a link to a file outside of it: expected its own files, since they are "
                "copied; put the file there if it belongs to the model"
            )
    return found

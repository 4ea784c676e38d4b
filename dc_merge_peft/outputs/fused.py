"""A merged adapter added to the weights of its base model: a full model that needs no PEFT. In memory."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from fnmatch import fnmatch
from functools import partial
from pathlib import Path

import torch
import yaml
from torch import nn

from dc_merge_peft.errors import OutputError, UnsupportedAdapterError, preview
from dc_merge_peft.layers import delta_shape, layer_layout
from dc_merge_peft.outputs.card import fused_card
from dc_merge_peft.outputs.directory import whole_directory
from dc_merge_peft.outputs.fused_extras import extra_writes
from dc_merge_peft.result import MergeResult
from dc_merge_peft.runconfig import FILE_NAME, run_record
from dc_merge_peft.sources.base_model import injected_layer, path_in_model
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

    Raises:
        OutputError: a module is missing, has another shape or layer type, or shares its weight with another module; a layer
            without a bias, for a bias on lora_B.
        UnsupportedAdapterError: a quantised weight.
    """
    injected = injected_layer(model)
    if injected is not None:
        raise OutputError(
            f"the base model has adapters of its own, as in '{injected}': expected a plain model; call unload() or "
            "merge_and_unload() on its PeftModel first"
        )
    targets, writes = list(_targets(model, result)), list(extra_writes(model, result, _shared_parameters(model)))
    for write in writes:  # before the deltas: a value of the base model may be what a delta is added to
        write()
    for name, module in targets:
        weight: nn.Parameter = module.weight  # type: ignore[assignment]
        delta = result.lowrank(name).to(weight.device).dense()
        transposed = type(module).__name__ == "Conv1D"  # of transformers: (in, out)
        delta = result.modules[name].layout.to_weight(delta, weight, transposed=transposed)
        wide = torch.promote_types(weight.dtype, torch.float32)
        weight.copy_((weight.to(wide) + delta).to(weight.dtype))


def save_fused(
    model: nn.Module, result: MergeResult, out: str | Path, *, base: str | Path | None, overwrite: bool = False
) -> Path:
    """Save a fused transformers model with the tokenizer and processor files of its base, whole or not at all.

    Raises:
        OutputError: the directory exists, can't be written, or the model has no ``save_pretrained``.
    """
    if not hasattr(model, "save_pretrained"):
        raise OutputError(
            f"a {type(model).__name__} can't be saved: expected a transformers model; use model.state_dict()"
        )
    with whole_directory(out, overwrite=overwrite) as building:
        model.save_pretrained(building)  # type: ignore[operator]
        for file in _companions(base) if base is not None else ():
            if not (building / file.name).exists():
                shutil.copyfile(file, building / file.name)
        record = run_record(result)
        (building / FILE_NAME).write_text(yaml.safe_dump(record, sort_keys=False, allow_unicode=True), encoding="utf-8")
        (building / "README.md").write_text(fused_card(result, record), encoding="utf-8")
    return Path(out).expanduser()


def _targets(model: nn.Module, result: MergeResult) -> Iterator[tuple[str, nn.Module]]:
    """The layer of every merged module, checked."""
    shared = _shared_parameters(model)
    for name, merged in result.modules.items():
        path = path_in_model(model, name)
        if path is None:
            raise OutputError(
                f"the base model, a {type(model).__name__}, has no module {preview([name])}: expected the base model of the "
                "adapters; give the model object of the class they were trained with"
                + fitting_rename(result.modules, partial(path_in_model, model), result.rename)
            )
        module = model.get_submodule(path)
        weight = getattr(module, "weight", None)
        found, shape = layer_layout(name, module), delta_shape(module)
        if found != merged.layout or shape != merged.delta.shape or weight is None:
            raise OutputError(
                f"'{name}' is of type {found} and shape {shape} in the base model, {merged.layout} and {merged.delta.shape} in the merged "
                "adapter: expected the base model of the adapters"
            )
        if not weight.is_floating_point():
            raise UnsupportedAdapterError(
                f"'{name}' is quantised ({weight.dtype}): expected floating-point base weights"
            )
        if id(weight) in shared:
            raise OutputError(
                f"'{name}' shares its weight with {preview(other for other in shared[id(weight)] if other != path)}: fusing "
                "would change both, the adapter changes one; untie them first, or keep the merged adapter"
            )
        yield name, module


def _shared_parameters(model: nn.Module) -> dict[int, list[str]]:
    """Paths of the modules that hold the same parameter, where more than one does."""
    holders: dict[int, list[str]] = {}
    for path, parameter in model.named_parameters(remove_duplicate=False):
        holders.setdefault(id(parameter), []).append(path.rpartition(".")[0])
    return {key: paths for key, paths in holders.items() if len(paths) > 1}


def _companions(base: str | Path) -> list[Path]:
    """Tokenizer and processor files of a base model directory or Hub snapshot."""
    folder = Path(base)
    if not folder.is_dir():
        import huggingface_hub

        folder = Path(huggingface_hub.snapshot_download(str(base), allow_patterns=list(COMPANIONS)))
    return sorted(
        file for file in folder.iterdir() if file.is_file() and any(fnmatch(file.name, p) for p in COMPANIONS)
    )

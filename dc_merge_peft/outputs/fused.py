"""A merged adapter added to the weights of its base model: a full model that needs no PEFT. In memory."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor, nn

from dc_merge_peft.errors import OutputError
from dc_merge_peft.offload import Offloaded, Offloading, unreadable
from dc_merge_peft.outputs.companions import copy_companions
from dc_merge_peft.outputs.directory import whole_directory
from dc_merge_peft.outputs.fused_extras import extra_changes
from dc_merge_peft.outputs.fused_papers import write_papers
from dc_merge_peft.outputs.fused_targets import Target, find_targets, refuse_unless_finite
from dc_merge_peft.paths import is_dir
from dc_merge_peft.result import MergeResult
from dc_merge_peft.sources.base_files import COMPANIONS
from dc_merge_peft.sources.base_model import injected_layer
from dc_merge_peft.sources.hub import HubId, fetch_files
from dc_merge_peft.sources.ties import sharing


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
    offloading = Offloading(model.modules())

    def reason(target: Target) -> str | None:
        held = offloading.find(target.module, target.place.parameter)
        return unreadable(target.parameter, held, target.path)

    wanted = {name: (merged.layout, merged.delta.shape) for name, merged in result.modules.items()}
    targets = list(find_targets(model, wanted, result.rename, reason))
    specs = {name: extra.spec for name, extra in result.extras.values.items()}
    changes = list(extra_changes(model, specs, sharing(model)))
    _check_sums(targets, offloading, result)
    for change in changes:  # before the deltas: a value of the base model may be what a delta is added to
        owner, _, leaf = change.parameter.rpartition(".")
        change.apply(getattr(model.get_submodule(owner), leaf), result.extras.values[change.name].value)
    for group in _by_parameter(targets):
        whole, stored = _read(group[0], offloading)
        if stored:  # changed in a copy: its numbers may be those of a file
            whole = whole.clone()
        for target in group:
            weight = target.part_of(whole)
            weight.copy_(_fused(weight, target, result))
        if stored:
            stored.write(whole)


def _by_parameter(targets: Iterable[Target]) -> list[list[Target]]:
    """Experts share a parameter, which is read and written once."""
    groups: dict[tuple[int, str], list[Target]] = {}
    for target in targets:
        groups.setdefault((id(target.module), target.place.parameter), []).append(target)
    return list(groups.values())


def _read(target: Target, offloading: Offloading) -> tuple[Tensor, Offloaded | None]:
    """The parameter that a module's weight is in, and where it is offloaded to, if it is."""
    parameter = target.parameter
    stored = offloading.find(target.module, target.place.parameter) if parameter.is_meta else None
    return (stored.read(parameter, f"the weight of '{target.name}'") if stored else parameter), stored


def _fused(weight: Tensor, target: Target, result: MergeResult) -> Tensor:
    """Weight and delta, added in float32.

    Raises:
        OutputError: the sum is not finite.
    """
    dense = result.delta(target.name).to(weight.device)
    delta = target.place.layout.to_weight(dense, weight, transposed=target.place.transposed)
    fused = (weight.to(torch.promote_types(weight.dtype, torch.float32)) + delta).to(weight.dtype)
    refuse_unless_finite(fused, target.name)
    return fused


def _check_sums(targets: Iterable[Target], offloading: Offloading, result: MergeResult) -> None:
    """Refuse sums that are not finite before any weight is changed. No entry of a delta is larger than its norm, which spares most
    weights the sum.

    Raises:
        OutputError: there is one.
    """
    for group in _by_parameter(targets):
        whole, _ = _read(group[0], offloading)
        if not whole.is_floating_point() or not whole.numel():
            continue
        least, most = (float(extreme) for extreme in whole.aminmax())
        for target in group:
            largest = max(-least, most) + abs(result.alpha) * result.modules[target.name].delta.norm()
            if not largest < 0.99 * torch.finfo(whole.dtype).max:  # NaN included
                _fused(target.part_of(whole), target, result)


def save_fused(
    model: nn.Module,
    result: MergeResult,
    out: str | Path,
    *,
    base: str | Path | None,
    overwrite: bool = False,
    token: str | bool | None = None,
    max_shard_size: int | str | None = None,
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
        sizes = {} if max_shard_size is None else {"max_shard_size": max_shard_size}
        model.save_pretrained(building, **sizes)  # type: ignore[operator]
        if base is not None:
            copy_companions(_folder(base, token), building, COMPANIONS)
        write_papers(result, building, base)
    return Path(out).expanduser()


def _folder(base: str | Path, token: str | bool | None) -> Path:
    """A base model's directory, or a snapshot of what belongs to it beside its weights."""
    folder = Path(base).expanduser()
    return folder if is_dir(folder) else fetch_files(HubId.parse(str(base)) or HubId(str(base)), COMPANIONS, token)

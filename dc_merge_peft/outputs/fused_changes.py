"""What a merge changes in the stored tensors of a base model, checked before anything is merged or read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch

from dc_merge_peft.errors import UnsupportedAdapterError
from dc_merge_peft.layout import Layout
from dc_merge_peft.outputs.full_means import Mean
from dc_merge_peft.outputs.fused_extras import ExtraChange, extra_changes
from dc_merge_peft.outputs.fused_targets import Target, find_targets
from dc_merge_peft.sources.base import ExtraSpec
from dc_merge_peft.sources.base_files import NotStreamable
from dc_merge_peft.sources.base_names import FiledModel
from dc_merge_peft.sources.stored import FLOATS
from dc_merge_peft.sources.ties import sharing, sharing_parameters


@dataclass(frozen=True)
class Edit:
    """Changes of one stored tensor that is a parameter as it is: extras first, then deltas."""

    targets: tuple[Target, ...] = ()  # several where the parameter holds several experts
    extras: tuple[ExtraChange, ...] = ()


@dataclass(frozen=True)
class Group:
    """Changes of parameters that transformers makes out of others on loading, such as experts stored one by one."""

    parameters: Mapping[str, tuple[Target, ...]]  # all that share stored tensors, changed or not
    keys: tuple[str, ...]  # of the stored tensors


@dataclass(frozen=True)
class Changes:
    """Everything that changes in the files of a base model."""

    edits: Mapping[str, Edit]  # by stored tensor
    groups: tuple[Group, ...]
    means: Mapping[str, Mean] = field(default_factory=dict)  # of full models, by stored tensor

    @property
    def keys(self) -> set[str]:
        """The stored tensors that change."""
        return {*self.edits, *self.means, *(key for group in self.groups for key in group.keys)}


def find_changes(
    model: FiledModel,
    wanted: Mapping[str, tuple[Layout, tuple[int, int]]],
    specs: Mapping[str, ExtraSpec],
    rename: str | None,
) -> Changes:
    """Where the deltas of a merge, and its tensors outside B and A, belong in the files of a base model.

    Args:
        model: The base model.
        wanted: The merged modules with their layouts and the shapes (m, n) of their deltas.
        specs: The tensors of the merge outside B and A.
        rename: Under which the adapters were read.

    Raises:
        NotStreamable: it can't be told, or needs the loaded model.
        OutputError: a module or parameter is missing, of another shape, or shared with another module.
        UnsupportedAdapterError: a weight that is quantised.
    """
    targets: dict[str, list[Target]] = {}
    for target in find_targets(model.model, wanted, rename, lambda _: None):
        targets.setdefault(target.parameter_name, []).append(target)
    edits: dict[str, Edit] = {}
    for change in extra_changes(model.model, specs, sharing(model.model), empty=True):
        for key in _keys_of_all_holders(model, change.parameter):
            edits[key] = Edit((), (*edits.get(key, Edit()).extras, change))
    groups: dict[tuple[str, ...], Group] = {}
    for name, found in targets.items():
        stored = model.stored(name)
        for key in stored.keys:
            _refuse_quantised(model, name, key)
        if stored.converted:
            group = _group(model, name, targets)
            groups[group.keys] = group
            continue
        for key in stored.keys:
            model.tensor(name, key)
            edits[key] = Edit(tuple(found), edits.get(key, Edit()).extras)
    return Changes(edits, tuple(groups.values()))


def _keys_of_all_holders(model: FiledModel, name: str) -> Iterator[str]:
    """The stored tensors of a parameter, under whichever of the names that it is known by; none may be left unchanged."""
    holders = dict.fromkeys(
        [name, *(other for group in sharing_parameters(model.model) if name in group for other in group)]
    )
    found = False
    for holder in holders:
        if not model.has(holder):
            continue
        for key in model.stored(holder).keys:
            if model.tensor(holder, key).torch_dtype is None:
                raise NotStreamable(f"'{holder}' is stored as {model.files.tensors[key].dtype}")
            found = True
            yield key
    if not found:
        model.stored(name)  # which says that there is none


def _refuse_quantised(model: FiledModel, name: str, key: str) -> None:
    dtype = model.files.tensors[key].dtype
    if dtype not in FLOATS:
        raise UnsupportedAdapterError(f"'{name}' is quantised ({dtype}): expected floating-point base weights")


def _group(model: FiledModel, name: str, targets: Mapping[str, list[Target]]) -> Group:
    """A converted parameter with all that hang together with it; that they can be turned round is tried without numbers."""
    names = model.stored(name).companions
    keys = dict.fromkeys(key for other in names for key in model.stored(other).keys)
    for key in keys:
        _refuse_quantised(model, name, key)
    model.to_stored({other: torch.empty(model.shape(other), device="meta") for other in names})
    return Group({other: tuple(targets.get(other, ())) for other in names}, tuple(keys))

"""Before any factor is read: which modules of which adapters meet, whether they fit, and what will come out."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import reduce
from typing import Any

import torch

from dc_merge_peft.errors import IncompatibleAdaptersError, OptionError, UnsupportedAdapterError, preview
from dc_merge_peft.extras import ExtrasPlan, plan_extras
from dc_merge_peft.layout import Layout
from dc_merge_peft.methods import Method
from dc_merge_peft.methods.options import plain, without_effect
from dc_merge_peft.padding import LARGEST_PADDING, beyond_patterns, pattern_path
from dc_merge_peft.sources.base import IN_MEMORY, AdapterInfo, ModuleSpec, Source
from dc_merge_peft.sources.experts import SEPARATE_EXPERT, unmatched_parameters
from dc_merge_peft.sources.refusals import dora_without_base
from dc_merge_peft.sources.renamed import rename_remarks
from dc_merge_peft.sources.renames import meeting_rename
from dc_merge_peft.statistics.opening import with_statistics
from dc_merge_peft.together import (
    another_base,
    check_weights,
    refuse_different_bases,
    refuse_repeated,
    uniquely_named,
    unknown_settings,
)

# Output dtypes by the name a user may give.
DTYPES = {
    "float32": torch.float32, "fp32": torch.float32, "float16": torch.float16, "fp16": torch.float16,
    "bfloat16": torch.bfloat16, "bf16": torch.bfloat16, "float64": torch.float64, "fp64": torch.float64,
}  # fmt: skip


@dataclass(frozen=True)
class PlannedModule:
    """One module of the merge."""

    name: str
    shape: tuple[int, int]
    layout: Layout
    tasks: tuple[int, ...]  # indices of the adapters that have it
    ranks: tuple[int, ...]  # of those adapters

    def largest_rank(self, svd_rank: int | None) -> int:
        """An upper bound of the rank of the merged delta."""
        bound = min(sum(self.ranks), *self.shape)
        return bound if svd_rank is None else min(bound, svd_rank)


@dataclass(frozen=True)
class MergePlan:
    """A merge that has passed every check that needs no factors."""

    modules: tuple[PlannedModule, ...] = field(repr=False)
    adapters: tuple[AdapterInfo, ...]
    weights: tuple[float, ...]
    svd_rank: int | None
    dtype: torch.dtype
    remarks: tuple[str, ...]
    extras: ExtrasPlan = field(default_factory=ExtrasPlan)

    def summary(self) -> dict[str, Any]:
        """Plain figures for a dry run: modules, ranks, and bytes of the merged adapter at most."""
        ranks = [module.largest_rank(self.svd_rank) for module in self.modules]
        return {
            "modules": len(self.modules),
            "shared_by_all": sum(len(module.tasks) == len(self.adapters) for module in self.modules),
            "largest_rank": max(ranks),
            "largest_bytes": self._largest_bytes(ranks),
            "dtype": str(self.dtype).removeprefix("torch."),
        }

    def _largest_bytes(self, ranks: Sequence[int]) -> int:
        """Of all tensors: factors with the zeros that they may be stored with, and what is kept outside them."""
        stored: dict[str, int] = {}  # rank by the path of PEFT's pattern; that of all experts is one
        sizes: dict[str, int] = {}
        for module, rank in zip(self.modules, ranks, strict=True):
            path = "" if module.layout.kind == "expert" else pattern_path(module.name, module.layout)
            stored[path] = max(rank, stored.get(path, 1))
            sizes[path] = sizes.get(path, 0) + sum(module.shape)
        entries = max(stored.values()) * sum(sizes.values())
        if not beyond_patterns(stored):
            entries = min(entries, int(LARGEST_PADDING * sum(rank * sizes[path] for path, rank in stored.items())))
        if any(extra.spec.kind == "lora_bias" for extra in self.extras.kept):
            entries += sum(module.shape[0] for module in self.modules)
        specs = [extra.spec for extra in self.extras.kept if extra.spec.kind != "lora_bias"]
        return entries * self.dtype.itemsize + sum(math.prod(spec.shape) * spec.dtype.itemsize for spec in specs)


def plan_merge(
    sources: Sequence[Source],
    method: Method,
    weights: Sequence[float] | None = None,
    *,
    svd_rank: int | None = None,
    dtype: torch.dtype | str | None = None,
    allow_different_bases: bool = False,
    extras: str | None = None,
    base: str | None = None,
) -> MergePlan:
    """Check everything that can be checked without factors.

    Args:
        base: Directory or Hub id of the base model that DoRA adapters are read with, or the merge is added to.

    Raises:
        OptionError: no adapters, wrong weights, rank, dtype or policy for extras, or statistics that a method needs and lacks.
        IncompatibleAdaptersError: repeated adapters, different base models, shapes or layer types, no common module.
        UnsupportedAdapterError: a DoRA adapter without its base model, tensors outside B and A without a policy, or layers that
            PEFT can't have in one adapter.
    """
    if not sources:
        raise OptionError("found no adapters to merge: expected at least one")
    if bare := next((source for source in sources if source.is_dora), None):
        raise dora_without_base(bare.info.name)
    refuse_repeated([source.info for source in sources])
    infos = uniquely_named([source.info for source in sources])
    checked = check_weights(weights, infos)
    svd_rank = plain(svd_rank)
    if svd_rank is not None and (isinstance(svd_rank, bool) or not isinstance(svd_rank, int) or svd_rank < 1):
        raise OptionError(f"svd_rank is {svd_rank!r}: expected a whole number of at least 1, or none to keep all")
    if not allow_different_bases:
        refuse_different_bases(infos)
    modules = _plan_modules(sources)
    _refuse_transposed(infos, modules)
    for module in modules:
        method.check(module.shape, module.ranks)
    with_statistics(method, modules, [info.name for info in infos])  # refused now where they don't fit
    planned = plan_extras(sources, infos, [module.layout.base_path(module.name) for module in modules], extras)
    return MergePlan(
        modules=modules,
        adapters=infos,
        weights=checked,
        svd_rank=svd_rank,
        dtype=_output_dtype(dtype, sources),
        remarks=(
            *_incomplete(sources, infos),
            *rename_remarks(sources),
            *planned.remarks(infos),
            *unknown_settings(sources, infos),
            *(() if allow_different_bases or base is None else another_base(base, infos)),
            *without_effect(method.config),
            *_remarks(method, modules),
        ),
        extras=planned,
    )


def _plan_modules(sources: Sequence[Source]) -> tuple[PlannedModule, ...]:
    """All modules that any adapter has, in the order in which they are first met."""
    names = dict.fromkeys(name for source in sources for name in source.modules)
    modules = []
    for name in names:
        tasks = tuple(index for index, source in enumerate(sources) if name in source.modules)
        specs = [sources[index].modules[name] for index in tasks]
        for index, spec in zip(tasks, specs, strict=True):
            _refuse_misfit(name, spec, specs[0], sources[index].info.name, sources[tasks[0]].info.name)
        ranks = tuple(spec.rank for spec in specs)
        modules.append(PlannedModule(name, specs[0].shape, specs[0].layout, tasks, ranks))
    _refuse_strangers(sources, modules)
    _refuse_renamed_experts(modules)
    _refuse_both_ways(sources, modules)
    return tuple(modules)


def _refuse_misfit(name: str, spec: ModuleSpec, first: ModuleSpec, found: str, expected: str) -> None:
    """A module that is another thing in adapter ``found`` than in the first one that has it, ``expected``."""
    layout = spec.layout
    if layout.parameters != first.layout.parameters:
        if not (layout.parameters and first.layout.parameters):
            both = (expected, found) if layout.parameters else (found, expected)
            raise _both_ways(layout.base_path(name), *both)
        raise IncompatibleAdaptersError(
            f"adapter '{found}' targets the parameters {preview(layout.parameters)} in '{layout.base_path(name)}', "
            f"'{expected}' targets {preview(first.layout.parameters)}: PEFT tells them apart by their nesting alone; expected "
            "adapters with the same target_parameters"
        )
    if layout != first.layout:
        raise IncompatibleAdaptersError(
            f"'{name}' is of type {layout} in adapter '{found}', {first.layout} in '{expected}': they were "
            "trained on different base models; merge adapters of one base model"
        )
    if spec.shape != first.shape:
        raise IncompatibleAdaptersError(
            f"adapter '{found}' has shape {spec.shape} in '{name}', '{expected}' has {first.shape}: they were "
            "trained on different base models; merge adapters of one base model"
        )


def _refuse_both_ways(sources: Sequence[Source], modules: Sequence[PlannedModule]) -> None:
    plain = {module.name: module for module in modules if module.layout.kind != "expert"}
    for module in modules:
        owner = module.layout.base_path(module.name)
        if module.layout.kind == "expert" and owner in plain:
            raise _both_ways(owner, *(sources[found.tasks[0]].info.name for found in (plain[owner], module)))


def _both_ways(owner: str, of_module: str, of_parameter: str) -> IncompatibleAdaptersError:
    """LoRA on a module and on a parameter of it, which PEFT can't have in one adapter."""
    return IncompatibleAdaptersError(
        f"adapter '{of_module}' has LoRA on the module '{owner}', adapter '{of_parameter}' on a parameter of it (target_parameters), which PEFT "
        "can't have in one adapter: expected one of the two in all adapters; train them with the same target_modules and target_parameters"
    )


def _refuse_renamed_experts(modules: Sequence[PlannedModule]) -> None:
    """The same experts under two kinds of names, which would meet when transformers renames the old ones on loading."""
    old = [module.name for module in modules if SEPARATE_EXPERT.search(module.name)]
    new = [module.name for module in modules if module.layout.kind == "expert"]
    if old and new:
        raise IncompatibleAdaptersError(
            f"some adapters have experts as modules, such as {preview(old, 1)}, others as parameters, such as {preview(new, 1)}: "
            "expected adapters of one version of transformers; load the older ones with PEFT and save them again"
        )


def _refuse_strangers(sources: Sequence[Source], modules: Sequence[PlannedModule]) -> None:
    """Adapters that fall into groups without a common module have nothing to be merged with: most often the base model
    was loaded with another class, whose modules have other names. In one model in memory they can't have others."""
    if all(source.info.location == IN_MEMORY for source in sources):
        return
    group = list(range(len(sources)))
    for module in modules:
        joined = {group[task] for task in module.tasks}
        group = [min(joined) if number in joined else number for number in group]
    for index, source in enumerate(sources):
        if group[index] != group[0]:
            other = sources[0]
            rename = meeting_rename(source.modules, other.modules) if source.info.rename is None else ""
            raise IncompatibleAdaptersError(
                f"adapter '{source.info.name}' has no target module in common with '{other.info.name}': it has "
                f"{preview(source.modules, 2)}, '{other.info.name}' has {preview(other.modules, 2)}; expected adapters of one "
                "base model, under the same module names; "
                + (
                    rename
                    or "where they are, and adapt other parts of it, load them all with PEFT and merge there, by add_weighted_adapter"
                )
            )


def _refuse_transposed(infos: Sequence[AdapterInfo], modules: Sequence[PlannedModule]) -> None:
    """``fan_in_fan_out``, which Conv1D layers need and PEFT has for a whole adapter, beside layers that it spoils."""
    transposed = next((info for info in infos if info.fan_in_fan_out), None)
    spoilt = next((module for module in modules if module.layout.kind in ("out_proj", "expert")), None)
    if transposed and spoilt:
        attention = spoilt.layout.kind == "out_proj"
        what = "transposes the delta of an attention's output projection" if attention else "has no LoRA on parameters"
        raise UnsupportedAdapterError(
            f"adapter '{transposed.name}' has fan_in_fan_out=True, with which PEFT {what}, and '{spoilt.name}' is one of the "
            "merged modules: expected fan_in_fan_out=False where there are no Conv1D layers, or merges without such modules"
        )


def _output_dtype(dtype: torch.dtype | str | None, sources: Sequence[Source]) -> torch.dtype:
    """The dtype asked for, or the widest of the sources."""
    if dtype is None:
        return reduce(torch.promote_types, (spec.dtype for source in sources for spec in source.modules.values()))
    found = DTYPES.get(dtype.strip().lower().removeprefix("torch.")) if isinstance(dtype, str) else dtype
    if found not in DTYPES.values():
        raise OptionError(f"dtype is {dtype!r}: expected one of {', '.join(DTYPES)}")
    assert found is not None
    return found


def _incomplete(sources: Sequence[Source], infos: Sequence[AdapterInfo]) -> Iterator[str]:
    """Adapters whose config names target modules that their weights lack, or lacks some that the weights have. Lists written for
    several architectures look the same as the one, and of tied layers PEFT itself leaves the other, so it is no error."""
    for source, info in zip(sources, infos, strict=True):
        missing = source.unmatched_targets() + unmatched_parameters(info.target_parameters, source.modules)
        if missing:
            yield (
                f"adapter '{info.name}' targets {preview(missing)} in its config but has no factors for it: nothing of it is "
                "merged; if the base model has such modules, the checkpoint is incomplete"
            )
        if strangers := source.untargeted_modules():
            yield (
                f"adapter '{info.name}' has factors for {preview(strangers)}, which its config does not target, so that PEFT leaves them out "
                "when it loads the adapter: here they are merged; if they don't belong to it, delete these tensors, or else correct "
                "target_modules, exclude_modules or layers_to_transform in its config"
            )


def _remarks(method: Method, modules: Sequence[PlannedModule]) -> tuple[str, ...]:
    """What the method has to say, once for all modules it concerns."""
    concerned: dict[str, list[str]] = {}
    for module in modules:
        for remark in method.remarks(module.shape, module.ranks):
            concerned.setdefault(remark, []).append(module.name)
    return tuple(
        f"in {len(names)} of {len(modules)} modules ({preview(names)}) {remark}" for remark, names in concerned.items()
    )

"""Before any delta is read: which tensors of fine-tuned models are merged, averaged or copied, and whether they fit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import reduce
from typing import Any

import torch

from dc_merge_peft.errors import IncompatibleAdaptersError, OptionError, SourceError, preview
from dc_merge_peft.methods import Method
from dc_merge_peft.methods.options import without_effect
from dc_merge_peft.plan import MergePlan, PlannedModule
from dc_merge_peft.progress import Progress, silent
from dc_merge_peft.result import FullRecord
from dc_merge_peft.sources.base_names import FiledModel
from dc_merge_peft.sources.finetuned import BaseReader, FullModel, FullModelSource
from dc_merge_peft.sources.full_doubts import odd_models
from dc_merge_peft.sources.full_kinds import Kinds, StoredMatrix, tensors_of
from dc_merge_peft.sources.stored import FLOATS, StoredTensor, same
from dc_merge_peft.statistics.opening import with_statistics
from dc_merge_peft.together import check_weights, uniquely_named

# Of batch norm with its usual momentum nothing depends on this count, and models trained for different times differ in it.
_COUNT = "num_batches_tracked"


@dataclass(frozen=True)
class AveragedTensor:
    """A stored tensor that becomes a mean over the models."""

    tensors: tuple[StoredTensor, ...]  # one a model
    statistic: bool  # a buffer, such as a running variance: the plain mean, neither weights nor alpha


@dataclass(frozen=True, eq=False)
class FullPlan:
    """A merge of full models that has passed every check that needs no arithmetic."""

    base: FiledModel
    models: tuple[FullModel, ...] = field(repr=False)
    merge: MergePlan
    sources: tuple[FullModelSource, ...] = field(repr=False)
    matrices: Mapping[str, tuple[StoredMatrix, ...]] = field(repr=False)  # by stored tensor
    averaged: Mapping[str, AveragedTensor] = field(repr=False)
    copied: tuple[str, ...] = field(repr=False)  # stored tensors that no model changes
    record: FullRecord

    @property
    def remarks(self) -> tuple[str, ...]:
        """What a user should know."""
        return self.merge.remarks

    def summary(self) -> dict[str, Any]:
        """Plain figures for a dry run."""
        tensors = self.base.files.tensors
        return {
            "base": self.base.files.base,
            "modules": len(self.merge.modules),
            "merged": len(self.matrices),
            "averaged": len(self.averaged),
            "copied": len(self.copied),
            "averaged_tensors": list(self.averaged),
            "total_bytes": sum(tensor.size for tensor in tensors.values()),
        }


def plan_full(
    base: FiledModel,
    models: Sequence[FullModel],
    method: Method,
    weights: Sequence[float] | None = None,
    *,
    average: Sequence[str] = (),
    lora_rank: int | None = None,
    allow_identical: bool = False,
    progress: Progress = silent,
) -> FullPlan:
    """Compare the models with their base model, and decide what becomes of each tensor.

    Tensors are read as far as their first difference, so that only those that are copied are read as a whole.

    Args:
        base: The base model.
        models: Its fine-tuned models.
        method: How matrices are merged.
        weights: One finite number a model; 1 for each by default.
        average: Patterns of parameters that are averaged, beside those of the rule.
        lora_rank: Rank of the adapter to be extracted; none for a full model.
        allow_identical: Accept models that are equal to the base model.
        progress: Shows how far it is.

    Raises:
        OptionError: a method that needs LoRA factors, a wrong weight, rank or pattern.
        IncompatibleAdaptersError: a model that is equal to the base model, or nothing to merge.
        SourceError: a tensor without a mean differs between models.
    """
    if method.needs_factors:
        raise OptionError(
            f"method '{method.name}' works on the LoRA factors A and B, which full models don't have: expected another method, "
            "such as 'dc'"
        )
    if lora_rank is not None and (isinstance(lora_rank, bool) or not isinstance(lora_rank, int) or lora_rank < 1):
        raise OptionError(
            f"lora_rank is {lora_rank!r}: expected a whole number of at least 1, or none for a full model"
        )
    if isinstance(average, str):
        raise OptionError(f"average is the single {average!r}: expected a list, as in [{average!r}]")
    named = uniquely_named([model.info for model in models])
    checked = check_weights(weights, named, what="model")
    kinds = Kinds(base, average, tasks=len(models), lora=lora_rank is not None)
    buffers = {name for name, _ in base.skeleton.named_buffers()}
    matrices: dict[str, tuple[StoredMatrix, ...]] = {}
    averaged: dict[str, AveragedTensor] = {}
    copied: list[str] = []
    changing: set[int] = set()
    used = tensors_of(base)
    for key in progress(list(base.files.tensors), "comparing"):
        own = base.files.tensors[key]
        names = used.get(key, [])
        changed = [i for i, model in enumerate(models) if names and not same(own, model.tensors[key])]
        if not changed or key.endswith(_COUNT):
            copied.append(key)
            continue
        if own.dtype not in FLOATS:
            raise _without_mean(key, own.dtype, named[changed[0]].name, models[changed[0]].tensors[key].dtype)
        changing.update(changed)
        if found := kinds.matrices(key, names):
            matrices[key] = found
        else:
            statistic = all(name in buffers for name in names)
            averaged[key] = AveragedTensor(tuple(model.tensors[key] for model in models), statistic)
    _refuse_unchanged([info.name for info in named], changing, matrices, averaged, allow_identical)
    every = [matrix for found in matrices.values() for matrix in found]
    # PEFT's switch for Conv1D; it takes it back from the other layers of an adapter.
    conv1d = any(matrix.transposed and matrix.layout.kind == "linear" for matrix in every)
    infos = tuple(replace(info, fan_in_fan_out=conv1d) for info in named)
    reader = BaseReader(base)
    record = FullRecord(
        base=base.files.base, average=tuple(average), merged=len(matrices), averaged=len(averaged), copied=len(copied),
        lora=lora_rank is not None,
    )  # fmt: skip
    merge = MergePlan(
        modules=tuple(
            PlannedModule(
                matrix.name, matrix.shape, matrix.layout, tuple(range(len(models))), (min(matrix.shape),) * len(models)
            )
            for matrix in every
        ),
        adapters=infos,
        weights=checked,
        svd_rank=lora_rank,
        dtype=reduce(torch.promote_types, (FLOATS[base.files.tensors[key].dtype] for key in matrices)),
        remarks=(
            *without_effect(method.config),
            *_remarks(method, every, len(models), averaged, record),
            *odd_models(base, models, named, every),
        ),
    )
    with_statistics(method, merge.modules, [info.name for info in infos])  # refused now where they don't fit
    sources = tuple(FullModelSource(model, reader, every) for model in models)
    return FullPlan(base, tuple(models), merge, sources, matrices, averaged, tuple(copied), record)


def _without_mean(key: str, own: str, model: str, found: str) -> SourceError:
    """A tensor that is no floating-point one in the base model, and another one in a model."""
    if found in FLOATS:
        return SourceError(
            f"'{key}' of the base model is quantised ({own}), and that of model '{model}' is not ({found}): expected "
            "floating-point weights; give the base model as it was before"
        )
    return SourceError(
        f"'{key}' of model '{model}' holds no floating-point numbers ({own}) and differs from the base "
        "model's: expected the same in all models, since there is no mean of it; give models that agree in it"
    )


def _refuse_unchanged(
    names: Sequence[str],
    changing: set[int],
    matrices: Mapping[str, object],
    averaged: Mapping[str, object],
    allow_identical: bool,
) -> None:
    idle = [name for index, name in enumerate(names) if index not in changing]
    if idle and not allow_identical:
        raise IncompatibleAdaptersError(
            f"model '{idle[0]}' is equal to the base model in every tensor: expected a fine-tuned model; leave it out, or allow it "
            "(allow_identical=True, --allow-identical)"
        )
    if not matrices:
        raise IncompatibleAdaptersError(
            f"no matrix differs from the base model in any model, and only {preview(averaged)} could be averaged: expected models "
            "whose linear layers were trained, and are not averaged by the options given"
        )


def _remarks(
    method: Method,
    matrices: Sequence[StoredMatrix],
    models: int,
    averaged: Mapping[str, object],
    record: FullRecord,
) -> tuple[str, ...]:
    """Of the method, once; that each task takes part with its share of the directions is the rule here."""
    shares = {
        remark: None
        for matrix in matrices
        for remark in method.remarks(matrix.shape, [min(matrix.shape) // models] * models)
    }
    if record.lora and averaged:
        return (
            *shares,
            f"{len(averaged)} averaged tensors can't be in a LoRA adapter and are left out: {preview(averaged)}; write the full "
            "model to keep them",
        )
    return tuple(shares)

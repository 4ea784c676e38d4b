"""The end of a merge: the tensors outside B and A, and what reading dense deltas as factors has cost."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TypeVar

from dc_merge_peft.extra_values import merge_extras
from dc_merge_peft.plan import MergePlan
from dc_merge_peft.result import DoraRecord, MergeResult
from dc_merge_peft.sources.base import Source
from dc_merge_peft.sources.dora import DoraSource

R = TypeVar("R", bound=MergeResult)


def completed(result: R, plan: MergePlan, sources: Sequence[Source]) -> R:
    """The merged factors with everything else that belongs to the result.

    Raises:
        SourceError: a tensor outside B and A holds NaN or Inf.
    """
    result = dataclasses.replace(result, extras=merge_extras(plan.extras, sources))
    dora = {index: source for index, source in enumerate(sources) if isinstance(source, DoraSource)}
    if not dora:
        return result
    first = next(iter(dora.values()))
    errors = {index: source.truncation_error() for index, source in dora.items()}
    remarks = [dora_remark(result.adapters[index].name, error) for index, error in errors.items()]
    record = DoraRecord(first.base, first.reading.rank, errors)
    return dataclasses.replace(result, dora=record, remarks=(*result.remarks, *remarks))


def dora_remark(name: str, error: float) -> str:
    """What is said of a DoRA adapter that was merged, by the relative error of reading it."""
    if error == 0:
        return f"adapter '{name}' is DoRA, whose delta is dense: it was read whole"
    return (
        f"adapter '{name}' is DoRA, whose delta is dense: it was read at a lower rank with a relative error of {error:.2%} "
        "over all modules; a larger dora_rank (--dora-rank) keeps more"
    )

"""What becomes of the tensors that adapters hold outside B and A, by a policy that the caller picks.

=============  ========================================================================================
``None``       adapters that hold any are refused, but for base weights that PEFT stores unasked beside a LoRA on embeddings: those
               are kept where the adapters agree on them
``"average"``  the plain mean over the adapters that have the value (the paper's rule); of token rows, row by row
``"first"``    the value of the first adapter that has it
a name         the values of that adapter, no others
``"drop"``     none
=============  ========================================================================================

Weights and alpha are for deltas: a full value is not scaled by them. A bias on lora_B comes with its scaling folded in.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import reduce

import torch
from torch import Tensor

from dc_merge_peft.errors import IncompatibleAdaptersError, OptionError, preview, unknown_name
from dc_merge_peft.sources.base import AdapterInfo, ExtraSpec, Source
from dc_merge_peft.sources.refusals import extras_without_policy

POLICIES = ("average", "first", "drop")
# Of embeddings that are compared: rows at a time, and what is none in float16.
ROWS, SMALLEST = 4096, 2.0**-24


@dataclass(frozen=True)
class PlannedExtra:
    """One tensor of the result, and the adapters whose values it is made of."""

    name: str
    spec: ExtraSpec  # of the result: the widest dtype, all tokens
    tasks: tuple[int, ...]  # indices of adapters


@dataclass(frozen=True)
class ExtrasPlan:
    """What a policy keeps and leaves out."""

    policy: str | None = None  # None where nobody was asked
    keeper: int | None = None  # the adapter, for the policy that names one
    kept: tuple[PlannedExtra, ...] = ()
    dropped: Mapping[str, tuple[int, ...]] = field(default_factory=dict)  # name: the adapters that have it
    empty: tuple[int, ...] = ()  # adapters that announce values, but hold none

    @property
    def decides(self) -> bool:
        """Whether the policy matters: without it the merge would be another one, or refused."""
        return bool(self.kept or self.dropped or self.empty)

    def remarks(self, adapters: Sequence[AdapterInfo]) -> Iterator[str]:
        """What is kept and left out, in words. What all adapters agree on, and nobody was asked about, goes without saying."""
        keeper = None if self.keeper is None else adapters[self.keeper].name
        if self.kept and self.policy is not None:
            mean, first = "the plain mean over the adapters that have it", "of the first adapter that has it"
            whose = f"of adapter '{keeper}'" if keeper else {"average": mean, "first": first}[str(self.policy)]
            yield (
                f"kept outside B and A, {whose}, not scaled by weights or alpha: "
                f"{preview(extra.name for extra in self.kept)}"
            )
        if self.dropped:
            yield f"left out outside B and A, as extras='{keeper or self.policy}' says: {preview(self.dropped)}"
        for task in self.empty if self.policy != "drop" else ():
            yield (
                f"adapter '{adapters[task].name}' lists trained modules, tokens or biases in its config, but holds no values "
                "of them outside B and A: nothing of it is kept there; if it was trained with some, the checkpoint is incomplete"
            )


def plan_extras(
    sources: Sequence[Source], infos: Sequence[AdapterInfo], modules: Sequence[str], policy: str | None
) -> ExtrasPlan:
    """Apply a policy to what the adapters hold outside B and A.

    Args:
        sources: The adapters.
        infos: How they are called in this merge.
        modules: The LoRA modules of the merge.
        policy: See above.

    Raises:
        OptionError: an unknown policy, or the name of an adapter that holds nothing.
        UnsupportedAdapterError: no policy, but adapters that hold something.
        IncompatibleAdaptersError: values of different shapes or meanings under one name, or for a module that is merged; without a policy
            different base weights beside LoRA on embeddings.
        SourceError: such base weights can't be read.
    """
    keeper = _keeper(infos, policy)
    if policy is None:
        for source, info in zip(sources, infos, strict=True):
            if source.extras_reason is not None:
                raise extras_without_policy(info.name, source.extras_reason)
        names = dict.fromkeys(name for source in sources for name in source.extras)
        return ExtrasPlan(kept=tuple(_agreed(name, sources, infos) for name in names))
    groups = _groups(sources)
    if keeper is not None and groups and not sources[keeper].extras:
        having = [info.name for source, info in zip(sources, infos, strict=True) if source.extras]
        raise OptionError(
            f"extras is '{policy}', but adapter '{infos[keeper].name}' has nothing outside B and A: expected an adapter that "
            f"has, such as {preview(having)}, or one of {', '.join(POLICIES)}"
        )
    kept: dict[str, PlannedExtra] = {}
    dropped: dict[str, tuple[int, ...]] = {}
    for group in groups:
        chosen = _chosen(group, policy, keeper)
        if not chosen:
            dropped |= {name: tuple(group.tasks) for name in group.names}
            continue
        for name in group.names_in(sources, chosen, infos):
            extra = _planned(name, sources, infos, chosen)
            if name in kept:
                raise IncompatibleAdaptersError(
                    f"'{name}' belongs to a module trained in full in one of the adapters '{infos[kept[name].tasks[0]].name}' and "
                    f"'{infos[chosen[0]].name}', and to the base model itself in the other: expected one kind of value; choose "
                    "one adapter's by its name, or 'drop'"
                )
            kept[name] = extra
    announcing = [task for task, source in enumerate(sources) if source.extras_reason and not source.extras]
    plan = ExtrasPlan(policy, keeper, tuple(kept.values()), dropped, tuple(announcing))
    _refuse_conflicts(plan, infos, modules)
    return plan


@dataclass
class _Group:
    """Values that belong together: all of one module trained in full, or one value."""

    kind: str
    module: str
    names: list[str]
    tasks: list[int]

    def names_in(self, sources: Sequence[Source], tasks: Sequence[int], infos: Sequence[AdapterInfo]) -> list[str]:
        """The values of the group that the chosen adapters have, which must be the same ones."""
        first, *others = ([name for name in self.names if name in sources[task].extras] for task in tasks)
        for task, names in zip(tasks[1:], others, strict=True):
            if names != first:
                raise IncompatibleAdaptersError(
                    f"'{self.module}' was trained in full with other parameters by adapter '{infos[task].name}' "
                    f"({preview(names)}) than by '{infos[tasks[0]].name}' ({preview(first)}): expected the same ones; choose one "
                    "adapter's by its name, 'first' or 'drop'"
                )
        return first


def _groups(sources: Sequence[Source]) -> list[_Group]:
    groups: dict[tuple[str, str], _Group] = {}
    for task, source in enumerate(sources):
        for name, spec in source.extras.items():
            identity = (spec.kind, spec.module if spec.kind == "module" else name)
            group = groups.setdefault(identity, _Group(spec.kind, spec.module, [], []))
            if name not in group.names:
                group.names.append(name)
            if task not in group.tasks:
                group.tasks.append(task)
    return list(groups.values())


def _keeper(infos: Sequence[AdapterInfo], policy: str | None) -> int | None:
    """The adapter that a policy names, if it names one."""
    if policy is None or policy in POLICIES:
        return None
    found = [index for index, info in enumerate(infos) if policy == info.name]
    found = found or [index for index, info in enumerate(infos) if policy in (info.location, info.whole_location)]
    if len(found) > 1:
        names = preview(infos[index].name for index in found)
        raise OptionError(
            f"extras is '{policy}', where several adapters come from: expected one of them by its name, {names}"
        )
    if not found:
        names = [*POLICIES, *(info.name for info in infos)]
        raise OptionError(unknown_name("policy for extras", str(policy), names))
    return found[0]


def _chosen(group: _Group, policy: str, keeper: int | None) -> list[int]:
    if policy == "drop":
        return []
    if keeper is not None:
        return [keeper] if keeper in group.tasks else []
    # Each token row is a value of its own, so that 'first' may take them from several adapters.
    return group.tasks[:1] if policy == "first" and group.kind != "tokens" else group.tasks


def _planned(name: str, sources: Sequence[Source], infos: Sequence[AdapterInfo], tasks: Sequence[int]) -> PlannedExtra:
    specs = [sources[task].extras[name] for task in tasks]
    first = specs[0]
    for task, spec in zip(tasks, specs, strict=True):
        found, expected = (s.shape[1:] if s.kind == "tokens" else s.shape for s in (spec, first))
        if found != expected:
            raise IncompatibleAdaptersError(
                f"'{name}' has shape {spec.shape} in adapter '{infos[task].name}', {first.shape} in '{infos[tasks[0]].name}': "
                "there is no mean of different shapes; choose one adapter's by its name, 'first' or 'drop'"
            )
    dtype = reduce(torch.promote_types, (spec.dtype for spec in specs))
    if first.kind != "tokens":
        optional = all(spec.optional for spec in specs)
        return PlannedExtra(name, replace(first, dtype=dtype, optional=optional), tuple(tasks))
    tokens = tuple(sorted({token for spec in specs for token in spec.tokens}))
    spec = replace(first, dtype=dtype, tokens=tokens, shape=(len(tokens), *first.shape[1:]))
    return PlannedExtra(name, spec, tuple(tasks))


def _agreed(name: str, sources: Sequence[Source], infos: Sequence[AdapterInfo]) -> PlannedExtra:
    """A base weight that PEFT has stored beside LoRA on an embedding. After a resized vocabulary, rows of new tokens are nowhere
    else, so that it belongs to the adapters; and what they were trained on must be the same."""
    having = [task for task, source in enumerate(sources) if name in source.extras]
    planned = _planned(name, sources, infos, having)
    keeper = next((task for task in having if sources[task].extras[name].dtype == planned.spec.dtype), having[0])
    if others := [task for task in having if task != keeper]:
        kept = sources[keeper].extra(name)
        for task in others:
            if not same_numbers(kept, sources[task].extra(name)):
                raise IncompatibleAdaptersError(
                    f"adapters '{infos[keeper].name}' and '{infos[task].name}' hold different base weights '{name}' beside LoRA on it, as they "
                    "do after resizing the vocabulary, each with new rows of its own: expected adapters of the same base model; say whose "
                    "weights to keep (extras='first', the name of an adapter, 'average', or 'drop' for those of the base model)"
                )
    return replace(planned, tasks=(keeper,))


def same_numbers(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors of one shape are the same but for the rounding of the coarser of their dtypes."""
    if one.dtype == other.dtype:
        return torch.equal(one, other.to(one.device))
    eps = max(torch.finfo(tensor.dtype).eps for tensor in (one, other))
    for a, b in zip(one.split(ROWS), other.split(ROWS), strict=True):
        a, b = a.to(torch.float32), b.to(one.device, torch.float32)
        if not torch.allclose(a, b, rtol=eps, atol=SMALLEST):
            return False
    return True


def _refuse_conflicts(plan: ExtrasPlan, infos: Sequence[AdapterInfo], modules: Sequence[str]) -> None:
    """A module with LoRA factors in the merge can't be replaced as a whole, nor some rows of it."""
    whole = {extra.spec.module: extra for extra in plan.kept if extra.spec.kind == "module"}
    for extra in plan.kept:
        owner, who = extra.spec.module, infos[extra.tasks[0]].name
        if extra.spec.kind == "module":
            lora = next((name for name in modules if _inside(name, owner)), None)
        elif extra.spec.kind == "tokens":
            lora = next((name for name in modules if name == owner), None)
            around = next((name for name in whole if _inside(owner, name)), None)
            if around is not None:
                raise IncompatibleAdaptersError(
                    f"adapter '{who}' has trained tokens of '{owner}', which adapter '{infos[whole[around].tasks[0]].name}' has "
                    "trained in full: expected one of the two; choose one adapter's by its name, or 'drop'"
                )
        else:
            continue
        if lora is not None:
            raise IncompatibleAdaptersError(
                f"'{owner}' was trained {'in full' if extra.spec.kind == 'module' else 'token by token'} by adapter '{who}', and "
                f"'{lora}' has LoRA factors in this merge: there is no one rule for both; choose extras='drop', or adapters "
                "that agree"
            )


def _inside(path: str, owner: str) -> bool:
    return path == owner or path.startswith(owner + ".")

"""What the numbers mean, in plain words: which trouble to expect from merging, and what merging left of each adapter."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence

from dc_merge_peft.errors import preview
from dc_merge_peft.inspection.data import AdapterReport, Finding, Kept, PairReport, fixed
from dc_merge_peft.inspection.reading import Opened
from dc_merge_peft.sources.refusals import extras_without_policy
from dc_merge_peft.sources.renames import meeting_rename

# |CosSim| from here on is one adapter twice, up to rounding and a few more steps of training.
COPY = 0.99
# A norm this many times the median of the others has 16 times their energy, and decides what comes out.
DWARFS = 4.0
# Effective rank over true rank: above, smoothing changes next to nothing; below, a few directions carry the task.
FLAT, PEAKED = 0.95, 0.25
# Share of the magnitude of two adapters that cancels when they are added up.
CONFLICT = 0.2
# A task whose directions are partly gone, or whose DirSim is this much below the others'.
LOST, BEHIND = 0.9, 0.5
# Adapters that one finding names; with hundreds nobody would find its end.
NAMED = 5


def findings_before(
    opened: Sequence[Opened],
    adapters: Sequence[AdapterReport],
    pairs: Sequence[PairReport],
    *,
    allow_different_bases: bool,
    extras: str | None,
) -> Iterator[Finding]:
    """Every finding about adapters that are to be merged: refusals first, then warnings, then notes."""
    found = [
        *_refusals(adapters, allow_different_bases),
        *(_more_than_factors(opened, adapters) if extras is None else ()),
        *_damage(adapters),
        *_pairs(adapters, pairs),
        *_sizes(adapters),
        *_rooms(adapters),
        *_spectra(adapters),
        *_configs(opened, adapters),
    ]
    order = {"refused": 0, "warning": 1, "note": 2}
    yield from sorted(found, key=lambda finding: order[finding.level])


def _refusals(adapters: Sequence[AdapterReport], allow_different_bases: bool) -> Iterator[Finding]:
    for adapter in adapters:
        if adapter.problem is not None:
            yield Finding("refused", (adapter.name,), f"'{adapter.name}' can't be merged: {adapter.problem}")
    bases: dict[str, list[str]] = {}
    for adapter in adapters:
        if adapter.info.base_model:
            bases.setdefault(adapter.info.base_model.rstrip("/"), []).append(adapter.name)
    if len(bases) > 1:
        listing = "; ".join(f"'{base}' ({', '.join(names)})" for base, names in bases.items())
        advice = (
            "that is allowed here, as the same weights under two names"
            if allow_different_bases
            else "adapters of different models can't be merged. If these are the same weights under two names, allow different bases"
        )
        yield Finding(
            "note" if allow_different_bases else "refused",
            tuple(name for names in bases.values() for name in names),
            f"the adapters were trained on different base models: {listing}; {advice}",
        )
    yield from _misfits(adapters)


def _more_than_factors(opened: Sequence[Opened], adapters: Sequence[AdapterReport]) -> Iterator[Finding]:
    """Values outside B and A, which are refused until the caller says what becomes of them."""
    for source, adapter in zip(opened, adapters, strict=True):
        reason = source.source.extras_reason if source.source is not None else None
        if reason is not None:
            yield Finding("refused", (adapter.name,), str(extras_without_policy(adapter.name, reason)))


def _misfits(adapters: Sequence[AdapterReport]) -> Iterator[Finding]:
    """Modules of two shapes or types, and adapters without a module in common with the first."""
    readable = [adapter for adapter in adapters if adapter.modules]
    for index, adapter in enumerate(readable):
        for other in readable[:index]:
            shared = adapter.modules.keys() & other.modules.keys()
            differing = sorted(
                name
                for name in shared
                if (adapter.modules[name].shape, adapter.modules[name].layer_type)
                != (other.modules[name].shape, other.modules[name].layer_type)
            )
            if differing:
                yield Finding(
                    "refused",
                    (other.name, adapter.name),
                    f"'{other.name}' and '{adapter.name}' have different shapes or layer types in {len(differing)} modules "
                    f"({preview(differing)}): they belong to different base models",
                )
        others = [other for other in readable if other is not adapter]
        if index and not any(adapter.modules.keys() & other.modules.keys() for other in others):
            hints = (meeting_rename(adapter.modules, other.modules) for other in others if other.info.rename is None)
            hint = next(filter(None, hints), "was the base model loaded with another class?")
            yield Finding(
                "refused",
                (adapter.name,),
                f"'{adapter.name}' has no module in common with the others ({preview(adapter.modules, 2)}): there is nothing "
                f"to merge it with; {hint}",
            )


def _damage(adapters: Sequence[AdapterReport]) -> Iterator[Finding]:
    for adapter in adapters:
        damaged = {name: module.problem for name, module in adapter.modules.items() if module.problem}
        if damaged:
            count = f"{len(damaged)} of {len(adapter.modules)} modules can't be measured, the first because "
            yield Finding("refused", (adapter.name,), f"in '{adapter.name}' {count}{next(iter(damaged.values()))}")
        zero = [name for name, module in adapter.modules.items() if not module.S and not module.problem]
        if zero:
            text = f"'{adapter.name}' is all zero in {len(zero)} of {len(adapter.modules)} modules ({preview(zero)}): that is allowed here"
            yield Finding("note", (adapter.name,), text)


def _pairs(adapters: Sequence[AdapterReport], pairs: Sequence[PairReport]) -> Iterator[Finding]:
    for pair in pairs:
        first, second = adapters[pair.first].name, adapters[pair.second].name
        if pair.overall is None:
            continue
        cosine, conflict = pair.overall.cos_sim, pair.overall.sign_conflict
        if abs(cosine) >= COPY:
            what = (
                "are near copies: a sum counts their task twice, and dc loses many of its directions. Leave one out, or use average"
                if cosine > 0
                else "are near opposites: merging them cancels both. Was one negated on purpose?"
            )
            yield Finding("warning", (first, second), f"'{first}' and '{second}' (CosSim {cosine:.3f}) {what}")
        elif conflict >= CONFLICT:
            yield Finding(
                "warning",
                (first, second),
                f"'{first}' and '{second}' pull in opposite directions: {conflict:.0%} of their magnitude cancels when they "
                "are added up. Merge with sign election (dc or TIES, not a sum), and look at what is kept of each",
            )


def _sizes(adapters: Sequence[AdapterReport]) -> Iterator[Finding]:
    norms = {adapter.name: adapter.norm for adapter in adapters if adapter.norm > 0}
    for name, norm in norms.items():
        others = [other for key, other in norms.items() if key != name]
        if others and norm >= DWARFS * statistics.median(others):
            ratio = norm / statistics.median(others)
            yield Finding(
                "warning",
                (name,),
                f"'{name}' dwarfs the others: its norm {norm:.3g} is {ratio:.1f} times their median. With equal weights it "
                f"decides what comes out; with a weight of about {1 / ratio:.2g} it counts like the others",
            )


def _rooms(adapters: Sequence[AdapterReport]) -> Iterator[Finding]:
    """Modules too small for all directions, and modules that only some adapters have."""
    crowded: list[str] = []
    modules: dict[str, list[AdapterReport]] = {}
    for adapter in adapters:
        for name in adapter.modules:
            modules.setdefault(name, []).append(adapter)
    for name, holders in modules.items():
        parts = [holder.modules[name] for holder in holders]
        if sum(len(part.S) for part in parts) > min(parts[0].shape):
            crowded.append(name)
    if crowded:
        yield Finding(
            "warning",
            tuple(adapter.name for adapter in adapters),
            f"in {len(crowded)} of {len(modules)} modules ({preview(crowded)}) the directions of all adapters together are "
            "more than min(m, n): no orthonormal cover basis holds them, so that methods with one, such as dc, drop every adapter's weakest ones there. "
            "Merge fewer adapters at once, or expect to lose detail",
        )
    partial = [name for name, holders in modules.items() if len(holders) < sum(bool(a.modules) for a in adapters)]
    if partial:
        yield Finding(
            "note",
            tuple(adapter.name for adapter in adapters),
            f"{len(partial)} of {len(modules)} modules ({preview(partial)}) are in some of the adapters only: there the "
            "others have no say",
        )


def _spectra(adapters: Sequence[AdapterReport]) -> Iterator[Finding]:
    for adapter in adapters:
        # Of one direction alone there is no shape.
        shares = [module.effective_rank / len(module.S) for module in adapter.measured if len(module.S) > 1]
        share = statistics.median(shares) if shares else None
        if share is not None and share >= FLAT:
            yield Finding(
                "note",
                (adapter.name,),
                f"'{adapter.name}' has a flat spectrum (effective rank {share:.0%} of the rank): all its directions are about "
                "equally strong, as in hardly trained or already smoothed adapters; energy smoothing changes little",
            )
        elif share is not None and share <= PEAKED:
            yield Finding(
                "note",
                (adapter.name,),
                f"'{adapter.name}' has a peaked spectrum (effective rank {share:.0%} of the rank): a few directions carry the "
                "task. Energy smoothing changes much here and may lift noise: try smoothing 'none' beside 'linear'",
            )
        deficient = [module for module in adapter.measured if len(module.S) < module.rank]
        if deficient:
            yield Finding(
                "note",
                (adapter.name,),
                f"'{adapter.name}' uses fewer directions than its rank in {len(deficient)} of {len(adapter.modules)} modules: "
                "the rest is rounding noise and is dropped",
            )


def _configs(opened: Sequence[Opened], adapters: Sequence[AdapterReport]) -> Iterator[Finding]:
    for adapter in adapters:
        kinds = [*(["rsLoRA (alpha / sqrt(r))"] if adapter.rslora else []), *adapter.patterns]
        if kinds and adapter.problem is None:
            yield Finding(
                "note",
                (adapter.name,),
                f"'{adapter.name}' uses {' and '.join(kinds)}: the scaling of each module is folded in before anything else",
            )
    for entry in opened:
        missing = entry.info.targets.unmatched(entry.source.modules) if entry.source else []
        if missing:
            yield Finding(
                "note",
                (entry.info.name,),
                f"'{entry.info.name}' targets {preview(missing)} in its config but has no factors for it; if the base model "
                "has such modules, the checkpoint is incomplete",
            )
    dtypes = dict.fromkeys(adapter.dtype for adapter in adapters if adapter.dtype)
    if len(dtypes) > 1:
        yield Finding(
            "note",
            tuple(adapter.name for adapter in adapters),
            f"the adapters are stored as {', '.join(map(str, dtypes))}: the merged one gets the widest, unless you ask for "
            "another dtype",
        )


def findings_after(overall: Mapping[str, Kept], missing: Mapping[str, Sequence[str]]) -> Iterator[Finding]:
    """Every finding about what a merge kept of each adapter; ``missing`` are modules that the merge lacks."""
    for name, modules in missing.items():
        if modules:
            yield Finding(
                "warning",
                (name,),
                f"the merge has nothing for {len(modules)} modules of '{name}' ({preview(modules)}): they count as lost. Was "
                "it merged from these adapters?",
            )
    for name, kept in overall.items():
        others = [other.projected_dir_sim for key, other in overall.items() if key != name]
        if kept.strength <= 0:
            yield Finding(
                "warning",
                (name,),
                f"'{name}' is not in the merge or is opposed by it (strength {fixed(kept.strength, 2)}): its task is likely lost. "
                "Give it a larger weight, or look for an adapter that conflicts with it",
            )
        elif others and kept.projected_dir_sim < BEHIND * statistics.median(others):
            yield Finding(
                "warning",
                (name,),
                f"'{name}' keeps far less of its directions (projected DirSim {fixed(kept.projected_dir_sim, 2)}) than the others "
                f"(median {statistics.median(others):.2f}): it is the first to lose accuracy. Give it a larger weight",
            )
    lost = {name: kept.retained_energy for name, kept in overall.items() if kept.retained_energy < LOST}
    if lost:
        worst = sorted(lost.items(), key=lambda item: item[1])
        listing = ", ".join(f"{share:.0%} of '{name}'" for name, share in worst[:NAMED])
        rest = f" and at most {worst[-1][1]:.0%} of {len(worst) - NAMED} more" if len(worst) > NAMED else ""
        yield Finding(
            "warning",
            tuple(lost),
            f"the merge has lost directions: of the energy of {len(lost)} of {len(overall)} adapters it still holds only {listing}{rest}. "
            "Raise svd_rank, or let the method drop fewer entries (density, keep, ratio or drop, if it has one of these)",
        )

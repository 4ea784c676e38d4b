"""How a merged adapter names its target modules, so that PEFT wraps exactly the merged ones and no others."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Sequence

from dc_merge_peft.sources.patterns import LONGEST_PATTERN
from dc_merge_peft.sources.targeting import ALL_LINEAR, Targets

# From a specification to the modules that it wraps, found one by one: the first wrong one is enough to refuse it.
Resolve = Callable[[Targets], Iterable[str]]


def choose_targets(
    modules: Collection[str],
    sources: Sequence[tuple[Targets, bool]],
    resolve: Resolve | None = None,
) -> Targets:
    """The most readable specification that resolves to exactly ``modules``.

    Args:
        modules: Paths of the merged modules.
        sources: For each adapter its own specification, and whether its modules are exactly the merged ones.
        resolve: The modules of the base model that a specification wraps; without a base model at hand (``None``) only
            what is right for any model is used.

    Returns:
        The adapters' own specification, the union of their lists, the shortest unambiguous names, or a regular
        expression for the full paths: the first of these that is exact.
    """
    own = dict.fromkeys(spec for spec, complete in sources if complete)
    if resolve is not None:
        for spec in [*own, *_unions([spec for spec, _ in sources]), *_suffixes(modules)]:
            if spec.target_modules is not None and _are_all(resolve(spec), set(modules)):
                return spec
        paths, names = full_paths(modules), Targets(target_modules=frozenset(modules))
        return names if too_long(paths) and _are_all(resolve(names), set(modules)) else paths
    # Without the base model: an adapter's specification resolves there to the adapter's own modules, and a union of
    # specifications to the union. That holds where specification and modules agree; a name without a module may be one
    # whose factors the checkpoint has lost, a module without a name a layer that PEFT has tied to another one.
    for spec in [*own, *_unions([spec for spec, _ in sources])]:
        if spec.target_modules is not None and not spec.unmatched(modules) and all(map(spec.matches, modules)):
            return spec
    return full_paths(modules)


def too_long(spec: Targets) -> bool:
    """Whether its regular expression is longer than those that are read again."""
    return isinstance(spec.target_modules, str) and len(spec.target_modules) > LONGEST_PATTERN


def _are_all(found: Iterable[str], wanted: set[str]) -> bool:
    """Whether exactly the wanted ones are found."""
    right: set[str] = set()
    for name in found:
        if name not in wanted:
            return False
        right.add(name)
    return len(right) == len(wanted)


def full_paths(modules: Iterable[str]) -> Targets:
    """A regular expression that matches exactly these paths; layers that differ in one index alone share a group."""
    return Targets(target_modules="|".join(_groups(sorted(set(modules)))))


def _groups(modules: Sequence[str]) -> Iterable[str]:
    """Regexes of disjoint groups: same path around the first number, all of the same numbers."""
    indices: dict[tuple[str, str], list[str]] = {}
    for module in modules:
        match = re.match(r"(.*?(?:^|\.))(\d+)((?:\.|$).*)", module)
        head, index, tail = match.groups() if match else (module, "", "")
        indices.setdefault((head, tail), []).append(index)
    tails: dict[tuple[str, tuple[str, ...]], list[str]] = {}
    for (head, tail), numbers in indices.items():
        tails.setdefault((head, tuple(sorted(numbers, key=lambda n: (len(n), n)))), []).append(tail)
    for (head, numbers), endings in tails.items():
        yield re.escape(head) + _choice(numbers) + _choice(endings)


def _choice(options: Sequence[str]) -> str:
    escaped = [re.escape(option) for option in options]
    return escaped[0] if len(escaped) == 1 else f"(?:{'|'.join(escaped)})"


def _unions(specs: Sequence[Targets]) -> Iterable[Targets]:
    """All lists in one, or all regexes as alternatives; exclusions and layer choices can't be joined."""
    if any(spec.exclude_modules or spec.layers_to_transform is not None for spec in specs):
        return
    names = [spec.target_modules for spec in specs]
    if all(isinstance(part, frozenset) for part in names):
        yield Targets(target_modules=frozenset(name for part in names for name in part or ()))
    elif all(isinstance(part, str) and part != ALL_LINEAR for part in names):
        union = Targets(target_modules="|".join(f"(?:{part})" for part in dict.fromkeys(names)))
        yield from () if too_long(union) else (union,)


def _suffixes(modules: Collection[str]) -> Iterable[Targets]:
    """Names cut after the last number, then longer ones: whether they are unambiguous is for the caller to check."""
    for length in (1, 2, 3):
        yield Targets(target_modules=frozenset(".".join(module.split(".")[-length:]) for module in modules))

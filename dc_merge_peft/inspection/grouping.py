"""Module paths as a grid: which layer, and what kind of module in it. A 7B model has 224 modules in 32 layers of 7 kinds."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Place:
    """Where a module stands."""

    layer: str  # its numbers, as in "11" or "0.3", behind the name of its stack where there are several; "" without any
    kind: str  # what comes after the last number, as in "self_attn.q_proj", as short as it stays unique


def places(modules: Iterable[str]) -> dict[str, Place]:
    """The place of every module: stack after stack, layers in the order of their numbers, what is outside of layers last; all else in the
    order in which it is met."""
    split = {module: _split(module) for module in modules}
    stacks = list(dict.fromkeys(stack for stack, numbers, _ in split.values() if numbers))
    short = _shortened([kind for _, _, kind in split.values()])
    names = _shortened(stacks)

    def order(item: tuple[str, tuple[str, str, str]]) -> tuple[int, list[tuple[int, str]]]:
        stack, numbers, _ = item[1]
        # Files have layer 10 before layer 2, and the first adapter may lack some.
        return stacks.index(stack) if numbers else len(stacks), [(len(number), number) for number in numbers.split(".")]

    return {
        module: Place(
            " ".join(filter(None, (names[stack] if len(stacks) > 1 and numbers else "", numbers))), short[kind]
        )
        for module, (stack, numbers, kind) in sorted(split.items(), key=order)
    }


def _split(module: str) -> tuple[str, str, str]:
    """(what stands around the numbers, the numbers, what comes after the last one)."""
    parts = module.split(".")
    numbered = [index for index, part in enumerate(parts) if part.isdigit()]
    # A number at the very end names a module of a sequence, not a layer.
    numbered = [index for index in numbered if index < len(parts) - 1]
    if not numbered:
        return "", "", module
    stack = ".".join(part for index, part in enumerate(parts[: numbered[-1]]) if index not in numbered)
    return stack, ".".join(parts[index] for index in numbered), ".".join(parts[numbered[-1] + 1 :])


def _shortened(names: Iterable[str]) -> dict[str, str]:
    """Each name's shortest ending that no other one shares."""
    unique = list(dict.fromkeys(names))
    short = {}
    for name in unique:
        parts = name.split(".")
        endings = (".".join(parts[-count:]) for count in range(1, len(parts) + 1))
        short[name] = next(
            (end for end in endings if not any(o != name and f".{o}".endswith(f".{end}") for o in unique)), name
        )
    return short

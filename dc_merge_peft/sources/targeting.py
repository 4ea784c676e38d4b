"""Which modules of a base model an adapter's config means, by PEFT's rules."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from dc_merge_peft.sources.patterns import fits, layer_number

ALL_LINEAR = (
    "all-linear"  # PEFT's word for every linear layer but the head, which it writes out where it has seen the model
)


def _named(names: str | frozenset[str] | None, module: str) -> bool:
    if isinstance(names, str):
        return fits(names, module)
    return names is not None and any(end in names for end in _ends(module))


def _ends(module: str) -> Iterator[str]:
    """The whole path and its trailing parts."""
    yield module
    yield from (module[dot + 1 :] for dot, letter in enumerate(module) if letter == ".")


def ends_in(module: str, name: str) -> bool:
    """PEFT's rule for lists: a name is the whole path or its trailing parts."""
    return module == name or module.endswith(f".{name}")


@dataclass(frozen=True)
class Targets:
    """How an adapter's config says which modules of the base model it wraps."""

    target_modules: str | frozenset[str] | None = None  # a regex, or names
    exclude_modules: str | frozenset[str] | None = None
    layers_to_transform: tuple[int, ...] | int | None = None
    layers_pattern: str | tuple[str, ...] | None = None

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Targets:
        """The targeting fields of a LoRA config, hashable and comparable."""

        def names(value: Any) -> str | frozenset[str] | None:
            return value if isinstance(value, str) or value is None else frozenset(value) or None

        def sequence(value: Any) -> Any:
            return tuple(value) or None if isinstance(value, (list, tuple)) else value

        return cls(
            names(config.get("target_modules")),
            names(config.get("exclude_modules")),
            sequence(config.get("layers_to_transform")),
            sequence(config.get("layers_pattern")),
        )

    def matches(self, module: str) -> bool:
        """Whether PEFT wraps a module of this path, by its rule: the whole path for a regex, trailing parts for a list."""
        if _named(self.exclude_modules, module) or not _named(self.target_modules, module):
            return False
        if self.layers_to_transform is None or isinstance(self.target_modules, str):
            return True
        wanted = (self.layers_to_transform,) if isinstance(self.layers_to_transform, int) else self.layers_to_transform
        patterns = (self.layers_pattern,) if isinstance(self.layers_pattern, str) else self.layers_pattern
        numbers = (layer_number(pattern, module) for pattern in patterns or (None,))
        number = next((number for number in numbers if number is not None), None)
        return number is not None and int(number) in wanted

    def unmatched(self, modules: Collection[str]) -> list[str]:
        """Names in a list of target modules that none of these modules matches, by PEFT's rule for lists. Those that exclude_modules
        may cover are none: an excluded module has no factors. What a regex there covers can't be told from a name."""
        names = self.target_modules if isinstance(self.target_modules, frozenset) else ()
        if isinstance(self.exclude_modules, str):
            return []
        excluded = self.exclude_modules or frozenset()
        found = {end for module in modules for end in _ends(module) if end in names} if names else set()
        found |= {end for other in excluded for end in _ends(other) if end in names}
        return sorted(name for name in names if name not in found and not _named(excluded, name))

    def untargeted(self, modules: Collection[str]) -> list[str]:
        """Those of these modules that PEFT would not wrap; none where the config leaves the choice to PEFT."""
        if self.target_modules is None or self.target_modules == ALL_LINEAR:
            return []
        return [module for module in modules if not self.matches(module)]

    def to_config(self) -> dict[str, Any]:
        """The fields that are set, as plain JSON values."""

        def plain(value: Any) -> Any:
            if isinstance(value, frozenset):
                return sorted(value)
            return list(value) if isinstance(value, tuple) else value

        return {name: plain(value) for name, value in vars(self).items() if value is not None}

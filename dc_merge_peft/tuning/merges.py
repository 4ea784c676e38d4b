"""The merges of a search: one for each set of options, which alpha rescales."""

from __future__ import annotations

import warnings
from collections import OrderedDict
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dc_merge_peft.adapter import DCMergeAdapter
from dc_merge_peft.errors import MergeWarning, SourceError
from dc_merge_peft.merged import MergedAdapter
from dc_merge_peft.methods import Method, method_named
from dc_merge_peft.methods.options import without_effect
from dc_merge_peft.sources.base import AdapterInfo, Source
from dc_merge_peft.tuning.space import WEIGHT, Settings

KEPT = 8  # merges that are held at a time, in case a search comes back to them


@dataclass(frozen=True)
class Recipe:
    """A merge but for what is searched."""

    sources: tuple[str | Path | Source, ...]
    adapters: tuple[AdapterInfo, ...]
    method: Method
    weights: tuple[float, ...]
    svd_rank: int | None
    merge_options: Mapping[str, Any]  # everything else that merging takes

    def options(self, settings: Settings) -> dict[str, Any]:
        """The method's options with these settings, alpha too."""
        options = self.method.config.to_dict()
        return {name: settings.get(name, value) for name, value in options.items()}

    def weights_of(self, settings: Settings) -> tuple[float, ...]:
        """The weights with these settings."""
        whole = settings.get("weights", self.weights)
        pairs = zip(self.adapters, whole, strict=True)
        return tuple(settings.get(WEIGHT + info.name, weight) for info, weight in pairs)

    def rank_of(self, settings: Settings) -> int | None:
        """The largest rank with these settings."""
        return settings.get("svd_rank", self.svd_rank)


@dataclass(eq=False)
class Merges:
    """Merges on demand, each set of options once, as long as it is among the last :data:`KEPT` ones.

    ``alpha`` is a factor on the merged delta for every method: the engine applies it after the merge.
    """

    recipe: Recipe
    fitted: bool  # whether any trial wants alpha="auto", which takes a fit
    lazily: bool = False  # whether merges are written and not kept: see DCMergeAdapter.merging
    remarks: dict[str, None] = field(default_factory=dict)  # what the merges had to say, each once
    _held: OrderedDict[str, tuple[ExitStack, MergedAdapter]] = field(default_factory=OrderedDict)

    def merged(self, settings: Settings) -> MergedAdapter:
        """The merge with these settings.

        Raises:
            MergeError: they can't be merged.
        """
        merged = self._before_alpha({name: value for name, value in settings.items() if name != "alpha"})
        return merged if settings["alpha"] == "auto" else merged.with_alpha(settings["alpha"])

    def _before_alpha(self, settings: Settings) -> MergedAdapter:
        key = repr(sorted(settings.items()))
        if key not in self._held:
            while len(self._held) >= KEPT:
                self._held.popitem(last=False)[1][0].close()
            with ExitStack() as stack:
                merged = self._merge(stack, {**settings, "alpha": "auto" if self.fitted else 1.0})
                self._held[key] = (stack.pop_all(), merged)
            # A search tries rho beside smoothing=none, too, which is its own affair.
            idle = set(without_effect(method_named(merged.method, merged.options).config))
            self.remarks |= dict.fromkeys(remark for remark in merged.remarks if remark not in idle)
        self._held.move_to_end(key)
        return self._held[key][1]

    def _merge(self, stack: ExitStack, settings: Settings) -> MergedAdapter:
        recipe = self.recipe
        merger = DCMergeAdapter(method_named(recipe.method.name, recipe.options(settings)).config)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", MergeWarning)  # remarks are gathered
            merged = stack.enter_context(
                merger.merging(
                    recipe.sources,
                    recipe.weights_of(settings),
                    svd_rank=recipe.rank_of(settings),
                    lazily=self.lazily,
                    progress=False,
                    **recipe.merge_options,
                )
            )
        for before, now in zip(recipe.adapters, merged.adapters, strict=True):
            if before.fingerprint != now.fingerprint:
                raise SourceError(
                    f"the weights of adapter '{before.name}' have changed since the search began: expected the same for all trials; search "
                    "anew"
                )
        return merged

    def __enter__(self) -> Merges:
        return self

    def __exit__(self, *error: object) -> None:
        with ExitStack() as stack:
            for held, _ in self._held.values():
                stack.push(held)
            self._held.clear()

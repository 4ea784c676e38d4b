"""What a search has found."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from dc_merge_peft._version import __version__
from dc_merge_peft.errors import OutputError
from dc_merge_peft.merged import MergedAdapter
from dc_merge_peft.outputs.single import check_file, write_file
from dc_merge_peft.reading import Devices
from dc_merge_peft.runconfig import RunConfig, as_yaml
from dc_merge_peft.shown import MOST_ROWS, Shown, Table
from dc_merge_peft.sources.base import IN_MEMORY
from dc_merge_peft.tuning.merges import Merges, Recipe
from dc_merge_peft.tuning.space import Choices, Settings, Space, value_in_words

# The first line of a configuration that a search has written, by which it is known again.
MARK = "# found by dc-merge tune"
_EXAMPLE = "tuned.yaml"


@dataclass(frozen=True)
class Trial:
    """One candidate and what it is worth."""

    number: int  # from 1
    settings: Mapping[str, Any]  # one value a dimension of the search
    alpha: float  # the coefficient in force, which settings may have as "auto"
    score: float
    seconds: float  # to merge and to evaluate; 0 where the candidate was evaluated before

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        settings = {name: list(value) if isinstance(value, tuple) else value for name, value in self.settings.items()}
        return {
            "trial": self.number,
            "settings": settings,
            "alpha": self.alpha,
            "score": self.score,
            "seconds": round(self.seconds, 3),
        }


@dataclass(frozen=True, eq=False)
class TuneResult(Shown):
    """The trials of a search, in their order, and the best of them. A notebook shows the best ones as a table."""

    trials: tuple[Trial, ...]
    minimize: bool
    remarks: tuple[str, ...] = ()
    _recipe: Recipe = field(repr=False, kw_only=True)

    def __repr__(self) -> str:
        return f"TuneResult(trials={len(self.trials)}, minimize={self.minimize}, best={self.best})"

    def _shown(self) -> Iterable[Table | str]:
        return (self.table, *(f"note: {remark}" for remark in self.remarks))

    @property
    def table(self) -> Table:
        """The trials, best first, the first of equals before the others; those that have room."""
        ordered = sorted(self.trials, key=partial(_place, minimize=self.minimize))
        names = [name for name in self.best.settings if name != "alpha"]
        rows = [
            (
                trial.number,
                f"{trial.score:.6g}",
                f"{trial.alpha:.4g}{' (auto)' if trial.settings['alpha'] == 'auto' else ''}",
                *(value_in_words(trial.settings[name]) for name in names),
                f"{trial.seconds:.1f}",
            )
            for trial in ordered[:MOST_ROWS]
        ]
        whole = len(ordered) <= MOST_ROWS
        return Table(
            title=f"{len(ordered)} trials, best first" if whole else f"The best {MOST_ROWS} of {len(ordered)} trials",
            columns=("trial", "score", "alpha", *names, "seconds"),
            rows=rows,
            right=("trial", "score", "alpha", "seconds"),
        )

    @property
    def best(self) -> Trial:
        """The trial of the best score, the first of equals."""
        return best_of(self.trials, minimize=self.minimize)

    @property
    def config(self) -> RunConfig:
        """The best merge as a configuration, complete: every option of the method is in it."""
        return run_config(self._recipe, self.best.settings)

    def merge(self) -> MergedAdapter:
        """The best merge, made again: nothing of it was kept.

        Raises:
            MergeError: as for :meth:`DCMergeAdapter.merge`.
        """
        with self._merges(lazily=False) as merges:
            return merges.merged(self.best.settings)

    def save_pretrained(self, directory: str | Path, *, overwrite: bool = False) -> Path:
        """Merge the best candidate again and write it as a PEFT adapter directory, as :meth:`MergedAdapter.save_pretrained` does.

        Raises:
            OutputError: the directory exists (pass ``overwrite=True``), or can't be written.
        """
        with self._merges(lazily=True) as merges:
            return merges.merged(self.best.settings).save_pretrained(directory, overwrite=overwrite)

    def _merges(self, *, lazily: bool) -> Merges:
        return Merges(self._recipe, fitted=self.best.settings["alpha"] == "auto", lazily=lazily)

    def to_yaml(self, path: str | Path, *, overwrite: bool = False) -> Path:
        """Write the best merge as a configuration that ``dc-merge merge --config`` takes as it is.

        Args:
            path: The file.
            overwrite: Replace one that an earlier search has written.

        Raises:
            OutputError: it exists (pass ``overwrite=True``), is none of a search, can't be written, or an adapter is in memory, where no configuration can find it.
        """
        for info in self._recipe.adapters:
            if info.location == IN_MEMORY:
                raise OutputError(
                    f"adapter '{info.name}' is in memory: expected adapters in files, which a configuration can name; save it, or keep "
                    "the merged adapter itself (result.merge().save_pretrained(...))"
                )
        check_place(path, overwrite=overwrite)
        best = self.best
        record = {
            "dc_merge_peft": __version__,
            "tuned": {
                "score": best.score,
                "minimize": self.minimize,
                "trial": best.number,
                "trials": len(self.trials),
                "alpha": best.alpha,
            },
        }
        content = as_yaml({**self.config.to_dict(), "record": record})
        return write_file(path, f"{MARK}\n{content}".encode(), overwrite=overwrite, mark=MARK, example=_EXAMPLE)

    def plot(self, path: str | Path) -> Path:
        """Write a figure of the search as PNG or SVG, by the path's ending; needs the extra ``plots``.

        Raises:
            OptionError: another ending, or no matplotlib.
            OutputError: it can't be written.
        """
        from dc_merge_peft.plots import save_figure, tuning_figure

        rows = [(trial.settings, trial.alpha, trial.score) for trial in self.trials]
        return save_figure(tuning_figure(rows, self.trials.index(self.best), minimize=self.minimize), path)


def check_place(path: str | Path, *, overwrite: bool, inputs: Iterable[str | Path] = ()) -> None:
    """Refuse a place where the configuration of a search can't go; arguments as for :func:`check_file`.

    Raises:
        OutputError: something stands there, or it is no place.
    """
    check_file(path, overwrite=overwrite, mark=MARK, example=_EXAMPLE, inputs=inputs)


def best_of(trials: Iterable[Trial], *, minimize: bool) -> Trial:
    """The first trial of the best score."""
    return min(trials, key=partial(_place, minimize=minimize))


def _place(trial: Trial, *, minimize: bool) -> tuple[float, int]:
    """By which trials are sorted, best first."""
    return (trial.score if minimize else -trial.score, trial.number)


def run_config(recipe: Recipe, settings: Settings) -> RunConfig:
    """One candidate as a configuration."""
    extra = recipe.merge_options
    base, dtype, device = (extra.get(name) for name in ("base", "dtype", "device"))
    return RunConfig(
        adapters=tuple(info.whole_location for info in recipe.adapters),
        weights=recipe.weights_of(settings),
        method=recipe.method.name,
        options=recipe.options(settings),
        rename=extra.get("rename"),
        svd_rank=recipe.rank_of(settings),
        dtype=str(dtype).removeprefix("torch.") if isinstance(dtype, (str, torch.dtype)) else None,
        device=_named(device),
        base=None if base is None else base.location,
        dora_rank=extra.get("dora_rank"),
        extras=extra.get("extras"),
        allow_different_bases=bool(extra.get("allow_different_bases")),
        allow_zero=bool(extra.get("allow_zero")),
    )


def _named(device: Devices) -> str | None:
    """One device or several, as configurations name them."""
    if device is None or isinstance(device, (str, torch.device)):
        return None if device is None else str(device)
    return ",".join(map(str, device))


def flat_remark(trials: Sequence[Trial]) -> str | None:
    """That candidates of other settings are all worth the same, so that the first of them is called the best by chance."""
    scores, first = {trial.score for trial in trials}, trials[0]
    if len(scores) > 1 or all(trial.settings == first.settings for trial in trials):
        return None
    return (
        f"all {len(trials)} trials scored {first.score:.6g}: the search says nothing, and the best is the first of them; check that the "
        "evaluation reads the candidate that it is given, and can tell candidates apart"
    )


def edge_remark(space: Space, trials: Sequence[Trial], *, minimize: bool) -> str | None:
    """That the best alpha is the first or last of those tried, so that there may be better ones beyond."""
    found, best = space.dimensions["alpha"], best_of(trials, minimize=minimize).settings["alpha"]
    values = found.values if isinstance(found, Choices) else (found.low, found.high)
    tried = [value for value in values if value != "auto"]
    flat = len({trial.score for trial in trials}) == 1
    if flat or best == "auto" or len(tried) < 3 or best not in (min(tried), max(tried)):
        return None
    where, beyond = ("largest", "larger") if best == max(tried) else ("smallest", "smaller")
    return f"the best alpha, {best:g}, is the {where} that was tried: {beyond} ones may be better (alphas, --alphas)"

"""A search from what users say to its trials: everything is checked first, then trial after trial is merged and evaluated."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dc_merge_peft.adapter import DCMergeAdapter
from dc_merge_peft.errors import MergeError, OptionError, OutputError
from dc_merge_peft.methods import method_named
from dc_merge_peft.plan import MergePlan
from dc_merge_peft.progress import Progress
from dc_merge_peft.reading import checked_devices
from dc_merge_peft.sizes import checked_size
from dc_merge_peft.sources import Source
from dc_merge_peft.sources.base import IN_MEMORY
from dc_merge_peft.sources.base_model import BaseModel
from dc_merge_peft.tuning.evaluation import CommandEvaluation, Evaluate, checked_score
from dc_merge_peft.tuning.journal import Journal, opened
from dc_merge_peft.tuning.merges import Merges, Recipe
from dc_merge_peft.tuning.outcome import Trial, TuneResult, edge_remark, flat_remark
from dc_merge_peft.tuning.sampling import Grid, Sampler, optuna_version, sampler_for
from dc_merge_peft.tuning.space import Choices, Settings, Space, read_space, value_in_words
from dc_merge_peft.tuning.staging import from_model, staged
from dc_merge_peft.tuning.stamps import header

if TYPE_CHECKING:
    from torch import nn

# What merging takes beyond a plan.
_ENGINE = ("device", "allow_zero", "max_memory")


@dataclass(frozen=True, eq=False)
class Search:
    """A search that has passed every check that needs no factors."""

    recipe: Recipe
    plan: MergePlan
    space: Space
    sampler: Sampler  # used up by one run
    seed: int
    minimize: bool

    @property
    def total(self) -> int:
        """Trials."""
        return self.sampler.total

    def settings(self) -> list[Settings] | None:
        """Those of every trial, in order; None where they depend on scores."""
        return list(self.space.grid()) if isinstance(self.sampler, Grid) else None

    def header(self, evaluate: object) -> dict[str, Any]:
        """What a journal of this search says about it."""
        asked = {} if isinstance(self.sampler, Grid) else {"seed": self.seed, "optuna": optuna_version()}
        command = evaluate.command if isinstance(evaluate, CommandEvaluation) else None
        search = {"search": self.sampler.name, **asked, "minimize": self.minimize, "command": command}
        return header(self.recipe, self.plan, self.space, search)

    def run(
        self, evaluate: Evaluate, progress: Progress, journal: Journal | None = None, model: nn.Module | None = None
    ) -> TuneResult:
        """All trials.

        Raises:
            MergeError: a candidate can't be merged, or its evaluation gives no number.
            OutputError: the journal is of other trials, or can't be written.
        """
        tried: dict[str, Trial] = {}
        found = iter(journal.found if journal is not None else ())
        # What a program evaluates is written and not kept.
        lazily = isinstance(evaluate, CommandEvaluation)
        trials: list[Trial] = []
        with (
            Merges(self.recipe, fitted=self._fitted, lazily=lazily) as merges,
            staged(evaluate, model) as on_stage,
        ):
            for number in progress(range(1, self.total + 1), "trials"):
                settings = self.sampler.ask()
                trial = _recorded(next(found, None), number, settings, journal)
                if trial is None:
                    trial = _again(tried, number, settings) or self._tried(number, settings, merges, on_stage)
                    if journal is not None:
                        journal.add(trial.to_dict())
                tried.setdefault(_key(settings), trial)
                self.sampler.tell(trial.score)
                trials.append(trial)
        seen = (flat_remark(trials), edge_remark(self.space, trials, minimize=self.minimize))
        remarks = (*merges.remarks, *filter(None, seen))
        return TuneResult(tuple(trials), self.minimize, remarks, _recipe=self.recipe)

    @property
    def _fitted(self) -> bool:
        return any(value == "auto" for value in getattr(self.space.dimensions["alpha"], "values", ()))

    def _tried(self, number: int, settings: Settings, merges: Merges, evaluate: Evaluate) -> Trial:
        start = time.perf_counter()
        with _naming(number, settings):
            merged = merges.merged(settings)
            score = checked_score(evaluate(merged), "the evaluation gave")
        return Trial(number, settings, merged.alpha, score, time.perf_counter() - start)


def prepare(
    sources: Sequence[str | Path | Source],
    space: Mapping[str, Any] | None = None,
    *,
    merger: DCMergeAdapter | None = None,
    alphas: Sequence[Any] | None = None,
    weights: Sequence[float] | None = None,
    svd_rank: int | None = None,
    minimize: bool = False,
    search: str = "auto",
    trials: int | None = None,
    seed: int = 0,
    model: nn.Module | None = None,
    **merge_options: Any,
) -> Search:
    """Everything that :func:`tune` checks before it reads factors, for the same arguments: a dry run.

    Raises:
        MergeError: as :func:`tune`.
    """
    merger = DCMergeAdapter() if merger is None else merger
    if not isinstance(merger, DCMergeAdapter):
        raise OptionError(f"merger is {merger!r}: expected a DCMergeAdapter, as in DCMergeAdapter(method='ta')")
    _refuse_unknown(merge_options)
    token = merge_options.get("token")
    options = {**merge_options, "base": BaseModel.of(merge_options.get("base"), token)}
    checked_devices(options.get("device"))
    if options.get("max_memory") is not None:
        checked_size(options["max_memory"], "max_memory")
    reading = {name: options[name] for name in ("dora_rank", "device", "allow_zero") if name in options}
    opened_sources = from_model(sources, model, **reading)
    planned = {name: value for name, value in options.items() if name not in _ENGINE}
    plan = merger.plan(opened_sources, weights, svd_rank=svd_rank, **planned)
    # By its commit a Hub adapter is the same in every merge.
    pinned = tuple(
        source if isinstance(source, Source) or info.location == IN_MEMORY else info.whole_location
        for source, info in zip(opened_sources, plan.adapters, strict=True)
    )
    recipe = Recipe(pinned, plan.adapters, merger.method, plan.weights, svd_rank, options)
    found = read_space(space, merger.method, plan.adapters, alphas)
    sampler = sampler_for(found, search, trials, seed, minimize=minimize)
    _refuse_values(recipe, plan, found, whole=isinstance(sampler, Grid))
    return Search(recipe, plan, found, sampler, seed, minimize)


@contextmanager
def journal_of(
    search: Search, evaluate: Evaluate, path: str | Path | None, *, resume: bool, overwrite: bool
) -> Iterator[Journal | None]:
    """The journal of a search, where one is wanted.

    Raises:
        OptionError: ``resume`` without a journal or together with ``overwrite``, or an adapter that no journal can know again.
        OutputError: see :func:`dc_merge_peft.tuning.journal.opened`.
    """
    if resume and overwrite:
        raise OptionError("found resume and overwrite: expected one of them, going on with a journal or replacing it")
    if path is None:
        if resume:
            raise OptionError("found resume without a journal: expected the file of the earlier search (journal=...)")
        yield None
        return
    with opened(path, search.header(evaluate), resume=resume, overwrite=overwrite) as journal:
        yield journal


def _refuse_values(recipe: Recipe, plan: MergePlan, space: Space, *, whole: bool) -> None:
    """Values with which these adapters can't be merged: of a space that is searched whole in every combination, of others, which may
    have any number of those, each by itself, of ranges the ends."""
    modules = {(module.shape, module.ranks) for module in plan.modules}
    names = recipe.method.config.to_dict().keys() - {"alpha"}
    of_options = {name: found for name, found in space.dimensions.items() if name in names}
    values = {
        name: found.values if isinstance(found, Choices) else (found.low, found.high)
        for name, found in of_options.items()
    }
    fixed = {name: found[0] for name, found in values.items() if len(found) == 1}
    each = ({**fixed, name: value} for name, found in values.items() for value in found)
    for settings in Space(of_options).grid() if whole else each:
        method = method_named(recipe.method.name, recipe.options(settings))
        for shape, ranks in modules:
            try:
                method.check(shape, ranks)
            except OptionError as error:
                raise OptionError(f"the search space has {in_words(settings)}: {error}") from error


def _refuse_unknown(options: Mapping[str, Any]) -> None:
    known = {
        "dtype", "device", "allow_different_bases", "allow_zero", "rename", "base", "dora_rank", "extras", "token",
        "max_memory",
    }  # fmt: skip
    for name in options:
        if name not in known:
            raise OptionError(f"tune has no argument '{name}': expected one of {', '.join(sorted(known))}")


def _recorded(line: Mapping[str, Any] | None, number: int, settings: Settings, journal: Journal | None) -> Trial | None:
    """The trial as a journal has it."""
    if line is None or journal is None:
        return None
    values: list[Any] = [line.get(name) for name in ("alpha", "score", "seconds")]
    alpha, score, seconds = values
    finite = all(isinstance(value, float) and math.isfinite(value) for value in values)
    trial = Trial(number, settings, alpha, score, seconds) if finite else Trial(number, settings, 0.0, 0.0, 0.0)
    again = "expected the journal as dc-merge tune has left it; start anew, with another output or --overwrite"
    if line.get("settings") != (expected := trial.to_dict()["settings"]):
        raise OutputError(
            f"trial {number} in the journal '{journal.path}' has the settings {line.get('settings')}, in this search {expected}: {again}"
        )
    if {**trial.to_dict(), "seconds": seconds} != line or settings["alpha"] not in ("auto", alpha):
        raise OutputError(
            f"trial {number} in the journal '{journal.path}' has alpha {alpha!r}, score {score!r} and seconds {seconds!r}, or more than "
            f"those: {again}"
        )
    return trial


def _again(tried: Mapping[str, Trial], number: int, settings: Settings) -> Trial | None:
    """A candidate that was evaluated before has the score that it had."""
    before = tried.get(_key(settings))
    return None if before is None else Trial(number, settings, before.alpha, before.score, 0.0)


def _key(settings: Settings) -> str:
    return repr(sorted(settings.items()))


@contextmanager
def _naming(number: int, settings: Settings) -> Iterator[None]:
    """Errors of a trial say of which."""
    try:
        yield
    except MergeError as error:
        raise type(error)(f"trial {number} ({in_words(settings)}): {error}") from error


def in_words(settings: Settings) -> str:
    """``smoothing none, alpha 0.5``."""
    return ", ".join(f"{name} {value_in_words(value)}" for name, value in settings.items())

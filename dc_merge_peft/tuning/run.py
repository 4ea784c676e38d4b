"""``tune``: choosing alpha, task weights and options against a user's evaluation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dc_merge_peft.adapter import DCMergeAdapter
from dc_merge_peft.errors import OptionError, warn
from dc_merge_peft.progress import progress_bar
from dc_merge_peft.sources import Source
from dc_merge_peft.tuning.evaluation import Evaluate
from dc_merge_peft.tuning.outcome import TuneResult
from dc_merge_peft.tuning.search import journal_of, prepare

if TYPE_CHECKING:
    from torch import nn


def tune(
    sources: Sequence[str | Path | Source],
    evaluate: Evaluate,
    space: Mapping[str, Any] | None = None,
    *,
    merger: DCMergeAdapter | None = None,
    alphas: Sequence[float | str] | None = None,
    weights: Sequence[float] | None = None,
    svd_rank: int | None = None,
    minimize: bool = False,
    search: str = "auto",
    trials: int | None = None,
    seed: int = 0,
    model: nn.Module | None = None,
    journal: str | Path | None = None,
    resume: bool = False,
    overwrite: bool = False,
    progress: bool | None = None,
    **merge_options: Any,
) -> TuneResult:
    """Merge adapters with many settings, evaluate each, and return the best.

    Each set of options is merged once; other values of alpha rescale that merge, which is exact for every method.

    Args:
        sources: As for :meth:`DCMergeAdapter.merge`; with a ``PeftModel`` also names of its adapters.
        evaluate: Returns a finite number for a candidate: for a :class:`MergedAdapter`, or with ``model`` for the ``PeftModel``
            in which the candidate is the active adapter. The same candidate is never evaluated twice.
        space: What to search besides alpha: for each option of the method, ``svd_rank`` or ``weights`` a list of values, or a
            range ``{"min": 0.5, "max": 2.0}`` with a ``"step"`` or ``"log": True``. ``weights`` takes a list of whole lists, a
            range for every adapter, or values under an adapter's name. ``alpha`` may be here too.
        merger: The method, and the options that are not searched; DC-Merge with its defaults by default. Its alpha is not used.
        alphas: Values of alpha, of which one may be ``"auto"``; the paper's 0.1, 0.2 .. 3.0 by default.
        weights: If not searched: one finite number per adapter, 1 for each by default.
        svd_rank: If not searched: maximum rank of the merged adapter.
        minimize: Whether lower scores are better, as for a loss.
        search: ``"grid"`` for all settings, ``"optuna"`` for those that its seeded sampler picks, or ``"auto"``: a grid of
            at most 300 trials (or ``trials``), otherwise optuna, which needs the extra ``tune``.
        trials: Maximum number of trials for optuna; 50 by default.
        seed: Seed for optuna.
        model: A ``PeftModel`` or a base model in memory, into which each candidate is put; at the end it is as before.
        journal: A file for finished trials, one JSON line each. Without it nothing is written.
        resume: Reuse the trials of a journal of the same inputs and settings.
        overwrite: Replace a journal.
        progress: Show a progress bar; by default only on a terminal.
        **merge_options: ``dtype``, ``device``, ``max_memory``, ``allow_different_bases``, ``allow_zero``, ``rename``, ``base``, ``dora_rank``,
            ``extras`` and ``token``, as for :meth:`DCMergeAdapter.merge`.

    Returns:
        The trials and the best of them.

    Raises:
        OptionError: a wrong argument, or a setting that the method does not take.
        EvaluationError: ``evaluate`` returns no finite number. Errors that it raises pass through. The journal keeps the
            earlier trials.
        OutputError: the journal belongs to another search, or exists unexpectedly; a candidate does not fit into the model.
        MergeError: adapters that can't be merged, as for :meth:`DCMergeAdapter.merge`, or not with one of the settings.

    Examples:
        >>> def accuracy(merged):
        ...     return measure(merged.add_to(load_base()))
        >>> result = tune(["org/lora-a", "./lora-b"], accuracy, {"smoothing": ["none", "linear"]})  # doctest: +SKIP
        >>> result.best.settings, result.best.score  # doctest: +SKIP
        >>> result.to_yaml("tuned.yaml")  # doctest: +SKIP
    """
    if not callable(evaluate):
        raise OptionError(
            f"found a {type(evaluate).__name__} in the place of evaluate: expected a function that takes a merged adapter (or the model with "
            "it, where one is given) and gives its score"
        )
    prepared = prepare(
        sources, space, merger=merger, alphas=alphas, weights=weights, svd_rank=svd_rank, minimize=minimize, search=search,
        trials=trials, seed=seed, model=model, **merge_options,
    )  # fmt: skip
    with journal_of(prepared, evaluate, journal, resume=resume, overwrite=overwrite) as opened:
        result = prepared.run(evaluate, progress_bar(progress, "trial"), opened, model)
    for remark in result.remarks:
        warn(remark)
    return result

"""Choosing alpha, task weights and options against a user's evaluation."""

from __future__ import annotations

from dc_merge_peft.tuning.evaluation import CommandEvaluation
from dc_merge_peft.tuning.outcome import Trial, TuneResult
from dc_merge_peft.tuning.run import tune
from dc_merge_peft.tuning.search import Search, prepare
from dc_merge_peft.tuning.space import ALPHAS

__all__ = ["ALPHAS", "CommandEvaluation", "Search", "Trial", "TuneResult", "prepare", "tune"]

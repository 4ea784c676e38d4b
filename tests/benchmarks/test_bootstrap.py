"""Averages and their intervals."""

from __future__ import annotations

import pytest
from accuracy.bootstrap import Resampling, by_seed, mean_accuracy, mean_difference, mean_normalized

OWN = [{"a": "1111111100", "b": "1111100000"}]
MERGED = [{"a": "1111000000", "b": "1010100000"}]


def test_averages_are_those_of_the_data() -> None:
    """0.4 of 0.8 and 0.3 of 0.5; the mean of several seeds is that of their accuracies."""
    resampling = Resampling({"a": 10, "b": 10})
    own, merged = resampling.accuracies(OWN), resampling.accuracies(MERGED)
    assert mean_accuracy(merged).value == pytest.approx(0.35)
    assert mean_normalized(merged, own).value == pytest.approx((0.5 + 0.6) / 2)
    both = resampling.accuracies([MERGED[0], OWN[0]])
    assert mean_accuracy(both).value == pytest.approx((0.35 + 0.65) / 2)
    assert by_seed(both, resampling.accuracies([OWN[0], OWN[0]])) == pytest.approx([0.55, 1.0])


def test_interval_is_that_of_a_binomial() -> None:
    """Of 400 examples, a quarter right: 1.96 standard errors to each side."""
    hits = [{"a": "1000" * 100}]
    interval = mean_accuracy(Resampling({"a": 400}).accuracies(hits))
    error = 1.96 * (0.25 * 0.75 / 400) ** 0.5
    assert interval.low == pytest.approx(0.25 - error, abs=0.006)
    assert interval.high == pytest.approx(0.25 + error, abs=0.006)


def test_differences_are_paired() -> None:
    """A model differs from itself by nothing in every draw, and its own adapters normalise to one; where it is wrong on two
    examples more, it is never better."""
    resampling = Resampling({"a": 10, "b": 10})
    own, merged = resampling.accuracies(OWN), resampling.accuracies(MERGED)
    same = mean_difference(merged, resampling.accuracies(MERGED), own)
    assert (same.value, same.low, same.high) == (0.0, 0.0, 0.0)
    assert mean_normalized(own, own).low == mean_normalized(own, own).high == 1.0
    assert mean_difference(merged, own, own).high < 0


def test_few_examples_have_draws_without_a_hit() -> None:
    """In these the own adapter is not never right: one of four examples is not drawn in a third of all draws."""
    resampling = Resampling({"a": 4, "b": 4})
    own = resampling.accuracies([{"a": "1000", "b": "1111"}])
    merged = resampling.accuracies([{"a": "0111", "b": "1111"}])
    found = mean_normalized(merged, own)
    assert found.value == 2.0 and 0.5 <= found.low < found.high <= (1 / (0.25 / 2) + 1) / 2


def test_draws_are_the_same_each_time() -> None:
    """Another resampling of the same sizes gives the same interval."""
    first, second = (mean_accuracy(Resampling({"a": 10, "b": 10}).accuracies(MERGED)) for _ in range(2))
    assert first == second and first.low < first.value < first.high

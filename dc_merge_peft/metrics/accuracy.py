"""What merging keeps of accuracies: the two normalised scores of the paper's tables and figures."""

from __future__ import annotations

from collections.abc import Sequence

from dc_merge_peft.errors import OptionError


def average_normalized_accuracy(merged: Sequence[float], individual: Sequence[float]) -> float:
    """The mean over tasks of merged accuracy over the task's own adapter's (Eq. 29).

    Args:
        merged: Accuracy of the merged model on each of T tasks.
        individual: Accuracy of each task's own model, above 0.

    Returns:
        1 where merging costs nothing.

    Raises:
        OptionError: no tasks, different lengths, or an individual accuracy of 0.
    """
    if not merged or len(merged) != len(individual) or not all(individual):
        raise OptionError(
            f"found {len(merged)} merged and {len(individual)} individual accuracies: expected one of each for every task, "
            "and none of the individual ones 0"
        )
    return sum(ours / own for ours, own in zip(merged, individual, strict=True)) / len(merged)


def normalized_accuracy_improvement(merged: float, individual: float, zero_shot: float) -> float:
    """NAI of one task: the share of fine-tuning's gain over the base model that merging keeps (Eq. 30).

    Args:
        merged: Accuracy of the merged model on the task.
        individual: Of the task's own model.
        zero_shot: Of the base model.

    Returns:
        1 where everything is kept, 0 at the base model's accuracy, below 0 under it.

    Raises:
        OptionError: fine-tuning changed nothing, so that there is nothing to compare with.
    """
    if individual == zero_shot:
        raise OptionError(f"individual and zero-shot accuracy are both {individual}: expected a task that was learned")
    return (merged - zero_shot) / (individual - zero_shot)

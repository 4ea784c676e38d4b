"""Statistics of the tasks' own data, for the methods that need them: collected from a model and a dataloader, kept in files.

Each task's statistics come from its own fine-tuned model on its own examples: a PEFT model with that task's adapter active, or any
model with the task's weights in it. A merge then takes one of them an adapter, in the adapters' order:

    >>> from dc_merge_peft import DCMergeAdapter, statistics
    >>> grams = statistics.input_grams(model, loader, examples=256)  # doctest: +SKIP
    >>> statistics.save(grams, "math-grams.safetensors")  # doctest: +SKIP
    >>> merger = DCMergeAdapter(method="regmean", statistics=["math-grams.safetensors", code_grams])  # doctest: +SKIP
"""

from __future__ import annotations

from dc_merge_peft.methods.data import Statistics
from dc_merge_peft.statistics.files import load, save
from dc_merge_peft.statistics.gradients import fisher, next_token_loss
from dc_merge_peft.statistics.inputs import input_grams

__all__ = ["Statistics", "fisher", "input_grams", "load", "next_token_loss", "save"]

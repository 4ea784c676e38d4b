"""What a dataloader gives: model inputs and labels in the shapes that transformers and torch know, on the model's device."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from dc_merge_peft.errors import OptionError

LABELS = ("labels", "label")
# From a model and a batch to what the model says about it.
Forward: TypeAlias = Callable[[nn.Module, Any], Any]


def inputs_of(batch: Any) -> Any:
    """A batch without its labels: a mapping without theirs, or the first part of a pair."""
    inputs = batch[0] if isinstance(batch, (tuple, list)) and batch else batch
    if isinstance(inputs, Mapping):
        return {name: value for name, value in inputs.items() if name not in LABELS}
    return inputs


def labels_of(batch: Any) -> Tensor:
    """The labels of a batch: those of a mapping, or the second part of a pair.

    Raises:
        OptionError: it has none.
    """
    found = None
    if isinstance(batch, (tuple, list)) and len(batch) > 1:
        found = batch[1]
    elif isinstance(batch, Mapping):
        found = next((batch[name] for name in LABELS if name in batch), None)
    if not isinstance(found, Tensor):
        raise OptionError(
            f"found a batch ({type(batch).__name__}) without labels: expected a mapping with 'labels', or a pair of inputs and labels; "
            "give loss= for data of another form"
        )
    return found


def call(model: nn.Module, batch: Any) -> Any:
    """The model on a batch's inputs."""
    inputs = inputs_of(batch)
    return model(**inputs) if isinstance(inputs, Mapping) else model(inputs)


def padding_mask(batch: Any) -> Tensor | None:
    """The (examples, tokens) attention mask of a batch, where it has one."""
    inputs = inputs_of(batch)
    mask = inputs.get("attention_mask") if isinstance(inputs, Mapping) else None
    return mask if isinstance(mask, Tensor) and mask.ndim == 2 else None


def moved(batch: Any, device: torch.device | None) -> Any:
    """A batch with its tensors on a device; as it is where there is none."""
    if device is None:
        return batch
    if isinstance(batch, Tensor):
        return batch.to(device)
    if isinstance(batch, Mapping):
        return {name: moved(value, device) for name, value in batch.items()}
    if isinstance(batch, (tuple, list)):
        values = [moved(value, device) for value in batch]
        return type(batch)(*values) if hasattr(batch, "_fields") else type(batch)(values)  # a tuple with names
    return batch


@contextmanager
def evaluating(model: nn.Module, dataloader: Iterable[Any]) -> Iterator[Iterator[Any]]:
    """The batches, on the model's device, with the model in evaluation mode for as long as they are looked at: dropout would make
    statistics of another model, and examples must not meet in a batch norm."""
    modes = {module: module.training for module in model.modules()}
    device = next((parameter.device for parameter in model.parameters()), None)
    model.eval()
    try:
        yield (moved(batch, None if device is None or device.type == "meta" else device) for batch in dataloader)
    finally:
        for module, mode in modes.items():
            module.training = mode


def checked_count(examples: int | None) -> int | None:
    """How many examples at most.

    Raises:
        OptionError: no such number.
    """
    if examples is not None and (isinstance(examples, bool) or not isinstance(examples, int) or examples < 1):
        raise OptionError(f"examples is {examples!r}: expected a whole number of at least 1, or none for all of them")
    return examples


def nothing_seen() -> OptionError:
    """The dataloader was empty."""
    return OptionError("the dataloader gave no examples: expected at least one; is it an iterator that was used up?")

"""Where a candidate is put to be evaluated: nowhere, or into a model in memory, which is as before in the end."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dc_merge_peft.errors import OptionError
from dc_merge_peft.merged import MergedAdapter
from dc_merge_peft.paths import is_dir
from dc_merge_peft.reading import Devices, checked_devices
from dc_merge_peft.sources.base import Source
from dc_merge_peft.sources.dora import DoraReading, DoraSource
from dc_merge_peft.sources.opening import listed
from dc_merge_peft.tuning.evaluation import Evaluate

if TYPE_CHECKING:
    from torch import nn

NAME = "candidate"  # of the adapter in the model


@contextmanager
def staged(evaluate: Evaluate, model: nn.Module | None) -> Iterator[Evaluate]:
    """``evaluate`` for merged adapters: as it is, or given the PEFT model with the candidate as its active adapter.

    Args:
        evaluate: The user's function.
        model: A ``PeftModel``, or a base model, which is wrapped in one for as long as the block lasts.

    Raises:
        OptionError: what is no model, holds an adapter of the candidate's name, or has its adapters disabled.
        OutputError: the candidate does not fit into the model.
    """
    if model is None:
        yield evaluate
        return
    from dc_merge_peft.outputs.live import check_name, install, write_factors
    from dc_merge_peft.outputs.live_state import AttentionWeights, PlainState, TunerState

    tuner: Any = tuner_of(model)
    check_name(NAME, tuner.peft_config if tuner is not None else ())
    _refuse_disabled(model)
    before = PlainState(model) if tuner is None else TunerState(tuner)
    attentions = AttentionWeights(model)
    there: MergedAdapter | None = None
    wrapped: Any = model if tuner is not None else None
    active: Any = getattr(model, "active_adapter", None)

    def on_stage(merged: MergedAdapter) -> float:
        nonlocal there, wrapped
        attentions.restore()
        if there is not None and there.modules is merged.modules:  # the same merge at another alpha
            write_factors(merged, wrapped.base_model.model, NAME)
        else:
            take_down()
            wrapped = install(merged, model, NAME, activate=True)
        there = merged
        return evaluate(wrapped)

    def take_down() -> None:
        nonlocal there
        if isinstance(before, TunerState):
            before.remove(NAME)
            before.settle()
        elif there is not None:
            before.restore()
        there = None

    try:
        yield on_stage
    finally:
        take_down()
        attentions.restore()
        if tuner is not None:
            with suppress(AttributeError):  # a mixed model asks its tuner
                model.active_adapter = active


def _refuse_disabled(model: nn.Module) -> None:
    """Where adapters are disabled, every candidate would be, and have the base model's score."""
    from peft.tuners.trainable_tokens import TrainableTokensLayer
    from peft.tuners.tuners_utils import BaseTunerLayer

    for name, module in model.named_modules():
        # Before version 0.18 of PEFT the layers around tokens are disabled where they are not active.
        if (
            isinstance(module, BaseTunerLayer)
            and module.disable_adapters
            and not isinstance(module, TrainableTokensLayer)
        ):
            raise OptionError(
                f"the adapters of the model are disabled, as in '{name}', so that no candidate would act: expected enabled ones; "
                "call tune outside of disable_adapter(), or model.base_model.enable_adapter_layers() first"
            )


def tuner_of(model: nn.Module) -> nn.Module | None:
    """What holds the adapters of a ``PeftModel``; None of a base model.

    Raises:
        OptionError: it is no model, or something around a ``PeftModel``.
    """
    from peft import PeftMixedModel, PeftModel
    from torch import nn

    from dc_merge_peft.outputs.live import refuse_around_peft

    if not isinstance(model, nn.Module):
        raise OptionError(
            f"found a {type(model).__name__} as the model: expected a PeftModel or a base model in memory"
        )
    if isinstance(model, (PeftModel, PeftMixedModel)):
        return model.base_model
    refuse_around_peft(model)
    return None


def from_model(
    sources: Sequence[str | Path | Source],
    model: nn.Module | None,
    *,
    dora_rank: int | None = None,
    device: Devices = None,
    allow_zero: bool = False,
) -> tuple[str | Path | Source, ...]:
    """The sources, of which names of the model's own adapters are read from there.

    Raises:
        OptionError: a name that is both an adapter of the model and a directory; what :func:`listed` refuses.
    """
    sources = listed(sources)
    tuner: Any = None if model is None else tuner_of(model)
    if tuner is None:
        return tuple(sources)
    from dc_merge_peft.sources.live import LiveSource
    from dc_merge_peft.sources.live_model import LiveModel

    devices = checked_devices(device)
    reading = DoraReading(dora_rank, devices[0] if devices else None, allow_zero)
    seen = LiveModel.of(tuner.model)
    found: list[str | Path | Source] = []
    for source in sources:
        if not isinstance(source, str) or source not in tuner.peft_config:
            found.append(source)
            continue
        if is_dir(source):
            raise OptionError(
                f"'{source}' is an adapter of the model and a directory, too: expected one of them; write './{source}' for the directory, "
                "or work in another folder"
            )
        live = LiveSource(tuner, source, seen)
        found.append(DoraSource(live, live.base_weight, reading) if live.is_dora else live)
    return tuple(found)

"""What ``add_weighted_adapter`` does for this library's combination types: read from the model, merge, write into it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from peft.tuners.lora import LoraModel
from peft.tuners.mixed import MixedModel

from dc_merge_peft.combination_types import combination_types
from dc_merge_peft.engine import run_merge
from dc_merge_peft.errors import OptionError
from dc_merge_peft.methods import method_named
from dc_merge_peft.outputs.live import check_name, check_state, install_in_tuner
from dc_merge_peft.plan import plan_merge
from dc_merge_peft.reading import checked_device
from dc_merge_peft.sources.dora import DoraReading, DoraSource
from dc_merge_peft.sources.live import LiveSource
from dc_merge_peft.sources.live_model import LiveModel
from dc_merge_peft.sources.opening import check_order

# Arguments of PEFT's own signature that these methods do not have; a call that sets one is refused, not ignored.
_PEFT_ONLY = ("svd_clamp", "svd_full_matrices", "svd_driver", "majority_sign_method")


def add_merged_adapter(
    tuner: LoraModel | MixedModel,
    adapters: Sequence[str],
    weights: Sequence[float] | None = None,
    adapter_name: str = "merged",
    combination_type: str = "dc",
    svd_rank: int | None = None,
    *others: object,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
    allow_different_bases: bool = False,
    allow_zero: bool = False,
    dora_rank: int | None = None,
    extras: str | None = None,
    **options: Any,
) -> None:
    """``add_weighted_adapter`` for this library's combination types.

    Args:
        tuner: The ``LoraModel`` or ``MixedModel``; ``PeftModel`` hands calls on to it.
        adapters: Names of loaded LoRA adapters.
        weights: One finite number an adapter; 1 for each by default.
        adapter_name: Name of the new adapter. It is frozen, and the active adapter stays active.
        combination_type: Name of a method; one that PEFT has a type for with ``_dw`` behind it, as ``"ties_dw"``.
        svd_rank: Rank of the new adapter at most; all of it by default.
        *others: What stands here belongs to PEFT's own types, and is refused.
        dtype: Of the new factors; the widest of the adapters by default.
        device: Where to compute; by default where each module lives.
        allow_different_bases: Merge adapters whose configs name different base models.
        allow_zero: Merge adapters with an all-zero factor.
        dora_rank: Rank at which the dense deltas of DoRA adapters are read; twice the adapter's rank by default.
        extras: What becomes of fully trained modules and tokens and of biases on lora_B: ``"average"``, ``"first"``,
            ``"drop"`` or the name of the adapter whose values are kept; by default adapters that have any are refused.
        **options: Fields of the method's config, such as ``smoothing``, ``rho``, ``density`` and ``alpha``.

    Raises:
        MergeError: as :meth:`DCMergeAdapter.merge`; the model is unchanged then.
    """
    if others:
        raise OptionError(
            f"found {len(others)} more arguments without a name behind svd_rank, where PEFT's own combination types have "
            f"{', '.join(_PEFT_ONLY)}: combination_type='{combination_type}' has none of them; give options by name, as in rho=5.0"
        )
    for name in _PEFT_ONLY:
        if name in options:
            raise OptionError(
                f"'{name}' belongs to PEFT's own combination types, combination_type='{combination_type}' has no such "
                "option: leave it out"
            )
    method = method_named(combination_types()[combination_type], options)
    seen = LiveModel.of(tuner.model)
    check_name(adapter_name, tuner.peft_config, seen)
    if isinstance(adapters, str):
        raise OptionError(f"found the single adapter {adapters!r}: expected a list of adapter names")
    check_order(adapters)
    reading = DoraReading(dora_rank, checked_device(device), allow_zero)
    opened = [LiveSource(tuner, adapter, seen) for adapter in adapters]
    check_state(tuner, seen)
    sources = [DoraSource(source, source.base_weight, reading) if source.is_dora else source for source in opened]
    plan = plan_merge(
        sources,
        method,
        weights,
        svd_rank=svd_rank,
        dtype=dtype,
        allow_different_bases=allow_different_bases,
        extras=extras,
    )
    # Multiplied out while they are put into the model: each is looked at once, and alpha comes with the product.
    result = run_merge(plan, sources, method, device=device, allow_zero=allow_zero, lazily=True)
    install_in_tuner(result, tuner, adapter_name, seen)

"""``model.add_weighted_adapter(..., combination_type="dc")``: the methods of this library inside PEFT.

PEFT has no extension point for this, so ``LoraModel.add_weighted_adapter`` (and ``MixedModel``'s) is wrapped. Every
combination type that PEFT knows goes through untouched, also when a method of this library has the same name.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from peft.tuners.lora import LoraModel
from peft.tuners.mixed import MixedModel

from dc_merge_peft.engine import run_merge
from dc_merge_peft.errors import OptionError
from dc_merge_peft.methods import METHODS, method_named
from dc_merge_peft.outputs.live import check_name, install_in_tuner
from dc_merge_peft.plan import plan_merge
from dc_merge_peft.sources.live import LiveSource

# Names of combination types that stay PEFT's own.
PEFT_TYPES = frozenset(
    {"svd", "linear", "cat", "ties", "ties_svd", "dare_ties", "dare_linear", "dare_ties_svd", "dare_linear_svd"}
    | {"magnitude_prune", "magnitude_prune_svd"}
)

# Arguments of PEFT's own signature that these methods do not have; a call that sets one is refused, not ignored.
_PEFT_ONLY = ("svd_clamp", "svd_full_matrices", "svd_driver", "majority_sign_method")

_ORIGINAL = "__dc_merge_peft_original__"


def combination_types() -> list[str]:
    """The combination types this library adds to ``add_weighted_adapter``."""
    return [name for name in METHODS if name not in PEFT_TYPES]


def wrap() -> None:
    """Put this library's door in front of PEFT's methods; doing it twice changes nothing."""
    for tuner in (LoraModel, MixedModel):
        if not hasattr(tuner.add_weighted_adapter, _ORIGINAL):
            tuner.add_weighted_adapter = _wrapped(tuner.add_weighted_adapter)  # type: ignore[method-assign]


def unwrap() -> None:
    """Put PEFT's own methods back, the very same functions."""
    for tuner in (LoraModel, MixedModel):
        original = getattr(tuner.add_weighted_adapter, _ORIGINAL, None)
        if original is not None:
            tuner.add_weighted_adapter = original  # type: ignore[method-assign]


def _wrapped(original: Callable[..., None]) -> Callable[..., None]:
    """PEFT's method with a door in front: our types are merged here, everything else goes through as it came."""

    @functools.wraps(original)
    def add_weighted_adapter(self: Any, *args: Any, **kwargs: Any) -> None:
        position = 3  # of combination_type in (adapters, weights, adapter_name, combination_type)
        kind = kwargs.get("combination_type", args[position] if len(args) > position else None)
        if not isinstance(kind, str) or kind not in combination_types():
            return original(self, *args, **kwargs)
        bound = _SIGNATURE.bind(*args, **kwargs)
        return add_merged_adapter(self, *bound.args, **bound.kwargs)

    setattr(add_weighted_adapter, _ORIGINAL, original)
    return add_weighted_adapter


def add_merged_adapter(
    tuner: LoraModel | MixedModel,
    adapters: Sequence[str],
    weights: Sequence[float] | None = None,
    adapter_name: str = "merged",
    combination_type: str = "dc",
    svd_rank: int | None = None,
    *,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
    allow_different_bases: bool = False,
    allow_zero: bool = False,
    **options: Any,
) -> None:
    """What ``add_weighted_adapter`` does for this library's combination types.

    Args:
        tuner: The ``LoraModel`` or ``MixedModel``; ``PeftModel`` hands calls on to it.
        adapters: Names of loaded LoRA adapters.
        weights: One finite number an adapter; 1 for each by default.
        adapter_name: Name of the new adapter. It is frozen, and the active adapter stays active.
        combination_type: Name of a method.
        svd_rank: Rank of the new adapter at most; all of it by default.
        dtype: Of the new factors; the widest of the adapters by default.
        device: Where to compute; by default where each module lives.
        allow_different_bases: Merge adapters whose configs name different base models.
        allow_zero: Merge adapters with an all-zero factor.
        **options: Fields of the method's config, such as ``smoothing``, ``rho``, ``density`` and ``alpha``.

    Raises:
        MergeError: as :meth:`DCMergeAdapter.merge`; the model is unchanged then.
    """
    for name in _PEFT_ONLY:
        if name in options:
            raise OptionError(
                f"'{name}' belongs to PEFT's own combination types, combination_type='{combination_type}' has no such "
                "option: leave it out"
            )
    method = method_named(combination_type, options)
    check_name(adapter_name, tuner.peft_config)
    if isinstance(adapters, str):
        raise OptionError(f"found the single adapter {adapters!r}: expected a list of adapter names")
    sources = [LiveSource(tuner, adapter) for adapter in adapters]
    plan = plan_merge(
        sources, method, weights, svd_rank=svd_rank, dtype=dtype, allow_different_bases=allow_different_bases
    )
    result = run_merge(plan, sources, method, device=device, allow_zero=allow_zero)
    install_in_tuner(result, tuner, adapter_name)


_SIGNATURE = inspect.signature(functools.partial(add_merged_adapter, None))  # type: ignore[arg-type]

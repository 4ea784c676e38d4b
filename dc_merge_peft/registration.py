"""``model.add_weighted_adapter(..., combination_type="dc")``: how the methods of this library get into PEFT.

PEFT has no extension point for this, so ``LoraModel.add_weighted_adapter`` (and ``MixedModel``'s) gets a door in front: our
combination types are merged by :mod:`dc_merge_peft.peft_plugin`, everything else goes through as it came. Where a method
of this library has the name of one of PEFT's types, as ``ties`` has, it is called ``ties_dw`` there.

PEFT takes seconds to import, and merging adapters from disk does not need it. So ``import dc_merge_peft`` acts at once
where PEFT is imported already, and else asks to be called back the moment it is.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Sized
from types import ModuleType
from typing import Any

import wrapt

from dc_merge_peft.combination_types import PEFT_TYPES, combination_types
from dc_merge_peft.errors import unknown_name

_ORIGINAL = "__dc_merge_peft_original__"
_STRANGE_OPTION = "add_weighted_adapter() got an unexpected keyword argument"
_state = {"wanted": False, "hooked": False}


class Registration:
    """What :func:`register` returns: as a context manager it leaves PEFT at the end as it was before."""

    def __init__(self, registered: bool) -> None:
        self._registered = registered  # before

    def __enter__(self) -> Registration:
        return self

    def __exit__(self, *error: object) -> None:
        if not self._registered:
            unregister()


def register() -> Registration:
    """Add this library's combination types to PEFT's ``add_weighted_adapter``.

    ``import dc_merge_peft`` calls it; calling it again does nothing. ``with register(): ...`` takes them out again where they were
    out before.
    """
    registered, _state["wanted"] = _state["wanted"], True
    if not _state["hooked"]:
        _state["hooked"] = True
        wrapt.register_post_import_hook(_on_import, "peft")  # runs at once if PEFT is there already
    elif "peft" in sys.modules:
        _on_import(sys.modules["peft"])
    return Registration(registered)


def unregister() -> None:
    """Give PEFT its own ``add_weighted_adapter`` back, the very same function, also where PEFT is imported later."""
    _state["wanted"] = False
    if "peft" in sys.modules:
        for tuner in _tuners():
            tuner.add_weighted_adapter = getattr(tuner.add_weighted_adapter, _ORIGINAL, tuner.add_weighted_adapter)


def _on_import(_peft: ModuleType) -> None:
    if _state["wanted"]:
        for tuner in _tuners():
            if not hasattr(tuner.add_weighted_adapter, _ORIGINAL):
                tuner.add_weighted_adapter = _with_door(tuner.add_weighted_adapter)


def _tuners() -> tuple[Any, ...]:
    from peft.tuners.lora import LoraModel
    from peft.tuners.mixed import MixedModel

    return LoraModel, MixedModel


def _with_door(original: Callable[..., None]) -> Callable[..., None]:
    """PEFT's method with ours in front. What ours needs is imported on its first use: this runs inside the import of
    PEFT, which a module of this library may have begun."""

    @functools.wraps(original)
    def add_weighted_adapter(self: Any, *args: Any, **kwargs: Any) -> None:
        position = 3  # of combination_type in (adapters, weights, adapter_name, combination_type)
        kind = kwargs.get("combination_type", args[position] if len(args) > position else None)
        if isinstance(kind, str) and kind in combination_types():
            from dc_merge_peft.peft_plugin import add_merged_adapter

            add_merged_adapter(self, *args, **kwargs)
            return
        adapters = kwargs.get("adapters", args[0] if args else None)
        if isinstance(kind, str) and _is_taken_unknown(kind, adapters, original):
            kinds = unknown_name("type", kind, combination_types())
            raise ValueError(f"Invalid combination_type: {kind}; of dc_merge_peft: {kinds}")
        try:
            original(self, *args, **kwargs)
        except (
            ValueError,
            TypeError,
        ) as error:  # a name that neither PEFT nor this library knows, with or without options
            unknown = f"Invalid combination_type: {kind}" == str(error) or _STRANGE_OPTION in str(error)
            if not isinstance(kind, str) or kind in PEFT_TYPES or not unknown:
                raise
            kinds = unknown_name("type", kind, combination_types())
            raise type(error)(f"{error}; of dc_merge_peft: {kinds}") from error

    setattr(add_weighted_adapter, _ORIGINAL, original)
    return add_weighted_adapter


def _is_taken_unknown(kind: str, adapters: Any, original: Callable[..., None]) -> bool:
    """Whether PEFT takes a type that it does not know: any at all for one adapter, which it merges by ``linear``, and any that ends in
    svd, which leaves zeros. Its documentation lists those that it knows."""
    if kind in PEFT_TYPES or f"`{kind}`" in (original.__doc__ or ""):
        return False
    return kind.endswith("svd") or (isinstance(adapters, Sized) and len(adapters) == 1)

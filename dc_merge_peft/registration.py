"""When this library joins PEFT: at once where PEFT is already imported, else the moment it is.

PEFT takes seconds to import and merging adapters from disk does not need it, so ``import dc_merge_peft`` only asks to
be called back.
"""

from __future__ import annotations

import sys
from types import ModuleType, TracebackType

import wrapt

_state = {"wanted": False, "hooked": False}


class Registration:
    """What :func:`register` returns: as a context manager it unregisters at the end."""

    def __enter__(self) -> Registration:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        unregister()


def register() -> Registration:
    """Add this library's combination types to PEFT's ``add_weighted_adapter``.

    ``import dc_merge_peft`` calls it; calling it again does nothing. ``with register(): ...`` takes them out again.
    """
    _state["wanted"] = True
    if not _state["hooked"]:
        _state["hooked"] = True
        wrapt.register_post_import_hook(_on_import, "peft")  # runs at once if PEFT is there already
    elif "peft" in sys.modules:
        _on_import(sys.modules["peft"])
    return Registration()


def unregister() -> None:
    """Give PEFT its own ``add_weighted_adapter`` back, also where PEFT is imported later."""
    _state["wanted"] = False
    if "peft" in sys.modules:
        from dc_merge_peft import peft_plugin

        peft_plugin.unwrap()


def _on_import(_peft: ModuleType) -> None:
    if _state["wanted"]:
        from dc_merge_peft import peft_plugin

        peft_plugin.wrap()

"""The base model: loaded in its own class when it is first needed, its layers found under the paths that adapters use."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

from torch import nn

from dc_merge_peft.errors import SourceError, first_line


class BaseModel:
    """A base model by name, loaded once and not before it is needed, or one in memory."""

    def __init__(self, base: str | Path | nn.Module) -> None:
        """
        Args:
            base: A model directory, a Hub id, or a model.
        """
        self.base = base

    @property
    def location(self) -> str | None:
        """Directory or Hub id; None for a model in memory."""
        return None if isinstance(self.base, nn.Module) else str(self.base)

    @cached_property
    def model(self) -> nn.Module:
        """The model itself.

        Raises:
            SourceError: it can't be loaded.
        """
        return self.base if isinstance(self.base, nn.Module) else load_base(self.base)


def load_base(base: str | Path) -> nn.Module:
    """The base model in the class its own config names, in the dtype it is stored in.

    Raises:
        SourceError: it can't be loaded.
    """
    import transformers

    try:
        config = transformers.AutoConfig.from_pretrained(str(base))
        name = (getattr(config, "architectures", None) or [""])[0]
        model_class: Any = getattr(transformers, name, transformers.AutoModel)
        return model_class.from_pretrained(str(base), dtype="auto")
    except (OSError, ValueError, KeyError) as error:
        raise SourceError(
            f"the base model '{base}' can't be loaded ({first_line(error)}): expected a transformers model directory or a Hub id"
        ) from error


def path_in_model(model: nn.Module, name: str) -> str | None:
    """The path of a module of an adapter in a model, None where there is none. A model class with or without its head
    spells paths with or without ``base_model_prefix``; both are found."""
    prefix = getattr(model, "base_model_prefix", "") + "."
    return next((path for path in (name, prefix + name, name.removeprefix(prefix)) if _has_module(model, path)), None)


def _has_module(model: nn.Module, path: str) -> bool:
    try:
        model.get_submodule(path)
    except AttributeError:
        return False
    return True


def injected_layer(model: nn.Module) -> str | None:
    """The path of a layer that an adapter wraps, None in a plain model."""
    return next((name for name, module in model.named_modules() if hasattr(module, "get_base_layer")), None)

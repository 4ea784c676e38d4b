"""The base model: loaded in its own class when it is first needed, its layers found under the paths that adapters use."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from dc_merge_peft.errors import OptionError, SourceError, preview, printable
from dc_merge_peft.hub_errors import harmless, in_words, secrets
from dc_merge_peft.layout import Layout
from dc_merge_peft.paths import is_dir, is_file
from dc_merge_peft.sources.base_files import is_here, refuse_endless
from dc_merge_peft.sources.contents import CONFIG_FILE
from dc_merge_peft.sources.hub import HubId, failed_at_the_hub, failure_in_words
from dc_merge_peft.sources.renames import fitting_rename

_COLOUR = re.compile(r"\x1b\[[\d;]*m")


class BaseModel:
    """A base model by name, loaded once and not before it is needed, or one in memory."""

    def __init__(
        self, base: str | Path | nn.Module, *, token: str | bool | None = None, trust_remote_code: bool = False
    ) -> None:
        """
        Args:
            base: A model directory, a Hub id, or a model.
            token: For the Hub; by default that of the environment or login.
            trust_remote_code: Run the Python code that the repository or directory brings along.

        Raises:
            OptionError: ``base`` is none of these.
        """
        if not isinstance(base, (str, Path, nn.Module)):
            raise OptionError(
                f"base is a {type(base).__name__}: expected a model directory, a Hub id or a model in memory"
            )
        self.base = base
        self._options: dict[str, Any] = {"token": token, "trust_remote_code": trust_remote_code}

    @classmethod
    def of(cls, base: str | Path | nn.Module | BaseModel | None, token: str | bool | None) -> BaseModel | None:
        """A base model as users name it; one that is none stays None."""
        return base if base is None or isinstance(base, BaseModel) else cls(base, token=token)

    @property
    def location(self) -> str | None:
        """Directory or Hub id; None for a model in memory."""
        return None if isinstance(self.base, nn.Module) else str(self.base)

    @cached_property
    def model(self) -> nn.Module:
        """The model itself.

        Raises:
            SourceError: it can't be loaded, or brings code that is not trusted.
        """
        return self.base if isinstance(self.base, nn.Module) else load_base(self.base, **self._options)

    def weight(self, path: str) -> object:
        """The weight of the layer at a path of the model, read where it is offloaded; None where it has none.

        Raises:
            SourceError: it is not where accelerate has put it.
        """
        layer = self.model.get_submodule(path)
        weight = getattr(layer, "weight", None)
        if isinstance(weight, Tensor) and weight.is_meta:
            from dc_merge_peft.offload import Offloading  # imports accelerate, which few merges need

            place = Offloading(self.model.modules()).find(layer, "weight")
            return weight if place is None else place.read(weight, f"the base weight of '{path}'")
        return weight


def load_base(base: str | Path, *, token: str | bool | None = None, trust_remote_code: bool = False) -> nn.Module:
    """The base model in the class its own config names, in the dtype it is stored in.

    Args:
        base: A model directory, or a Hub id (``org/name``, ``org/name@revision``).
        token: For the Hub; by default that of the environment or login.
        trust_remote_code: Run the Python code that the repository or directory brings along.

    Raises:
        SourceError: it can't be loaded, brings code that is not trusted, lacks weights, or is endless.
    """
    import transformers

    here = is_here(base)
    hub_id = None if here else HubId.parse(str(base))
    options: dict[str, Any] = {"token": token, "trust_remote_code": trust_remote_code}
    if hub_id is not None and hub_id.revision:
        options["revision"] = hub_id.revision
    place = (
        hub_id.repo if hub_id is not None and not hub_id.subfolder else str(Path(base).expanduser() if here else base)
    )
    try:
        refuse_endless(transformers.PretrainedConfig.get_config_dict(place, **options)[0], base)
        with _printable_log():
            config = transformers.AutoConfig.from_pretrained(place, **options)
            model, found = model_class(config).from_pretrained(place, dtype="auto", output_loading_info=True, **options)
    except SourceError:
        raise
    except Exception as error:  # transformers, the Hub's client and code of the model's own can raise anything
        known = secrets(token)
        raise SourceError(cannot_load(error, base, hub_id, known)) from harmless(error, known)
    if missing := sorted(found["missing_keys"]):
        raise SourceError(
            f"the base model '{base}' lacks the weights {preview(missing)} of its {type(model).__name__}, which would be random "
            "numbers: expected all of them; download or save it again, or give a model object"
        )
    return model


@contextmanager
def _printable_log() -> Iterator[None]:
    """transformers reports which tensors it has no use for, under the names that a stranger has given them: without control characters."""

    def clean(record: logging.LogRecord) -> bool:
        lines = _COLOUR.sub("", record.getMessage()).expandtabs().split("\n")
        record.msg, record.args = "\n".join(map(printable, lines)), None
        return True

    handlers = list(logging.getLogger("transformers").handlers)
    for handler in handlers:
        handler.addFilter(clean)
    try:
        yield
    finally:
        for handler in handlers:
            handler.removeFilter(clean)


def model_class(config: Any) -> Any:
    """The model class that a config names, of transformers or of the code that comes with it."""
    import transformers

    name = str((getattr(config, "architectures", None) or [""])[0])
    found = getattr(transformers, name, None)
    if isinstance(found, type) and issubclass(found, transformers.PreTrainedModel):
        return found
    own: dict[str, Any] = getattr(config, "auto_map", None) or {}
    auto = next((auto for auto, path in own.items() if str(path).rpartition(".")[2] == name), "AutoModel")
    return (
        getattr(transformers, auto)
        if auto in dir(transformers) and auto.startswith("AutoModel")
        else transformers.AutoModel
    )


def cannot_load(error: Exception, base: str | Path, hub_id: HubId | None, known: tuple[str, ...]) -> str:
    """Why a base model can't be loaded, and what to do; ``known`` are secrets to leave out."""
    if "trust_remote_code" in str(error):
        return (
            f"the base model '{base}' brings Python code of its own, which is not run unasked: expected a model class of "
            "transformers; read the code, and if you trust it, allow it (trust_remote_code=True, --trust-remote-code), or, beside DoRA "
            "adapters, load the model in Python and give it (base=model)"
        )
    if hub_id is not None and failed_at_the_hub(error):
        return f"the base model can't be loaded: {failure_in_words(error, hub_id, known)}"
    if (hub_id is None or hub_id.subfolder) and not is_dir(Path(base).expanduser()):
        return (
            f"there is no directory '{base}', and as a model of the Hub it can't be loaded ({in_words(error, known)}): expected an existing "
            "transformers model directory or a Hub id such as 'org/name'"
        )
    if is_file(Path(base).expanduser() / CONFIG_FILE):
        return (
            f"the base model '{base}' is an adapter: expected a transformers model directory or a Hub id; dc-merge fuse takes the "
            "base model first, then the adapters"
        )
    return (
        f"the base model '{base}' can't be loaded ({in_words(error, known)}): expected a transformers model directory or a "
        "Hub id"
    )


def path_in_model(model: nn.Module, name: str) -> str | None:
    """The path of a module of an adapter in a model, None where there is none. A model class with or without its head
    spells paths with or without ``base_model_prefix``; both are found."""
    prefix = getattr(model, "base_model_prefix", "") + "."
    return next((path for path in (name, prefix + name, name.removeprefix(prefix)) if _has_module(model, path)), None)


def elsewhere(
    wanted: Mapping[str, Layout], exists: Callable[[str], object], modules: Iterable[str], rename: str | None
) -> str:
    """For the end of an error about missing modules: the rename under which a model has them, or that was given, or else the part of the
    model that has them all, as what torch.compile or DataParallel, or a class with a head, is put around.

    Args:
        wanted: Layouts of the modules by the names that adapters have for them.
        exists: Whether a path is one in the model.
        modules: The paths in the model.
        rename: Under which the adapters were read.
    """
    if renamed := fitting_rename(wanted, exists, rename):
        return renamed
    first, *others = (layout.base_path(name) for name, layout in wanted.items())
    names = frozenset(modules)
    parts = (name.removesuffix(f".{first}") for name in names if name.endswith(f".{first}"))
    part = min((part for part in parts if all(f"{part}.{path}" in names for path in others)), key=len, default=None)
    return f"; the model has them under '{part}': give that part, model.get_submodule('{part}')" if part else ""


def _has_module(model: nn.Module, path: str) -> bool:
    try:
        model.get_submodule(path)
    except AttributeError:
        return False
    return True


def injected_layer(model: nn.Module) -> str | None:
    """The path of a layer that an adapter wraps, None in a plain model."""
    return next((name for name, module in model.named_modules() if hasattr(module, "get_base_layer")), None)

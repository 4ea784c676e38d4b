"""Parameters that a model does not hold itself: offloaded ones are read and replaced, sharded ones are recognised.

In a model that accelerate has offloaded a parameter is a meta tensor; its numbers lie in the ``weights_map`` of an
``AlignDevicesHook``, in memory or on disk. They are read from there, and the model is left as it is.
(``accelerate.utils.align_module_device`` would carry every tensor of the module to its device and drop them all again,
also new ones that the hook does not know.)
"""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from accelerate.hooks import AlignDevicesHook, SequentialHook
from safetensors import SafetensorError
from torch import Tensor, nn

from dc_merge_peft.errors import OutputError, SourceError, first_line


@dataclass(frozen=True)
class Offloaded:
    """The place of one offloaded parameter."""

    hook: AlignDevicesHook
    key: str  # in the hook's map

    @property
    def device(self) -> torch.device:
        """Where the parameter's module computes."""
        device = self.hook.execution_device
        return torch.device("cpu" if device is None else device)

    def read(self, parameter: Tensor, name: str) -> Tensor:
        """The numbers of the (meta) ``parameter``, on the module's device, in the parameter's dtype.

        Raises:
            SourceError: they are not where the hook expects them; ``name`` says what is missing.
        """
        try:
            return self.hook.weights_map[self.key].to(self.device, parameter.dtype)  # type: ignore[index]
        except (KeyError, OSError, SafetensorError) as error:
            raise SourceError(
                f"{name} is offloaded and can't be read ({type(error).__name__}: {first_line(error)}): expected it where "
                "accelerate has put it; load the model again, or merge the adapters from disk"
            ) from error

    def write(self, value: Tensor) -> None:
        """Let the hook know new numbers; they are kept in CPU memory. Files are never changed: they may be the base
        model's own."""
        hook = self.hook
        if not isinstance(hook.weights_map, ChainMap):
            hook.weights_map = ChainMap({}, hook.weights_map)  # type: ignore[arg-type]
        hook.weights_map[self.key] = value.detach().to("cpu")
        origins = getattr(hook, "original_devices", {})
        if self.key in origins:  # when the hooks are taken off, the new numbers stay
            origins[self.key] = torch.device("cpu")


class Offloading:
    """The offload hooks of a model."""

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        """
        Args:
            modules: All modules of the model, the model itself among them: ``model.modules()``.
        """
        # Hooks that load the parameters of all submodules along: accelerate's preload_module_classes.
        self._wide = [(module, hook) for module in modules for hook in _offload_hooks(module) if hook.place_submodules]

    def find(self, module: nn.Module, key: str) -> Offloaded | None:
        """The hook that brings and drops the tensor ``key`` of a module; None where it stays in memory."""
        for hook in _offload_hooks(module):
            return Offloaded(hook, key)
        for parent, hook in self._wide:
            for path, child in parent.named_modules():
                if child is module:
                    return Offloaded(hook, f"{path}.{key}")
        return None


def unreadable(parameter: object, place: Offloaded | None, path: str) -> str | None:
    """What keeps the numbers of a layer's matrix from being read, given its module's path; None where nothing does."""
    if hasattr(parameter, "ds_id"):
        return "is partitioned by DeepSpeed ZeRO-3"
    if hasattr(parameter, "device_mesh"):
        return "is a DTensor, sharded over devices"
    if not isinstance(parameter, nn.Parameter) or parameter.ndim < 2 or "_fsdp_wrapped_module" in path:
        return "is sharded or flattened, as FSDP does, or computed from other parameters, as weight_norm does"
    if parameter.is_meta and place is None:
        return "is a meta tensor without numbers, and no offload hook knows any"
    return None


def split_by_peft(path: str) -> OutputError:
    """The refusal to write into a layer whose new factors PEFT has split."""
    return OutputError(
        f"'{path}' is split over devices by tensor parallelism in the model, and so are new factors there (DTensors): expected whole "
        "layers; save the merged adapter and load it (load_adapter), which splits it"
    )


def _offload_hooks(module: nn.Module) -> Iterator[AlignDevicesHook]:
    # getattr would look through its parameters first, in vain for nearly all modules
    hook = module.__dict__.get("_hf_hook")
    for found in hook.hooks if isinstance(hook, SequentialHook) else (hook,):
        if isinstance(found, AlignDevicesHook) and found.offload:
            yield found

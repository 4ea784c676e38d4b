"""One look through a PEFT model in memory, shared by all its adapters: a walk over thousands of modules costs as much as merging
some of them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from peft.tuners.adalora import AdaLoraLayer
from peft.tuners.lora import LoraLayer, ParamWrapper
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from dc_merge_peft.layout import holder_and_depth
from dc_merge_peft.offload import Offloading


@dataclass(frozen=True, eq=False)
class LiveModel:
    """What one walk has found. It holds for as long as nobody puts modules in or takes any out."""

    modules: Mapping[str, nn.Module]  # by path, each once, as in ``named_modules``

    @classmethod
    def of(cls, model: nn.Module) -> LiveModel:
        """Walk through ``model``: that of a tuner (``tuner.model``), or a base model."""
        return cls(dict(model.named_modules()))

    @cached_property
    def offloading(self) -> Offloading:
        """Where offloaded parameters are."""
        return Offloading(self.modules.values())

    @cached_property
    def lora(self) -> Mapping[str, LoraLayer]:
        """All LoRA layers by path."""
        return {
            name: module
            for name, module in self.modules.items()
            if isinstance(module, LoraLayer) and not isinstance(module, AdaLoraLayer)
        }

    @cached_property
    def wrappers(self) -> Mapping[str, AuxiliaryTrainingWrapper]:
        """What PEFT has put around modules and tokens that are trained beside LoRA, by path."""
        return {name: module for name, module in self.modules.items() if isinstance(module, AuxiliaryTrainingWrapper)}

    @cached_property
    def plain(self) -> Mapping[str, nn.Module]:
        """The innermost module at each path as the base model spells it, without the levels that adapters put in between."""
        return {plain_path(name): module for name, module in self.modules.items()}

    @cached_property
    def words(self) -> frozenset[str]:
        """Every part of the path of a tensor in the tuner's model, names of adapters among them."""
        tensors = (name for module in self.modules.values() for name in (*module._parameters, *module._buffers))
        return frozenset(part for path in (*self.modules, "model") for part in path.split(".")).union(tensors)

    @cached_property
    def own(self) -> Sequence[str]:
        """The paths of the base model's own modules, as it spells them. What adapters' layers hold beside the module that they are
        around is left out, as PEFT leaves it out when it looks for targets."""
        found: dict[str, None] = {}
        around: list[str] = []
        for name, module in self.modules.items():  # a module comes before those inside it
            while around and not name.startswith(around[-1]):
                around.pop()
            if around and not f"{name}.".startswith(f"{around[-1]}base_layer."):
                continue
            found[plain_path(name)] = None
            if isinstance(module, BaseTunerLayer):
                around.append(f"{name}.")
        return [name for name in found if name]

    def layers(self, adapter: str) -> dict[str, LoraLayer]:
        """The LoRA layers that hold an adapter, by path (that of :meth:`Layout.layer`). In a mixed model a layer may sit under
        those of other adapters; its path is that of the outermost one, as the base model spells it. Only layers around
        parameters are told apart by their level."""
        return {
            name if isinstance(layer, ParamWrapper) else holder_and_depth(name)[0]: layer
            for name, layer in self.lora.items()
            if adapter in layer.lora_A or adapter in layer.lora_embedding_A
        }


def plain_path(name: str) -> str:
    """A module's path in the base model, without the levels that adapters put in between."""
    return re.sub(r"\.base_layer(?=\.|$)", "", name)

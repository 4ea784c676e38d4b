"""What adding an adapter changes in a model beside the adapter, and the way back."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from peft.tuners.lora import LoraModel
from peft.tuners.mixed import MixedModel
from peft.tuners.trainable_tokens import TrainableTokensLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

# What knows which adapter of its own is active.
_HOLDERS = (BaseTunerLayer, AuxiliaryTrainingWrapper)


class PlainState:
    """A base model before PEFT puts layers around its own."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._children = [
            (parent, name, child) for parent in model.modules() for name, child in parent.named_children()
        ]
        # By name: PEFT's layer around an attention makes new parameters of its weights.
        self._trainable = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
        self._had_config = hasattr(model, "peft_config")

    def restore(self) -> None:
        """Its own layers again, and their ``requires_grad``."""
        for parent, name, child in self._children:
            parent._modules[name] = child
        for name, parameter in self._model.named_parameters():
            parameter.requires_grad_(self._trainable[name])
        if not self._had_config and hasattr(self._model, "peft_config"):
            del self._model.peft_config


class TunerState:
    """A tuner before it gets another adapter: its active adapters, ``requires_grad``, and which module is where."""

    def __init__(self, tuner: LoraModel | MixedModel) -> None:
        self._tuner = tuner
        self._trainable = [(name, parameter, parameter.requires_grad) for name, parameter in tuner.named_parameters()]
        modules = list(tuner.modules())  # a walk takes as long as merging a module
        self._children = [(parent, name, child) for parent in modules for name, child in parent._modules.items()]
        self._active = list(tuner.active_adapters)
        # What PEFT has noted down of earlier adapters, where it does.
        self._noted = {
            name: list(getattr(tuner, name, ())) for name in ("targeted_module_names", "targeted_parameter_names")
        }
        layers = [module for module in modules if isinstance(module, BaseTunerLayer)]
        self._disabled = bool(layers) and all(layer.disable_adapters for layer in layers)
        self._holders = {module: module._active_adapter for module in modules if isinstance(module, _HOLDERS)}

    def remove(self, adapter_name: str) -> None:
        """Take the new adapter, which may be missing, out again, with every layer that PEFT has put around a module for it."""
        if adapter_name in self._tuner.peft_config:
            # PEFT raises where several adapters stay active around a module that is trained in full.
            for module in self._tuner.modules():
                if isinstance(module, _HOLDERS):
                    module._active_adapter = []  # type: ignore[assignment]
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # PEFT warns that it picks another active adapter
                self._tuner.delete_adapter(adapter_name)
        for parent, name, child in self._children:
            parent._modules[name] = child
        for noted, names in self._noted.items():
            if hasattr(self._tuner, noted):
                setattr(self._tuner, noted, names)

    def settle(self) -> None:
        """Active adapters and ``requires_grad`` as they were; a wrapper that is new lets the base model through, and so does a new
        layer where all are disabled."""
        self._tuner.active_adapter = self._active if len(self._active) != 1 else self._active[0]
        for module in self._tuner.modules():
            if module in self._holders:
                module._active_adapter = self._holders[module]  # type: ignore[index, assignment]
            elif isinstance(module, (AuxiliaryTrainingWrapper, TrainableTokensLayer)):
                _deactivate(module)
            elif self._disabled and isinstance(module, BaseTunerLayer):
                module.enable_adapters(False)
        # By object, since a wrapper changes paths, and by path, since PEFT's layer around an attention makes new parameters.
        now = dict(self._tuner.named_parameters())
        for name, parameter, requires_grad in self._trainable:
            parameter.requires_grad_(requires_grad)
            now.get(name, parameter).requires_grad_(requires_grad)


class AttentionWeights:
    """Copies of the weights of every ``nn.MultiheadAttention``: PEFT's forward pass adds the delta to them and takes it away
    again, each time with an error of rounding."""

    def __init__(self, model: nn.Module) -> None:
        attentions = [module for module in model.modules() if isinstance(module, nn.MultiheadAttention)]
        holders: list[tuple[nn.Module, str]] = [(module, "in_proj_weight") for module in attentions]
        for module in attentions:
            projection: nn.Module = module.out_proj
            base = projection.get_base_layer() if isinstance(projection, BaseTunerLayer) else projection
            holders.append((base, "weight"))
        weights = [(holder, name, getattr(holder, name)) for holder, name in holders]
        self._kept = [
            (holder, name, weight.detach().clone())
            for holder, name, weight in weights
            if weight is not None and not weight.is_meta
        ]

    @torch.no_grad()
    def restore(self) -> None:
        """Their numbers again."""
        for holder, name, weight in self._kept:
            getattr(holder, name).copy_(weight)


@contextmanager
def own_layers_on_failure(model: nn.Module) -> Iterator[None]:
    """On an error a base model gets the layers back that PEFT has put its own around, and their ``requires_grad``."""
    before = PlainState(model)
    try:
        yield
    except BaseException:
        before.restore()
        raise


@contextmanager
def unchanged_but_for(tuner: LoraModel | MixedModel, adapter_name: str) -> Iterator[None]:
    """Active adapters and ``requires_grad`` stay as they are; on an error the new adapter disappears again, and every wrapper
    that PEFT has put around a module for it."""
    before = TunerState(tuner)
    try:
        yield
    except BaseException:
        before.remove(adapter_name)
        raise
    finally:
        before.settle()


def _deactivate(wrapper: AuxiliaryTrainingWrapper | TrainableTokensLayer) -> None:
    """A wrapper that PEFT has made for the new adapter lets the base model through until the adapter is activated. PEFT
    activates the ones that it ties to a wrapped embedding, and before version 0.18 all of them."""
    if hasattr(AuxiliaryTrainingWrapper, "check_set_adapter"):
        wrapper._active_adapter = []  # type: ignore[assignment]
    else:  # there inactive means disabled
        wrapper.enable_adapters(False)

"""Adapters of a PEFT model in memory: stored factors and the scaling in force, read layer by layer."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from peft import PeftMixedModel, PeftModel
from peft.tuners.lora import LoraLayer, ParamWrapper
from peft.tuners.lora.layer import MultiheadAttention
from peft.tuners.tuners_utils import BaseTuner
from torch import Tensor, nn

from dc_merge_peft.errors import OptionError, SourceError, UnsupportedAdapterError, unknown_name
from dc_merge_peft.layers import layer_layout, never_called
from dc_merge_peft.layout import STORED_OUT_PROJ, Layout, holder_and_depth
from dc_merge_peft.linalg import compute_device
from dc_merge_peft.lowrank import LowRank
from dc_merge_peft.offload import unreadable
from dc_merge_peft.sources.base import IN_MEMORY, AdapterInfo, ModuleSpec, Source
from dc_merge_peft.sources.dora import matrix_of
from dc_merge_peft.sources.experts import parameters_at, target_parameters
from dc_merge_peft.sources.extras import extras_reason
from dc_merge_peft.sources.live_extras import live_extras, refuse_live_biases
from dc_merge_peft.sources.live_model import LiveModel
from dc_merge_peft.sources.refusals import dora_without_base, refuse_unless_plain_lora
from dc_merge_peft.sources.stored import FLOATS
from dc_merge_peft.sources.targeting import Targets

# Layer classes whose stored factors are not one B and one A for one weight.
_UNSUPPORTED_LAYERS = {
    "LoraParallelLinear": "its factors are sharded",
    "ArrowLoraLinearLayer": "it routes between adapters",
}
# LoRA variants whose forward pass is scaling * B @ A all the same: MiCA trains A alone, VeLoRA saves memory in training.
_PLAIN_VARIANTS = ("MiCALinearVariant", "MiCAEmbeddingVariant", "VeloraLinearVariant")
_DORA_VARIANTS = tuple(f"Dora{kind}Variant" for kind in ("Linear", "Embedding", "Conv1d", "Conv2d", "Conv3d"))


class LiveSource(Source):
    """One LoRA adapter of a PEFT tuner. Offloaded factors are read from where they are, onto their layer's device."""

    def __init__(self, tuner: nn.Module, adapter: str, seen: LiveModel | None = None) -> None:
        """
        Args:
            tuner: A ``LoraModel`` or ``MixedModel``: what a ``PeftModel`` has as ``base_model``; or that ``PeftModel``.
            adapter: The adapter's name.
            seen: What ``LiveModel.of(tuner.model)`` has found, where several adapters of one model share the walk.

        Raises:
            OptionError: the model has no such adapter, or is none of these.
            SourceError: the adapter is no LoRA, or is merged into the base weights at the moment.
            UnsupportedAdapterError: a LoRA whose delta is neither ``scaling * B @ A`` nor DoRA's, or whose factors are sharded or
                lost.
        """
        tuner = _tuner_of(tuner)
        configs: dict[str, Any] = tuner.peft_config  # type: ignore[assignment]
        if adapter not in configs:
            raise OptionError(unknown_name("adapter", adapter, configs))
        config = _config_values(configs[adapter])
        refuse_unless_plain_lora(config, adapter)
        refuse_live_biases(config, adapter)
        seen = seen or LiveModel.of(tuner.model)  # type: ignore[arg-type]
        self._adapter, self.config = adapter, config
        self._offloading = seen.offloading
        self._layers = seen.layers(adapter)
        if not self._layers:
            raise SourceError(
                f"adapter '{adapter}' has no LoRA layers in the model: expected at least one; was it loaded?"
            )
        self._parameters = target_parameters(config)
        specs = {name: self._spec(name, layer) for name, layer in self._layers.items()}
        self.modules = {module: spec for name, spec in specs.items() for module in spec.layout.modules(name)}
        self._extras = live_extras(seen, adapter, self._layers)
        self.extras = {name: extra.spec for name, extra in self._extras.items()}
        self.extras_reason = extras_reason(config, self.extras)
        self.is_dora = any(adapter in layer.lora_magnitude_vector for layer in self._layers.values())
        self.info = AdapterInfo(
            name=adapter,
            location=IN_MEMORY,
            base_model=config.get("base_model_name_or_path") or None,
            base_revision=config.get("revision") or None,
            task_type=getattr(config.get("task_type"), "value", config.get("task_type")) or None,
            auto_mapping=config.get("auto_mapping") or None,
            fan_in_fan_out=bool(config.get("fan_in_fan_out")),
            targets=Targets.from_config(config),
            target_parameters=self._parameters,
        )

    def scaling(self, module: str) -> float:
        return float(self._layer(module).scaling[self._adapter])

    def factors(self, module: str) -> LowRank:
        if self.is_dora:
            raise dora_without_base(self._adapter)
        return self.lora(module)

    def on_cpu(self, module: str) -> bool:
        (holder, key), _ = factor_holders(self._layer(module), self._adapter)
        return compute_device(getattr(holder, key).device).type in ("cpu", "meta")  # offloaded ones are read to the CPU

    def lora(self, module: str) -> LowRank:
        layout = self.modules[module].layout
        layer = self._layer(module)
        A, B = (
            self._numbers(holder, key, f"{name} of '{module}' in adapter '{self._adapter}'")
            for (holder, key), name in zip(factor_holders(layer, self._adapter), layout.factor_names, strict=True)
        )
        return layout.to_lowrank(*layout.own(module, A, B), self.scaling(module))

    def _layer(self, module: str) -> LoraLayer:
        """The layer that holds a module's factors."""
        layer = self._layers[self.modules[module].layout.layer(module)]
        if self._adapter not in layer.scaling:
            raise SourceError(
                f"adapter '{self._adapter}' is no longer in the model, which has deleted it: expected to be read before; merge first, or load "
                "it again and make another LiveSource"
            )
        return layer

    def _numbers(self, holder: nn.Module, key: str, name: str) -> Tensor:
        """A stored factor, from wherever it is kept."""
        parameter: Tensor = getattr(holder, key)
        place = self._offloading.find(holder, key) if parameter.is_meta else None
        return parameter.detach() if place is None else place.read(parameter, name)

    def extra(self, name: str) -> Tensor:
        return self._extras[name].read()

    def magnitude(self, module: str) -> Tensor:
        vectors = self._layer(module).lora_magnitude_vector
        if self._adapter not in vectors:
            raise SourceError(
                f"adapter '{self._adapter}' is DoRA, but has no magnitude vector in '{module}': expected one in every layer; "
                "load it again"
            )
        holder: nn.Module = vectors[self._adapter]  # type: ignore[assignment]
        return self._numbers(holder, "weight", f"the magnitude vector of '{module}'").flatten()

    def base_weight(self, module: str) -> Tensor:
        """The (m, n) weight of the base layer under a module, from wherever it is kept."""
        layer = self._layers[self.modules[module].layout.layer(module)].get_base_layer()
        weight = getattr(layer, "weight", None)
        if isinstance(weight, Tensor):
            weight = self._numbers(layer, "weight", f"the base weight of '{module}'")
        return matrix_of(module, layer, weight, self.modules[module], self._adapter)

    def _spec(self, name: str, layer: LoraLayer) -> ModuleSpec:
        kind = type(layer).__name__
        if kind in _UNSUPPORTED_LAYERS:
            raise UnsupportedAdapterError(
                f"'{name}' is a {kind} layer of PEFT: {_UNSUPPORTED_LAYERS[kind]}; expected Linear, Conv1D, Embedding, "
                "Conv1d, Conv2d, Conv3d, MultiheadAttention or target_parameters: train the adapter without that module"
            )
        if not _forward_is_pefts(layer):
            raise UnsupportedAdapterError(
                f"'{name}' is a {kind} layer, which is none of PEFT's and has a forward pass of its own: what it does with B and A "
                "is not known; expected a layer of PEFT's: train the adapter without that module, or derive the class from PEFT's "
                "and keep its forward pass"
            )
        _refuse_merged_and_variants(name, layer, self._adapter)
        layout = self._layout(name, layer)
        self._refuse_unreadable(name, layer, layout)
        A, B = (getattr(holder, key) for holder, key in factor_holders(layer, self._adapter))
        for factor, called in zip((A, B), layout.factor_names, strict=True):
            if factor.dtype not in FLOATS.values():  # as in files
                raise SourceError(
                    f"adapter '{self._adapter}' holds {called} of '{name}' as {factor.dtype}: expected float64, float32, float16 or bfloat16; "
                    "convert its factors to one of these"
                )
        columns = A.flatten(1).shape[1]
        if A.shape[0] != B.shape[1]:
            raise SourceError(
                f"adapter '{self._adapter}' has lora_A {tuple(A.shape)} and lora_B {tuple(B.shape)} in '{name}': expected "
                "one rank in both; sharded or damaged factors can't be merged"
            )
        rank = A.shape[0] // layout.experts
        return ModuleSpec((B.shape[0], columns), rank, layout, torch.promote_types(A.dtype, B.dtype))

    def _layout(self, name: str, layer: LoraLayer) -> Layout:
        """The layout of a PEFT layer's factors."""
        if isinstance(layer, ParamWrapper):
            parameters = parameters_at(holder_and_depth(name)[0], self._parameters)
            return Layout("expert", experts=layer.num_experts, parameters=parameters)
        layout = layer_layout(name, layer.get_base_layer())
        attention = self._layers.get(name.removesuffix(STORED_OUT_PROJ))
        if layout.kind == "out_proj" and not isinstance(attention, MultiheadAttention):
            raise UnsupportedAdapterError(
                f"{never_called(name)}; expected LoRA on the attention module itself: train the adapter with that in target_modules"
            )
        if layout.kind == "out_proj" and layer.fan_in_fan_out:  # type: ignore[attr-defined]
            raise UnsupportedAdapterError(
                f"'{name}' is the output projection of an attention module in a model with Conv1D layers, for which PEFT has set "
                "fan_in_fan_out, and so transposes the projection's delta: expected adapters on one of the two kinds of layers"
            )
        return layout

    def _refuse_unreadable(self, name: str, layer: LoraLayer, layout: Layout) -> None:
        for (holder, key), factor in zip(factor_holders(layer, self._adapter), layout.factor_names, strict=True):
            reason = unreadable(getattr(holder, key), self._offloading.find(holder, key), name)
            if hasattr(layer, "_tp_info"):  # before transformers 5.17, whose parts are DTensors
                reason = "belongs to one process's part of the layer, which tensor parallelism has split"
            if reason is not None:
                raise UnsupportedAdapterError(
                    f"{factor} of '{name}' in adapter '{self._adapter}' {reason}: expected whole factors; load all adapters "
                    "before the model is offloaded or sharded, or merge them from disk (DCMergeAdapter().merge([...]))"
                )


def _tuner_of(model: nn.Module) -> BaseTuner:
    """The tuner itself, or that of a ``PeftModel``. The base model in it knows its adapters, too, but not its own place in their paths.

    Raises:
        OptionError: it is neither.
    """
    model = getattr(model, "_orig_mod", model)  # inside of what torch.compile makes
    tuner = model.base_model if isinstance(model, (PeftModel, PeftMixedModel)) else model
    if not isinstance(tuner, BaseTuner):
        raise OptionError(
            f"found a {type(model).__name__} in the place of a tuner: expected a PeftModel, or its base_model, from whose modules the names "
            "of the merged ones come"
        )
    return tuner


def _config_values(config: Any) -> dict[str, Any]:
    """A PEFT config as a mapping, without copying what is inside."""
    return {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}


def _forward_is_pefts(layer: LoraLayer) -> bool:
    """Whether PEFT has written what a layer computes; a class registered for a module of the user's may compute anything."""
    owner = next(kind for kind in type(layer).__mro__ if "forward" in vars(kind))
    return owner.__module__.partition(".")[0] == "peft"


def factor_holders(layer: LoraLayer, adapter: str) -> tuple[tuple[nn.Module, str], tuple[nn.Module, str]]:
    """For A and B the module that holds the parameter, and its name there."""
    if adapter in layer.lora_embedding_A:
        return (layer.lora_embedding_A, adapter), (layer.lora_embedding_B, adapter)
    return (layer.lora_A[adapter], "weight"), (layer.lora_B[adapter], "weight")


def _refuse_merged_and_variants(name: str, layer: LoraLayer, adapter: str) -> None:
    if layer.merged_adapters:
        raise SourceError(
            f"the model has adapters merged into its base weights at the moment ({', '.join(layer.merged_adapters)}): "
            "expected unmerged adapters; call model.unmerge_adapter() first"
        )
    variant = type(getattr(layer, "lora_variant", {}).get(adapter)).__name__
    is_dora = variant in _DORA_VARIANTS and adapter in layer.lora_magnitude_vector
    if variant not in ("NoneType", *_PLAIN_VARIANTS) and not is_dora:
        raise UnsupportedAdapterError(
            f"adapter '{adapter}' uses {variant} in '{name}': expected plain LoRA, whose delta is scaling * B @ A: convert "
            "it to plain LoRA first"
        )
    if is_dora and adapter in layer.lora_B and getattr(layer.lora_B[adapter], "bias", None) is not None:
        raise UnsupportedAdapterError(
            f"adapter '{adapter}' is DoRA with a bias on lora_B in '{name}', for which PEFT's forward pass and its merged weight "
            "differ: expected one of them; train it with lora_bias=False"
        )

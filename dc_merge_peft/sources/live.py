"""Adapters of a PEFT model in memory: stored factors and the scaling in force, read layer by layer."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from peft.tuners.adalora import AdaLoraLayer
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from dc_merge_peft.errors import OptionError, SourceError, UnsupportedAdapterError, unknown_name
from dc_merge_peft.layers import layer_layout
from dc_merge_peft.lowrank import LowRank
from dc_merge_peft.sources.base import IN_MEMORY, AdapterInfo, ModuleSpec, Source, Targets
from dc_merge_peft.sources.dora import layer_weight
from dc_merge_peft.sources.extras import extras_reason
from dc_merge_peft.sources.live_extras import live_extras, refuse_live_biases
from dc_merge_peft.sources.refusals import refuse_unless_plain_lora

# Layer classes whose stored factors are not one B and one A for one weight.
_UNSUPPORTED_LAYERS = {
    "MultiheadAttention": "its projections share one weight",
    "ParamWrapper": "LoRA on parameters keeps one factor pair per expert",
    "LoraParallelLinear": "its factors are sharded",
    "ArrowLoraLinearLayer": "it routes between adapters",
}
# LoRA variants whose forward pass is scaling * B @ A all the same: MiCA trains A alone, VeLoRA saves memory in training.
_PLAIN_VARIANTS = ("MiCALinearVariant", "MiCAEmbeddingVariant", "VeloraLinearVariant")
_DORA_VARIANTS = tuple(f"Dora{kind}Variant" for kind in ("Linear", "Embedding", "Conv1d", "Conv2d", "Conv3d"))


def lora_layers(model: nn.Module, adapter: str) -> dict[str, LoraLayer]:
    """The LoRA layers that hold an adapter, by path. In a mixed model a layer may sit under those of other adapters; its
    path is that of the outermost one, as the base model spells it."""
    return {
        _base_path(name): module
        for name, module in model.named_modules()
        if isinstance(module, LoraLayer) and not isinstance(module, AdaLoraLayer) and _has(module, adapter)
    }


def _base_path(name: str) -> str:
    while name.endswith(".base_layer"):
        name = name.removesuffix(".base_layer")
    return name


class LiveSource(Source):
    """One LoRA adapter of a PEFT tuner."""

    def __init__(self, tuner: nn.Module, adapter: str) -> None:
        """
        Args:
            tuner: A ``LoraModel`` or ``MixedModel``: what a ``PeftModel`` has as ``base_model``.
            adapter: The adapter's name.

        Raises:
            OptionError: the model has no such adapter.
            SourceError: the adapter is no LoRA, or is merged into the base weights at the moment.
            UnsupportedAdapterError: a LoRA whose delta is neither ``scaling * B @ A`` nor DoRA's.
        """
        configs: dict[str, Any] = tuner.peft_config  # type: ignore[assignment]
        if adapter not in configs:
            raise OptionError(unknown_name("adapter", adapter, configs))
        config = _config_values(configs[adapter])
        refuse_unless_plain_lora(config, adapter)
        refuse_live_biases(config, adapter)
        model: nn.Module = tuner.model  # type: ignore[assignment]
        self._adapter = adapter
        self._layers = lora_layers(model, adapter)
        if not self._layers:
            raise SourceError(
                f"adapter '{adapter}' has no LoRA layers in the model: expected at least one; was it loaded?"
            )
        self.modules = {name: self._spec(name, layer) for name, layer in self._layers.items()}
        self._extras = live_extras(model, adapter, self._layers)
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
        )

    def factors(self, module: str) -> LowRank:
        layer = self._layers[module]
        A, B = _stored_factors(layer, self._adapter)
        scaling = float(layer.scaling[self._adapter])
        return self.modules[module].layout.to_lowrank(A.detach(), B.detach(), scaling)

    def extra(self, name: str) -> Tensor:
        return self._extras[name].read()

    def magnitude(self, module: str) -> Tensor:
        vectors = self._layers[module].lora_magnitude_vector
        if self._adapter not in vectors:
            raise SourceError(
                f"adapter '{self._adapter}' is DoRA, but has no magnitude vector in '{module}': expected one in every layer; "
                "load it again"
            )
        return vectors[self._adapter].weight.detach().flatten()  # type: ignore[union-attr, operator]

    def base_weight(self, module: str) -> Tensor:
        """The (m, n) weight of the base layer under a module."""
        return layer_weight(module, self._layers[module].get_base_layer(), self.modules[module], self._adapter)

    def _spec(self, name: str, layer: LoraLayer) -> ModuleSpec:
        kind = type(layer).__name__
        if kind in _UNSUPPORTED_LAYERS:
            raise UnsupportedAdapterError(
                f"'{name}' is a {kind} layer of PEFT: {_UNSUPPORTED_LAYERS[kind]}; expected Linear, Conv1D, Embedding or "
                "Conv2d: train the adapter without that module"
            )
        _refuse_merged_and_variants(name, layer, self._adapter)
        A, B = _stored_factors(layer, self._adapter)
        layout = layer_layout(name, layer.get_base_layer())
        columns = A.flatten(1).shape[1]
        if A.is_meta or B.is_meta:
            raise UnsupportedAdapterError(
                f"the factors of '{name}' are offloaded (meta tensors): expected them in memory; load the model without "
                "offload, or merge the adapters from disk"
            )
        if A.shape[0] != B.shape[1]:
            raise SourceError(
                f"adapter '{self._adapter}' has lora_A {tuple(A.shape)} and lora_B {tuple(B.shape)} in '{name}': expected "
                "one rank in both; sharded or damaged factors can't be merged"
            )
        return ModuleSpec((B.shape[0], columns), A.shape[0], layout, torch.promote_types(A.dtype, B.dtype))


def _config_values(config: Any) -> dict[str, Any]:
    """A PEFT config as a mapping, without copying what is inside."""
    return {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}


def _has(layer: LoraLayer, adapter: str) -> bool:
    return adapter in layer.lora_A or adapter in layer.lora_embedding_A


def _stored_factors(layer: LoraLayer, adapter: str) -> tuple[Tensor, Tensor]:
    """(A, B) parameters as PEFT keeps them."""
    if adapter in layer.lora_embedding_A:
        return layer.lora_embedding_A[adapter], layer.lora_embedding_B[adapter]
    return layer.lora_A[adapter].weight, layer.lora_B[adapter].weight  # type: ignore[return-value]


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

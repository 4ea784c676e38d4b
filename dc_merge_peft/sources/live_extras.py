"""What an adapter of a PEFT model in memory holds outside B and A: the modules and tokens that PEFT keeps a copy of for each
adapter, and biases on lora_B."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import ModulesToSaveWrapper, TrainableTokensWrapper
from torch import Tensor

from dc_merge_peft.errors import UnsupportedAdapterError
from dc_merge_peft.sources.base import ExtraSpec
from dc_merge_peft.sources.extras import LORA_BIAS_NAME, TOKENS_NAME, scaled, trains_biases
from dc_merge_peft.sources.live_model import LiveModel


class LiveExtra(NamedTuple):
    """One tensor outside B and A in a model."""

    spec: ExtraSpec
    value: Tensor
    scaling: float = 1.0  # of a lora_bias

    def read(self) -> Tensor:
        """The tensor, scaling folded in."""
        return scaled(self.value.detach(), self.scaling)


def refuse_live_biases(config: Mapping[str, Any], adapter: str) -> None:
    """Trained biases of the base model: PEFT changes the model's own, of which there is one for all adapters."""
    if trains_biases(config):
        raise UnsupportedAdapterError(
            f"adapter '{adapter}' has bias={config['bias']!r}: PEFT trains the biases of the model itself, so that in memory they "
            "belong to no single adapter; expected bias='none': merge the adapters from disk and say what becomes of the biases "
            "(DCMergeAdapter().merge([...], extras=...)), or train without biases"
        )


def live_extras(seen: LiveModel, adapter: str, layers: Mapping[str, LoraLayer]) -> dict[str, LiveExtra]:
    """All tensors of an adapter outside B and A, by their path in the base model.

    Raises:
        UnsupportedAdapterError: they are offloaded, or LoRA layers stand inside a module trained in full.
    """
    found = {**dict(_wrapped(seen, adapter)), **dict(_lora_biases(layers, adapter))}
    for name, extra in found.items():
        if extra.value.is_meta:
            raise UnsupportedAdapterError(
                f"'{name}' of adapter '{adapter}' is offloaded (a meta tensor): expected it in memory; load the model without "
                "offload, or merge the adapters from disk"
            )
    return found


def _wrapped(seen: LiveModel, adapter: str) -> Iterator[tuple[str, LiveExtra]]:
    """Modules and token rows of which PEFT keeps a copy for each adapter."""
    for path, wrapper in seen.wrappers.items():
        if isinstance(wrapper, ModulesToSaveWrapper) and adapter in wrapper.modules_to_save:
            copy = wrapper.modules_to_save[adapter]
            if any(isinstance(module, BaseTunerLayer) for module in copy.modules()):
                raise UnsupportedAdapterError(
                    f"adapter '{adapter}' trains '{path}' in full, and in there are layers of this or another adapter: expected "
                    "one of the two for a module; train it without that entry of modules_to_save, or the other one without "
                    "layers there"
                )
            for key, value in copy.state_dict().items():
                yield f"{path}.{key}", LiveExtra(ExtraSpec("module", path, tuple(value.shape), value.dtype), value)
        elif isinstance(wrapper, TrainableTokensWrapper):
            tokens = wrapper.token_adapter
            # A tied one shows another's rows.
            if adapter in tokens.trainable_tokens_delta and tokens.tied_adapter is None:
                value, indices = tokens.trainable_tokens_delta[adapter], tuple(tokens.token_indices[adapter])
                spec = ExtraSpec("tokens", path, tuple(value.shape), value.dtype, indices)
                yield f"{path}.{TOKENS_NAME}", LiveExtra(spec, value)


def _lora_biases(layers: Mapping[str, LoraLayer], adapter: str) -> Iterator[tuple[str, LiveExtra]]:
    for path, layer in layers.items():
        bias = getattr(layer.lora_B[adapter], "bias", None) if adapter in layer.lora_B else None
        if isinstance(bias, Tensor):
            spec = ExtraSpec("lora_bias", path, tuple(bias.shape), bias.dtype)
            yield f"{path}.{LORA_BIAS_NAME}", LiveExtra(spec, bias, float(layer.scaling[adapter]))

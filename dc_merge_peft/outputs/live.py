"""A merged adapter into a PEFT model in memory: everything is checked first, the model changes last, and a failure
leaves it as it was."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import peft
import torch
from peft import LoraConfig, PeftMixedModel, PeftModel
from peft.tuners.lora import LoraLayer, LoraModel
from peft.tuners.mixed import MixedModel
from peft.tuners.tuners_utils import BaseTunerLayer, check_target_module_exists
from torch import nn
from torch.torch_version import TorchVersion

from dc_merge_peft.errors import OptionError, OutputError, first_line, preview
from dc_merge_peft.layers import other_size, place_of
from dc_merge_peft.offload import Offloaded, Offloading, split_by_peft
from dc_merge_peft.outputs.extras import lora_biases
from dc_merge_peft.outputs.live_extras import check_extras, write_extras
from dc_merge_peft.outputs.live_state import own_layers_on_failure, unchanged_but_for
from dc_merge_peft.outputs.lora_config import lora_fields, stored_factors
from dc_merge_peft.result import MergeResult
from dc_merge_peft.sources.base_model import elsewhere
from dc_merge_peft.sources.live import factor_holders
from dc_merge_peft.sources.live_model import LiveModel, plain_path
from dc_merge_peft.sources.targeting import Targets

# Before version 0.19 PEFT moves the new layers of a MixedModel to the base's device, which factors without numbers can't.
_FILLED = TorchVersion(peft.__version__) < "0.19"


def install(result: MergeResult, model: nn.Module, adapter_name: str, *, activate: bool) -> nn.Module:
    """Add ``result`` to a ``PeftModel`` in place, or wrap a base model in one; see :meth:`MergedAdapter.add_to`."""
    if not isinstance(model, nn.Module):
        raise OptionError(
            f"found a {type(model).__name__} to add the adapter to: expected a PeftModel or a base model in memory"
        )
    if not isinstance(model, (PeftModel, PeftMixedModel)):
        return _wrapped(result, model, adapter_name)
    tuner = model.base_model
    if not isinstance(tuner, (LoraModel, MixedModel)):
        raise OutputError(
            f"the model holds {type(tuner).__name__} adapters: expected LoRA; load a fresh base model and call "
            "PeftModel.from_pretrained on the saved adapter"
        )
    install_in_tuner(result, tuner, adapter_name)
    if activate:
        model.set_adapter(adapter_name)
        for name, parameter in tuner.named_parameters():
            if f".{adapter_name}." in name or name.endswith(f".{adapter_name}"):
                parameter.requires_grad_(False)
    return model


def _wrapped(result: MergeResult, model: nn.Module, adapter_name: str) -> PeftModel:
    """A base model in a ``PeftModel`` with the merged adapter."""
    check_name(adapter_name, ())
    refuse_around_peft(model)
    if any(isinstance(module, BaseTunerLayer) for module in model.modules()):
        raise OptionError(
            f"the {type(model).__name__} holds adapters already: expected a PeftModel, or a base model without any; pass "
            "the PeftModel that they belong to, or where there is none, save the merged adapter and load it as they were (load_adapter)"
        )
    seen = LiveModel.of(model)
    check_modules(result, seen)
    check_extras(result, model, shared=False)
    config = _config_for(result, seen)
    with own_layers_on_failure(model):
        with _readable_refusals(config), _without_numbers(not result.extras.values), _trainable_later(model):
            wrapped = PeftModel(model, config, adapter_name)  # type: ignore[arg-type]
        write_factors(result, wrapped.base_model.model, adapter_name)  # type: ignore[arg-type]
        write_extras(result, wrapped.base_model.model, adapter_name)  # type: ignore[arg-type]
    return wrapped


def refuse_around_peft(model: nn.Module) -> None:
    """What torch.compile or DataParallel has put around a ``PeftModel`` is none itself, and holds one that can be given.

    Raises:
        OptionError: it is such.
    """
    inner = next((name for name, part in model.named_modules() if isinstance(part, (PeftModel, PeftMixedModel))), "")
    if inner:
        raise OptionError(
            f"the {type(model).__name__} is put around a PeftModel: expected that one itself; give it, model.get_submodule('{inner}'), and "
            "compile or distribute the model afterwards"
        )


def install_in_tuner(
    result: MergeResult, tuner: LoraModel | MixedModel, adapter_name: str, seen: LiveModel | None = None
) -> None:
    """Add ``result`` as a frozen, inactive adapter; on any failure the model is as before.

    Args:
        result: The merge.
        tuner: Of the model.
        adapter_name: The new adapter's name.
        seen: What ``LiveModel.of(tuner.model)`` has found, where somebody has looked already.

    Raises:
        OptionError: the name is taken or holds a dot.
        OutputError: a module is missing or has another shape, or the model would route to the adapter.
    """
    seen = seen or LiveModel.of(tuner.model)
    check_name(adapter_name, tuner.peft_config, seen)
    check_state(tuner, seen)
    check_modules(result, seen)
    check_extras(result, tuner.model, shared=True)
    config = _config_for(result, seen)
    with unchanged_but_for(tuner, adapter_name):
        tuner.peft_config[adapter_name] = config
        # What stands outside the factors is copied.
        empty = not result.extras.values and not (_FILLED and isinstance(tuner, MixedModel))
        # What is drawn at random is replaced at once, and is none of the program's own draws.
        chance = torch.random.fork_rng(devices=[])
        with chance, _readable_refusals(config), _without_numbers(empty), _trainable_later(tuner):
            tuner.inject_adapter(tuner.model, adapter_name)
        write_factors(result, tuner.model, adapter_name)
        write_extras(result, tuner.model, adapter_name)


def _without_numbers(empty: bool) -> AbstractContextManager[object]:
    """New factors on the meta device: random numbers, which are replaced at once, take as long as the merge. PEFT's own
    ``low_cpu_mem_usage`` patches ``nn.Module`` for all threads of the process; this is for the calling one."""
    return torch.device("meta") if empty else nullcontext()


def _trainable_later(model: nn.Module) -> AbstractContextManager[object]:
    """What PEFT makes outlives the caller's inference mode; a model that was made in one can't be changed outside of it."""
    inside = torch.is_inference_mode_enabled() and any(parameter.is_inference() for parameter in model.parameters())
    return torch.inference_mode(inside)


def check_name(adapter_name: str, taken: Any, seen: LiveModel | None = None) -> None:
    """A new adapter's name: not taken, no dot (torch's module names can't hold one), not empty; and beside other adapters no part of
    the path of a tensor: PEFT takes all tensors with an adapter's name in their paths for that adapter's."""
    if adapter_name in taken:
        raise OptionError(
            f"the model already has an adapter '{adapter_name}': expected a new name; delete it first with "
            f"model.delete_adapter('{adapter_name}')"
        )
    if not isinstance(adapter_name, str) or not adapter_name or "." in adapter_name:
        raise OptionError(f"the adapter name {adapter_name!r} is empty or holds a dot: expected a name without dots")
    if hasattr(nn.ModuleDict, adapter_name) or hasattr(nn.ParameterDict, adapter_name):
        raise OptionError(
            f"the adapter name '{adapter_name}' is a name that torch's containers reserve: expected another"
        )
    if seen is not None and adapter_name in seen.words:
        raise OptionError(
            f"the adapter name '{adapter_name}' is a part of names of modules or parameters of the model: expected another, since "
            f"PEFT's save_pretrained would leave everything under '{adapter_name}' out of the other adapters"
        )


def check_state(tuner: nn.Module, seen: LiveModel) -> None:
    """The model can take an adapter in and stay as it is: Arrow routes to every adapter that is added, and PEFT unmerges first what is
    merged into the base weights.

    Raises:
        OutputError: it can't.
    """
    configs: dict[str, Any] = tuner.peft_config  # type: ignore[assignment]
    for name, config in configs.items():
        if getattr(config, "arrow_config", None) is not None:
            raise OutputError(
                f"adapter '{name}' of the model routes between all its other ones (arrow_config), and would between them and the merged "
                f"one: expected a model without a router; call model.delete_adapter('{name}') first, or merge the adapters from disk"
            )
    merged = {
        name: None
        for module in seen.modules.values()
        if isinstance(module, BaseTunerLayer)
        for name in module.merged_adapters
    }
    if merged:
        raise OutputError(
            f"the model has adapters merged into its base weights at the moment ({', '.join(merged)}), which PEFT would take out of them: "
            "expected unmerged adapters; call model.unmerge_adapter() first"
        )


def check_modules(result: MergeResult, seen: LiveModel) -> None:
    """Every merged module exists in the model with the same layer type and shape, where PEFT can wrap it."""
    modules = seen.plain
    wrapped = {plain_path(name) for name, module in seen.modules.items() if isinstance(module, LoraLayer)}
    layouts = {name: merged.layout for name, merged in result.modules.items()}
    paths = {name: layout.base_path(name) for name, layout in layouts.items()}
    missing = dict.fromkeys(path for path in paths.values() if path not in modules)
    if missing:
        raise OutputError(
            f"the model has no module {preview(missing)}: expected the base model of the adapters; its class may differ "
            "from the one they were trained with" + elsewhere(layouts, modules.__contains__, modules, result.rename)
        )
    for name, merged in result.modules.items():
        module = modules[paths[name]]
        base = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
        place = place_of(name, base, merged.layout, merged.delta.shape)
        if place.layout != merged.layout or (place.shape is not None and place.shape != merged.delta.shape):
            raise OutputError(
                f"'{name}' is of type {place.layout} and shape {place.shape} in the model, {merged.layout} and {merged.delta.shape} in the merged "
                "adapter: expected the base model of the adapters" + other_size(name, place, merged.layout)
            )
        hook = seen.offloading.find(base, place.parameter) if paths[name] not in wrapped else None
        if hook and hook.key != place.parameter:
            raise OutputError(
                f"'{name}' is offloaded as a part of its block (preload_module_classes), where PEFT can't put a layer around it: "
                "expected a model offloaded layer by layer; offload it after the adapter is in"
            )


def write_factors(result: MergeResult, model: nn.Module, adapter_name: str) -> None:
    """Replace the freshly made parameters of the adapter by the merged factors, and biases on lora_B, where their layers are.

    On an offloaded layer PEFT makes them meta tensors. The merged ones are real: nothing would bring their numbers.

    Raises:
        OutputError: PEFT wrapped other modules than the merged ones, or splits new factors over devices.
    """
    seen = LiveModel.of(model)  # PEFT has just put layers into it
    layers, offloading = seen.layers(adapter_name), seen.offloading
    expected = {merged.layout.layer(name) for name, merged in result.modules.items()}
    if set(layers) != expected:
        difference = sorted(set(layers) ^ expected)
        raise OutputError(f"PEFT wrapped other modules than the merged ones: {preview(difference)} differ")
    biases = lora_biases(result)
    hooked: list[tuple[Offloaded, nn.Parameter]] = []
    for path, _, *factors in stored_factors(result):
        layer = layers[path]
        holders = [*factor_holders(layer, adapter_name)]
        if path in biases:
            holders, factors = [*holders, (layer.lora_B[adapter_name], "bias")], [*factors, biases[path]]
        for (holder, key), factor in zip(holders, factors, strict=True):
            fresh: nn.Parameter = getattr(holder, key)
            if hasattr(fresh, "device_mesh"):
                raise split_by_peft(path)
            if fresh.shape != factor.shape:
                raise OutputError(
                    f"'{path}' takes factors of shape {tuple(fresh.shape)} in the model, the merged adapter has "
                    f"{tuple(factor.shape)}: expected adapters of this base model, made by a PEFT that lays them out as this one"
                )
            device = _device_of(layer, fresh, offloading) or factor.device
            with torch.inference_mode(False):  # it outlives the caller's
                factor = factor.clone() if factor.is_inference() else factor
                parameter = nn.Parameter(factor.to(device), requires_grad=False)
            setattr(holder, key, parameter)
            if place := offloading.find(holder, key):  # its hook drops and brings every tensor below it
                hooked.append((place, parameter))
    for place, parameter in hooked:  # last, since it can't fail
        place.write(parameter)


def _device_of(layer: LoraLayer, fresh: nn.Parameter, offloading: Offloading) -> torch.device | None:
    """Where a layer computes; None where nothing says so, as for a base layer on the meta device."""
    base = layer.get_base_layer()
    if place := offloading.find(base, "weight"):
        return place.device
    if not fresh.is_meta:
        return fresh.device
    return next((parameter.device for parameter in base.parameters() if not parameter.is_meta), None)


def _config_for(result: MergeResult, seen: LiveModel) -> LoraConfig:
    """A fresh config whose targets resolve, by PEFT's own rule, to exactly the merged modules of this model."""

    def resolve(targets: Targets) -> Iterator[str]:
        config = LoraConfig(**targets.to_config())
        return (name for name in seen.own if _matches(config, name))

    fields = lora_fields(result, resolve)
    fields.pop("peft_type")
    return LoraConfig(**fields)


def _matches(config: LoraConfig, name: str) -> bool:
    """PEFT's own rule, which answers with a bool, a regex match, None, or an object that stands for "excluded"."""
    found = check_target_module_exists(config, name)
    return bool(found) and type(found).__name__ != "_ExcludedModule"


@contextmanager
def _readable_refusals(config: LoraConfig) -> Iterator[None]:
    """PEFT's own rules for what it adapts, which differ between its versions, as an error of this library."""
    try:
        yield
    except (ValueError, TypeError) as error:
        if not config.target_parameters:
            raise OutputError(
                f"PEFT can't add the adapter to this model ({first_line(error)}): expected the base model of the adapters, with layers "
                "that PEFT adapts"
            ) from error
        raise OutputError(
            f"PEFT can't add an adapter with target_parameters {sorted(config.target_parameters)} to this model ({first_line(error)}): "
            "expected one that all its adapters allow; save the merged adapter and load it into a fresh base model"
        ) from error

"""Which layers of a model statistics are collected from, and what passes through them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from dc_merge_peft.errors import OptionError, SourceError, UnsupportedAdapterError, preview, unknown_name
from dc_merge_peft.layers import delta_shape, layer_layout
from dc_merge_peft.layout import Layout
from dc_merge_peft.lowrank import all_finite
from dc_merge_peft.sources.targeting import ends_in


@dataclass(frozen=True, eq=False)
class Watched:
    """A layer with one weight: ``rows(input) @ W^T + bias`` is its output, position by position."""

    module: nn.Module  # whose input and output these are: of a PEFT model the LoRA layer around the base layer
    layer: nn.Module  # with the weight
    layout: Layout
    shape: tuple[int, int]  # (m, n) of the weight as a matrix

    def rows(self, x: Tensor) -> Tensor:
        """The inputs of the matrix, (.., n): of a convolution the (examples, positions, n) patches."""
        return patches(x, self.layer) if self.layout.kind == "conv" else x

    def gradients(self, g: Tensor) -> Tensor:
        """A gradient by the output in the order of :meth:`rows`: (.., m)."""
        return g.flatten(2).mT if self.layout.kind == "conv" else g


def watched(model: nn.Module, modules: Sequence[str] | None) -> dict[str, Watched]:
    """The layers by their path in the base model.

    Args:
        model: A PEFT model with one active adapter, or any other.
        modules: Paths in the base model, or their trailing parts as in PEFT's target modules; none: the layers of the adapter.

    Raises:
        OptionError: no such modules, or none named for a model without adapters; several active adapters, or none.
        UnsupportedAdapterError: a layer that is neither Linear, Conv1D nor a convolution.
    """
    layers = adapted_layers(model) if has_adapters(model) else None
    if layers is None:
        if modules is None:
            raise OptionError(
                "found a model without adapters: expected modules=[...], the paths of the layers that the adapters change, as in "
                "the keys of MergedAdapter.modules, or a PEFT model with one active adapter"
            )
        layers = dict(model.named_modules())
    if isinstance(modules, str):
        raise OptionError(f"modules is {modules!r}: expected a list of names, as in ['q_proj', 'v_proj']")
    if modules is not None:
        if not modules:
            raise OptionError(
                "found an empty list of modules: expected one at least, or none for those of the active adapter"
            )
        if unmatched := [name for name in modules if not any(ends_in(path, name) for path in layers)]:
            raise OptionError(unknown_name("module of the model", unmatched[0], _leaves(layers)))
        layers = {path: layer for path, layer in layers.items() if any(ends_in(path, name) for name in modules)}
    return {path: _watched(path, layer) for path, layer in layers.items()}


def has_adapters(model: nn.Module) -> bool:
    """Whether a model is one of PEFT, or has adapters injected. Before version 0.19 PEFT leaves its ``peft_config`` on a model
    that it takes the adapters off."""
    if not hasattr(model, "peft_config"):
        return False
    from peft import PeftMixedModel, PeftModel
    from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer

    return isinstance(model, (PeftModel, PeftMixedModel, BaseTuner)) or any(
        isinstance(module, BaseTunerLayer) for module in model.modules()
    )


def adapted_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The LoRA layers of the one active adapter of a PEFT model, by their path in the base model.

    Raises:
        OptionError: several active adapters, or none.
    """
    from peft.tuners.tuners_utils import BaseTuner

    from dc_merge_peft.sources.live_model import LiveModel

    # A PeftModel, its tuner, or a model into which adapters were injected.
    inside: Any = getattr(model, "base_model", None)
    tuner: Any = inside if isinstance(inside, BaseTuner) else model
    adapter = active_adapter(model)
    layers: Any = LiveModel.of(tuner.model if isinstance(tuner, BaseTuner) else tuner).layers(adapter)
    if not layers:
        raise OptionError(f"adapter '{adapter}' has no LoRA layers in the model: expected at least one; was it loaded?")
    off = [path for path, layer in layers.items() if layer.disable_adapters]
    if off:
        raise OptionError(f"adapters are disabled in {preview(off)}: expected the fine-tuned model; enable them first")
    return dict(layers)


def active_adapter(model: nn.Module) -> str:
    """The name of the one active adapter of a PEFT model.

    Raises:
        OptionError: several active adapters, or none.
    """
    from peft.tuners.lora import LoraLayer

    active = sorted(
        {name for layer in model.modules() if isinstance(layer, LoraLayer) for name in layer.active_adapters}
    )
    if len(active) != 1:
        raise OptionError(
            f"found {len(active)} active adapters ({preview(active)}): expected the one whose data this is; call set_adapter first"
        )
    return active[0]


@contextmanager
def recording(layers: Mapping[str, Watched], see: Callable[[str, Tensor, Tensor], Tensor | None]) -> Iterator[None]:
    """Call ``see(path, input, output)`` on each pass through each layer; what it gives takes the output's place."""

    def hook_of(path: str) -> Callable[..., Any]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
            return see(path, args[0] if args else next(iter(kwargs.values())), output)

        return hook

    hooks = [layer.module.register_forward_hook(hook_of(path), with_kwargs=True) for path, layer in layers.items()]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def refuse_unseen(layers: Mapping[str, Watched], seen: Sequence[str] | set[str]) -> None:
    """Refuse layers that the data never went through.

    Raises:
        OptionError: there are some.
    """
    if unseen := [path for path in layers if path not in seen]:
        raise OptionError(
            f"nothing of the data went through {preview(unseen)}: expected layers that the model calls; leave them out of modules, or "
            "give forward= a function that uses them"
        )


def refuse_spoilt(path: str, values: Tensor) -> None:
    """Refuse statistics that are not finite.

    Raises:
        SourceError: they are not.
    """
    if not all_finite(values):
        raise SourceError(
            f"the data makes NaN or Inf at '{path}': expected finite inputs and gradients; compute in float32 or bfloat16, and look "
            "for damaged examples"
        )


def patches(
    x: Tensor,  # (examples, channels, *sizes)
    layer: nn.Module,
) -> Tensor:  # (examples, positions, channels * kernel)
    """What a convolution without groups and dilation multiplies its weight by at each position of its output."""
    kernel, stride, padding = layer.kernel_size, layer.stride, layer.padding  # type: ignore[union-attr]
    dims = len(kernel)  # type: ignore[arg-type]
    if padding == "same":  # as torch: the odd one goes behind
        pads = [((k - 1) // 2, k - 1 - (k - 1) // 2) for k in kernel]  # type: ignore[union-attr]
    else:
        pads = [(0, 0)] * dims if padding == "valid" else [(p, p) for p in padding]  # type: ignore[union-attr]
    x = nn.functional.pad(x, [side for pair in reversed(pads) for side in pair])
    for dim in range(dims):
        x = x.unfold(2 + dim, kernel[dim], stride[dim])  # type: ignore[index]
    examples, channels = x.shape[:2]
    x = x.permute(0, *range(2, 2 + dims), 1, *range(2 + dims, 2 + 2 * dims))
    return x.reshape(examples, -1, channels * x[0, (0,) * dims, 0].numel() if x.numel() else 0)


def _watched(path: str, module: nn.Module) -> Watched:
    layer = module.get_base_layer() if hasattr(module, "get_base_layer") else module  # type: ignore[operator]
    layout = layer_layout(path, layer)
    shape = delta_shape(layer)
    wraps_parameters = type(module).__name__ == "ParamWrapper"
    if layout.kind not in ("linear", "conv") or shape is None or wraps_parameters:
        raise UnsupportedAdapterError(
            f"'{path}' is a {type(layer).__name__}: statistics are collected from Linear, Conv1D and convolutions; leave it out of modules, "
            "and merge it by a method without data"
        )
    return Watched(module, layer, layout, shape)


def _leaves(layers: Mapping[str, nn.Module]) -> list[str]:
    """Last parts of the paths of layers that have weights."""
    return sorted({path.rpartition(".")[2] for path, layer in layers.items() if path and hasattr(layer, "weight")})

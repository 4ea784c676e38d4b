"""Where merged modules belong in a base model, and which of its modules share their weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor, nn

from dc_merge_peft.errors import OutputError, UnsupportedAdapterError, preview
from dc_merge_peft.layers import Place, other_size, place_of
from dc_merge_peft.layout import Layout
from dc_merge_peft.lowrank import all_finite
from dc_merge_peft.own_forward import multiplies_by_its_weight, own_pass
from dc_merge_peft.sources.base_model import elsewhere, path_in_model
from dc_merge_peft.sources.ties import sharing


@dataclass(frozen=True)
class Target:
    """The layer of one merged module."""

    name: str  # of the merged module
    path: str  # of the layer in the base model
    module: nn.Module  # the layer
    place: Place

    @property
    def parameter(self) -> Any:
        """The parameter that the delta is added to."""
        return getattr(self.module, self.place.parameter)

    @property
    def parameter_name(self) -> str:
        """Its name in the base model."""
        return f"{self.path}.{self.place.parameter}"

    @property
    def flipped(self) -> bool:
        """Whether the parameter holds the (m, n) delta as (n, m)."""
        return self.place.layout.kind == "embedding" or self.place.transposed

    def in_stack(self, shape: Sequence[int]) -> bool:
        """Whether a parameter of this shape holds one matrix an expert."""
        return self.place.layout.kind == "expert" and len(shape) == 3

    def part_of(self, whole: Tensor) -> Tensor:
        """What of the parameter the delta is added to: all, or one expert's matrix."""
        return whole[self.place.layout.number(self.name)] if self.in_stack(whole.shape) else whole


def refuse_unless_finite(weight: Tensor, name: str) -> None:
    """A sum that its type can't hold, or of a base weight that was no number, must not become a model.

    Raises:
        OutputError: one of the numbers is NaN or infinite.
    """
    if weight.is_floating_point() and not all_finite(weight):
        raise OutputError(
            f"base weight and delta of '{name}' give NaN or Inf in {str(weight.dtype).removeprefix('torch.')}: expected finite base "
            "weights, and sums that this type can hold; look at the base model, or give smaller weights or alpha"
        )


def find_targets(
    model: nn.Module,
    wanted: Mapping[str, tuple[Layout, tuple[int, int]]],
    rename: str | None,
    unreadable: Callable[[Target], str | None],
) -> Iterator[Target]:
    """The layer of every merged module and the place of its delta there, checked.

    Args:
        model: A base model.
        wanted: The merged modules with their layouts and the shapes (m, n) of their deltas.
        rename: Under which the adapters were read.
        unreadable: What keeps the weight of a target from being changed; None where nothing does.

    Raises:
        OutputError: a module is missing, has another shape or layer type, or shares its weight with another module.
        UnsupportedAdapterError: a weight that can't be changed.
    """
    shared = sharing(model)
    layouts = {name: layout for name, (layout, _) in wanted.items()}
    for name, (layout, shape) in wanted.items():
        base_path = layout.base_path(name)
        path = path_in_model(model, base_path)
        if path is None:
            raise OutputError(
                f"the base model, a {type(model).__name__}, has no module {preview([base_path])}: expected the base model of the "
                "adapters; give the model object of the class they were trained with"
                + elsewhere(layouts, partial(path_in_model, model), dict(model.named_modules()), rename)
            )
        module = model.get_submodule(path)
        target = Target(name, path, module, place_of(name, module, layout, shape))
        place = target.place
        weight = getattr(module, place.parameter, None)
        if place.layout != layout or place.shape != shape or weight is None:
            raise OutputError(
                f"'{name}' is of type {place.layout} and shape {place.shape} in the base model, {layout} and {shape} in the merged "
                "adapter: expected the base model of the adapters" + other_size(name, place, layout)
            )
        _refuse_unchangeable(target, weight, unreadable(target))
        if others := [other for other in shared.get(path, ()) if other != path]:
            raise OutputError(
                f"'{name}' shares its weight with {preview(others)}, and the merged adapter changes each by itself: in a fused model "
                "they would be one; untie them first (tie_word_embeddings=False in the config, and the weight saved for each), or keep the "
                "merged adapter"
            )
        yield target


def _refuse_unchangeable(target: Target, weight: Tensor, unreadable: str | None) -> None:
    """A weight that base + delta can't be written to, or would not be what was trained."""
    name, kind = target.name, target.place.layout.kind
    if unreadable is not None:
        raise UnsupportedAdapterError(
            f"the weight of '{name}' {unreadable}: expected a whole one; load the model without that, or keep the merged adapter"
        )
    if kind == "out_proj":
        raise UnsupportedAdapterError(
            f"'{name}' is the output projection of a MultiheadAttention, to which PEFT's forward pass adds the delta twice, so "
            "that base + delta is not the model that was trained: expected other layers; merge the adapters (dc-merge merge), load the "
            "result with PeftModel.from_pretrained and call merge_and_unload(), which does as the forward pass"
        )
    # Numbers of one byte come with scales, and tensors of a class of their own may be anything inside, as torchao's.
    if not weight.is_floating_point() or weight.element_size() < 2 or type(weight.data) is not Tensor:
        packed = weight.dtype if type(weight.data) is Tensor else type(weight.data).__name__
        raise UnsupportedAdapterError(f"'{name}' is quantised ({packed}): expected floating-point base weights")
    if kind != "expert" and not multiplies_by_its_weight(target.module):
        raise UnsupportedAdapterError(
            f"{own_pass(name, target.module)}: expected a layer as torch's; keep the merged adapter, or leave that module out"
        )

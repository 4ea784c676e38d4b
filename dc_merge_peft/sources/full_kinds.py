"""Which stored tensors of a full model are merged as matrices, and which are averaged: by the type of their layer.

Directions belong to maps: the weights of linear layers, of ``Conv1D``, of convolutions and of experts. Embeddings, position
tables, norms and biases have none to preserve, and heads belong to their task; of those, as of everything else, the mean is
taken, which is the paper's rule for all that is no matrix.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from dc_merge_peft.errors import OptionError, UnsupportedAdapterError
from dc_merge_peft.layers import layer_layout
from dc_merge_peft.layout import Layout
from dc_merge_peft.own_forward import CONVOLUTIONS, multiplies_by_its_weight, own_pass
from dc_merge_peft.sources.base_names import FiledModel
from dc_merge_peft.sources.stored import StoredTensor
from dc_merge_peft.sources.targeting import ends_in
from dc_merge_peft.sources.ties import sharing_parameters

# PEFT refuses LoRA on layers of these names in models of these types.
_MAMBA, _MAMBA_REFUSED = {"falcon_h1", "falcon_mamba", "mamba", "mamba2", "nemotron_h"}, {"conv1d", "out_proj"}


@dataclass(frozen=True)
class StoredMatrix:
    """A matrix of the merge in a stored tensor, which is one or, of experts, a stack of several."""

    name: str  # of the module in the merge
    key: str  # of the stored tensor
    shape: tuple[int, int]  # (m, n) of the delta
    layout: Layout
    transposed: bool  # stored as (n, m)

    @property
    def module(self) -> str:
        """The path of its layer in the model."""
        return self.layout.base_path(self.name)

    def of(self, tensor: StoredTensor) -> StoredTensor:
        """The bytes of this matrix in a tensor of the same shape as the stored one, of whatever type."""
        if self.layout.kind != "expert":
            return tensor
        size = tensor.size // tensor.shape[0]
        start = tensor.offset + self.layout.number(self.name) * size
        return replace(tensor, offset=start, size=size, shape=tensor.shape[1:])


@dataclass(frozen=True)
class _Map:
    """A parameter that is a matrix, or a stack of them."""

    layout: Layout
    transposed: bool = False


class Kinds:
    """The rule, for the parameters of one base model."""

    def __init__(self, model: FiledModel, average: Sequence[str] = (), *, tasks: int, lora: bool = False) -> None:
        """
        Args:
            model: The base model.
            average: Parameters that are averaged beside those of the rule: trailing parts of their names or of their layers',
                or regular expressions of whole names.
            tasks: The number of models; a matrix with fewer rows or columns has no direction for each and is averaged.
            lora: The result is to be a LoRA adapter, so that every layer has to be one that PEFT adapts.

        Raises:
            OptionError: a pattern that is no regular expression, or that no parameter matches.
        """
        self._model, self._tasks, self._lora = model, tasks, lora
        self._skeleton: Any = model.skeleton
        self._patterns = [_Pattern(text) for text in average]
        self._parameters = dict(self._skeleton.named_parameters(remove_duplicate=False))
        self._tied = {name for group in sharing_parameters(self._skeleton) for name in group}
        prefix = getattr(self._skeleton, "base_model_prefix", "")
        has_backbone = bool(prefix) and isinstance(getattr(self._skeleton, prefix, None), nn.Module)
        self._backbone = f"{prefix}." if has_backbone else ""
        self._head = _output_embeddings(self._skeleton)
        names = [name for name in self._skeleton.state_dict() if model.has(name)]
        for pattern in self._patterns:
            if not any(pattern.matches(name) for name in names):
                raise OptionError(
                    f"average is '{pattern.text}', which no parameter of the base model matches: expected trailing parts of a name, "
                    f"as in '{names[0].rpartition('.')[0]}', or a regular expression of whole names"
                )

    def matrices(self, key: str, names: Sequence[str]) -> tuple[StoredMatrix, ...]:
        """The matrices in a stored tensor; none where it is averaged.

        Args:
            key: Of the stored tensor.
            names: The parameters that it is, or that consist of it.

        Raises:
            UnsupportedAdapterError: a layer that no LoRA adapter can hold, where that is wanted.
        """
        found = [self._map(name) for name in names]
        maps = [one for one in found if one is not None]
        if not maps or len(maps) < len(found):
            return ()
        shape = self._model.files.tensors[key].shape
        made = tuple(self._in(key, names[0], maps[0], shape, converted=self._model.stored(names[0]).converted))
        if any(min(matrix.shape) < self._tasks for matrix in made):
            return ()
        if self._lora:
            self._refuse_without_lora(names[0], made)
        return made

    def _in(self, key: str, name: str, one: _Map, shape: tuple[int, ...], *, converted: bool) -> Iterator[StoredMatrix]:
        path = name.removesuffix(".weight").removesuffix(".in_proj_weight")
        if one.layout.kind == "expert" and len(shape) == 3:
            m, n = shape[1:]
            for number in range(shape[0]):
                layout = replace(one.layout, experts=shape[0])
                yield StoredMatrix(
                    f"{key if converted else path}[{number}]",
                    key,
                    (n, m) if one.transposed else (m, n),
                    layout,
                    one.transposed,
                )
        elif converted or one.layout.kind == "expert":
            # Stored as linear layers are, one by one or several side by side.
            if len(shape) == 2:
                yield StoredMatrix(key.removesuffix(".weight"), key, (shape[0], shape[1]), Layout(), False)
        else:
            m, n = shape[0], math.prod(shape[1:])
            yield StoredMatrix(path, key, (n, m) if one.transposed else (m, n), one.layout, one.transposed)

    def _map(self, name: str) -> _Map | None:
        """What a parameter is by its layer; None for what is averaged."""
        path, _, leaf = name.rpartition(".")
        outside = not name.startswith(self._backbone) or path in self._head
        if outside or name in self._tied or path.rpartition(".")[2] == "text_projection":
            return None
        if name not in self._parameters or any(pattern.matches(name) for pattern in self._patterns):
            return None
        owner, shape = self._skeleton.get_submodule(path), self._parameters[name].shape
        if leaf == "in_proj_weight" and isinstance(owner, nn.MultiheadAttention):
            return _Map(Layout("in_proj"))
        if len(shape) == 3 and getattr(owner, "num_experts", None) == shape[0]:
            return _Map(
                Layout("expert", experts=shape[0], parameters=(leaf,)), bool(getattr(owner, "is_transposed", False))
            )
        if leaf != "weight":
            return None
        if isinstance(owner, nn.Linear):
            return _Map(Layout())
        if type(owner).__name__ == "Conv1D" and len(shape) == 2:  # of transformers: (in, out)
            return _Map(Layout(), transposed=True)
        if isinstance(owner, CONVOLUTIONS) and owner.groups == 1:
            return _Map(Layout("conv", tuple(owner.kernel_size)))
        return None

    def _refuse_without_lora(self, name: str, made: Sequence[StoredMatrix]) -> None:
        path = name.rpartition(".")[0]
        layer = self._skeleton.get_submodule(path)
        if not multiplies_by_its_weight(layer):
            raise UnsupportedAdapterError(
                f"{own_pass(path, layer)}: expected a layer as torch's; leave it out by average (--average), or write the full model "
                "(without lora_rank)"
            )
        kind = getattr(getattr(self._skeleton, "config", None), "model_type", None)
        if kind in _MAMBA and path.rpartition(".")[2] in _MAMBA_REFUSED:
            raise UnsupportedAdapterError(
                f"'{name}' is a layer on which PEFT refuses LoRA in models of type '{kind}', whose fused kernels go past the adapter, so that "
                "it would not load: expected other layers; leave it out by average (--average), or write the full model (without lora_rank)"
            )
        fits = made[0].module == path and layer_layout(path, layer).kind in ("linear", "conv")
        if not fits:
            raise UnsupportedAdapterError(
                f"'{name}' belongs to experts or to an attention module, whose delta is not extracted as a LoRA: expected linear "
                "layers and convolutions; leave it out by average (--average), or write the full model (without lora_rank)"
            )


@dataclass(frozen=True)
class _Pattern:
    text: str

    def __post_init__(self) -> None:
        try:
            re.compile(self.text)
        except re.error as error:
            raise OptionError(
                f"average is '{self.text}', which is no regular expression ({error}): expected trailing parts of a name, or a "
                "regular expression of whole names"
            ) from error
        if not self.text.strip():
            raise OptionError(
                "average is empty: expected trailing parts of a name, or a regular expression of whole names"
            )

    def matches(self, name: str) -> bool:
        layer = name.rpartition(".")[0]
        return any(ends_in(part, self.text) or re.fullmatch(self.text, part) for part in (name, layer) if part)


def tensors_of(model: FiledModel) -> Mapping[str, list[str]]:
    """For each stored tensor that the model's class uses, the parameters and buffers that it is or that consist of it."""
    found: dict[str, list[str]] = {}
    for name in model.skeleton.state_dict():
        if model.has(name):
            for key in model.stored(name).keys:
                found.setdefault(key, []).append(name)
    return {key: found[key] for key in model.files.tensors if key in found}


def _output_embeddings(skeleton: Any) -> set[str]:
    """The paths of a language model's head."""
    try:
        head = skeleton.get_output_embeddings()
    except (AttributeError, NotImplementedError):
        return set()
    return {path for path, module in skeleton.named_modules() if head is not None and module is head}

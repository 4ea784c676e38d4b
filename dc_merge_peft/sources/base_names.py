"""Under which names a base model's files hold the parameters of its class, without loading any.

transformers renames tensors while it loads them: it adds and takes away prefixes, carries names of old versions over, and
joins what is stored in parts, such as the experts of a mixture. The same rules, asked of an empty model, say which stored
tensors a parameter consists of; and they can be turned round, as transformers does to save a model under its old names.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dc_merge_peft.errors import SourceError, first_line, preview
from dc_merge_peft.sources.base_files import BaseFiles, NotStreamable, TooOld
from dc_merge_peft.sources.base_model import BaseModel, cannot_load, model_class
from dc_merge_peft.sources.stored import StoredTensor, same
from dc_merge_peft.sources.ties import untie

# Conversions that only move numbers, so that what they do to W + dW is what they do to W, plus what they do to dW.
_MOVES = {
    "Chunk", "Split", "Concatenate", "Interleave", "MergeModulelist", "SplitModulelist", "Transpose", "PermuteForRope",
    "Conv3dToLinear", "LinearToConv3d",
}  # fmt: skip

_TOO_OLD = "this version of transformers does not say how it names what it loads"


@dataclass(frozen=True)
class Stored:
    """The stored tensors that a parameter is made of."""

    keys: tuple[str, ...]
    converted: bool  # joined, split or permuted on loading; else the one tensor, or equal ones, as they are
    companions: tuple[str, ...]  # parameters that other parts of the same stored tensors become, this one among them


class FiledModel(BaseModel):
    """A base model whose numbers stay in its files: its class without weights, and where each of them is stored."""

    def __init__(self, files: BaseFiles, *, trust_remote_code: bool = False) -> None:
        """
        Raises:
            NotStreamable: the class can't be built without weights, or this transformers can't say how it loads them.
            SourceError: the model brings code that is not trusted.
        """
        super().__init__(files.base)
        self.files = files
        self.skeleton: Any = _skeleton(files, trust_remote_code)
        self._stored = _stored(self.skeleton, files.tensors)
        untie(self.skeleton, self._differ)

    @property
    def model(self) -> nn.Module:  # type: ignore[override]
        """The class's modules with parameters that have shapes but no numbers."""
        return self.skeleton

    def has(self, name: str) -> bool:
        """Whether the files hold a parameter or buffer under this name of it."""
        return name in self._stored

    def stored(self, name: str) -> Stored:
        """The stored tensors of a parameter or buffer.

        Raises:
            NotStreamable: there are none of that name.
        """
        found = self._stored.get(name)
        if found is None:
            raise NotStreamable(f"its files have no tensor for '{name}'")
        return found

    def tensor(self, name: str, key: str | None = None) -> StoredTensor:
        """The stored tensor that is the parameter or buffer as it is: its only one, or the one under ``key``.

        Raises:
            NotStreamable: it is made of others on loading.
        """
        found = self.stored(name)
        tensor = self.files.tensors[key or found.keys[0]]
        if found.converted or tensor.shape != self.shape(name):
            raise NotStreamable(f"'{name}' is made of other tensors on loading")
        return tensor

    def _differ(self, *names: str) -> bool:
        """Whether the files hold two parameters as they are, and other numbers for each."""
        found = [self._stored[name] for name in names if name in self._stored]
        if len(found) < 2 or any(one.converted for one in found):
            return False
        first, second = (self.files.tensors[one.keys[0]] for one in found)
        return first.shape != second.shape or not same(first, second)

    def shape(self, name: str) -> tuple[int, ...]:
        """Of a parameter or buffer."""
        owner, _, leaf = name.rpartition(".")
        return tuple(getattr(self.skeleton.get_submodule(owner), leaf).shape)

    def weight(self, path: str) -> object:
        """The weight of a layer, read now."""
        tensor = self.tensor(f"{path}.weight")
        return tensor.read() if tensor.torch_dtype else torch.empty(0, dtype=torch.uint8)  # bytes: quantised

    def to_stored(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What values of converted parameters are in each of their stored tensors.

        Args:
            values: By parameter; all that consist of parts of the same stored tensors.

        Raises:
            NotStreamable: the conversion can't be turned round.
        """
        from transformers.core_model_loading import revert_weight_conversion

        keys = {key for name in values for key in self.stored(name).keys}
        try:
            pieces = revert_weight_conversion(self.skeleton, dict(values))
        except Exception as error:  # conversions are code of many authors
            raise NotStreamable(f"what is done to {preview(values)} on loading can't be turned round") from error
        shapes = {key: tuple(piece.shape) for key, piece in pieces.items()}
        if shapes != {key: self.files.tensors[key].shape for key in keys}:
            raise NotStreamable(f"what is done to {preview(values)} on loading can't be turned round")
        return pieces


def _skeleton(files: BaseFiles, trust_remote_code: bool) -> Any:
    import transformers

    place = files.folder
    try:
        config = transformers.AutoConfig.from_pretrained(place, trust_remote_code=trust_remote_code)
        kind = model_class(config)
        with torch.device("meta"), torch.random.fork_rng(devices=[]):
            if issubclass(kind, transformers.PreTrainedModel):
                return kind(config)
            return kind.from_config(config, trust_remote_code=trust_remote_code)
    except Exception as error:  # transformers and code of the model's own can raise anything
        if "trust_remote_code" in str(error):
            raise SourceError(cannot_load(error, files.base, None, ())) from error
        raise NotStreamable(f"its class can't be built without weights ({type(error).__name__})") from error


def _stored(model: Any, keys: Iterable[str]) -> Mapping[str, Stored]:
    """By parameter or buffer of a model what it is made of; the rules are those of transformers' own loading."""
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key
    except ImportError as error:
        raise TooOld(_TOO_OLD) from error
    if not hasattr(WeightRenaming, "was_used"):  # before version 5.6
        raise TooOld(_TOO_OLD)
    rules = get_model_conversion_mapping(model)
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    known, prefix = model.state_dict(), model.base_model_prefix
    by_pattern = {pattern: rule for rule in converters for pattern in rule.source_patterns}
    made_of: dict[str, list[str]] = {}
    converted: set[str] = set()
    try:
        ordered = sorted(keys, key=dot_natural_key)
    except ValueError as error:  # a digit that counts nothing, as in x.², or thousands of them
        raise NotStreamable(f"transformers can't sort the names of its tensors ({first_line(error)})") from error
    for key in ordered:
        name, pattern = rename_source_key(key, renamings, converters, prefix, known)
        if name not in known and key in known:
            name, pattern = rename_source_key(key, [], [], prefix, known)
        targets = [name]
        if pattern is not None:
            rule = by_pattern[pattern]
            targets = [name.replace(rule.target_patterns[0], target) for target in rule.target_patterns]
            if any(type(operation).__name__ not in _MOVES for operation in rule.operations):
                targets = []
            converted.update(targets)
        for target in targets:
            made_of.setdefault(target, []).append(key)
    # What transformers keeps to save the model as it was stored: see FiledModel.to_stored.
    model._weight_conversions = [rule for rule in rules if rule.was_used()]
    becomes: dict[str, list[str]] = {}
    for name, stored_keys in made_of.items():
        for key in stored_keys:
            becomes.setdefault(key, []).append(name)
    return {
        name: Stored(
            tuple(stored_keys),
            name in converted,
            tuple(dict.fromkeys(other for key in stored_keys for other in becomes[key])),
        )
        for name, stored_keys in made_of.items()
        if name in known
    }

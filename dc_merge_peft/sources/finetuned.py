"""Full fine-tuned models: their task vectors W_i - W_base, read from the files of both, one tensor at a time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from dc_merge_peft.dense import Dense
from dc_merge_peft.errors import IncompatibleAdaptersError, OptionError, SourceError
from dc_merge_peft.lowrank import all_finite
from dc_merge_peft.paths import is_dir, is_file
from dc_merge_peft.sources.base import AdapterInfo, ModuleSpec, Source
from dc_merge_peft.sources.base_files import BaseFiles, NotStreamable, NotThere, TooOld, is_here, open_base_files
from dc_merge_peft.sources.base_names import FiledModel
from dc_merge_peft.sources.cards import base_card, read_card
from dc_merge_peft.sources.full_kinds import StoredMatrix
from dc_merge_peft.sources.full_match import matched_tensors
from dc_merge_peft.sources.hub import CONFIG_FILE, HubId
from dc_merge_peft.sources.opening import listed, short_names
from dc_merge_peft.sources.stored import FLOATS, StoredTensor


@dataclass(frozen=True)
class FullModel:
    """One fine-tuned model whose tensors are those of the base model."""

    info: AdapterInfo
    files: BaseFiles
    tensors: Mapping[str, StoredTensor]  # by the base model's stored tensors that its class uses


def open_model(place: str | Path, token: str | bool | None, *, trust_remote_code: bool, what: str) -> FiledModel:
    """A model in its files.

    Args:
        place: A directory or a Hub id.
        token: For the Hub.
        trust_remote_code: Run the Python code that it brings along.
        what: How errors call it: the model, or the base model.

    Raises:
        SourceError: it can't be found, or its files don't allow to read it tensor by tensor.
    """
    here = isinstance(place, (str, Path)) and is_here(place, what)
    if here and is_file(Path(place).expanduser() / CONFIG_FILE):
        raise SourceError(
            f"{what} '{place}' is an adapter: expected full models; merge adapters with dc-merge merge, or into their base model "
            "with dc-merge fuse"
        )
    try:
        return FiledModel(open_base_files(place, token, what=what), trust_remote_code=trust_remote_code)
    except NotThere as found:
        raise SourceError(
            f"{what} '{place}' is not there: expected an existing model directory or a Hub id such as 'org/name'"
        ) from found
    except TooOld as found:
        raise SourceError(
            f"{what} '{place}' can't be read tensor by tensor, since {found}: expected version 5.6 or newer; pip install -U transformers"
        ) from found
    except NotStreamable as found:
        raise SourceError(
            f"{what} '{place}' can't be read tensor by tensor, since {found}: expected a directory or Hub id with safetensors files of "
            "a transformers model; load it and save it again with save_pretrained"
        ) from found
    except SourceError as error:
        raise SourceError(str(error).replace("the base model", what)) from error


def open_models(
    places: Sequence[str | Path], base: FiledModel, token: str | bool | None = None, *, trust_remote_code: bool = False
) -> list[FullModel]:
    """Fine-tuned models of a base model, matched with it tensor by tensor; no numbers are read.

    Raises:
        OptionError: no models, or no list of them.
        SourceError: a model can't be found or read.
        IncompatibleAdaptersError: a model of another class, with other tensors or shapes, or given twice.
    """
    places = listed(places, "model")
    if not places:
        raise OptionError("found no models to merge: expected at least one")
    names = short_names([str(place) for place in places])
    models: list[FullModel] = []
    for place in places:
        filed = open_model(place, token, trust_remote_code=trust_remote_code, what="the model")
        name = names[str(place)]
        if any(filed.files.folder.resolve() == other.files.folder.resolve() for other in models):
            raise IncompatibleAdaptersError(
                f"model '{name}' ({place}) is given twice: expected each model once; use a weight of 2 to count it double"
            )
        models.append(
            FullModel(_describe(name, place, filed, base, token), filed.files, matched_tensors(name, filed, base))
        )
    return models


def _describe(
    name: str, place: str | Path, model: FiledModel, base: FiledModel, token: str | bool | None
) -> AdapterInfo:
    hub_id = None if is_dir(Path(place).expanduser()) else HubId.parse(str(place))
    revision = model.files.folder.name if hub_id else None
    kind = type(base.skeleton)
    base_id = None if is_dir(Path(base.files.base).expanduser()) else HubId.parse(base.files.base)
    return AdapterInfo(
        name=name,
        location=hub_id.repo if hub_id else str(place),
        revision=revision,
        base_model=base_id.repo if base_id else base.files.base,
        base_revision=base_id.revision if base_id else None,
        # What PEFT writes for adapters without a task type: the class that they belong to.
        auto_mapping={"base_model_class": kind.__name__, "parent_library": kind.__module__},
        card=base_card(hub_id.repo, revision, token=token, ask_hub=True) if hub_id else read_card(model.files.folder),
    )


class BaseReader:
    """The base model's numbers, read once for all models."""

    def __init__(self, base: FiledModel) -> None:
        self.tensors = base.files.tensors
        self._name = base.files.base
        self.read = lru_cache(maxsize=1)(self._read)

    def _read(self, matrix: StoredMatrix) -> Tensor:
        return read_finite(matrix.of(self.tensors[matrix.key]), matrix.key, f"the base model '{self._name}'")


class FullModelSource(Source):
    """The task vectors of one fine-tuned model in the layers that are merged as matrices: dense, in float32."""

    cheap = False

    def __init__(self, model: FullModel, base: BaseReader, matrices: Sequence[StoredMatrix]) -> None:
        self.info, self.files = model.info, model.files
        self._tensors, self._base = model.tensors, base
        self._matrices = {matrix.name: matrix for matrix in matrices}
        self.modules = {
            name: ModuleSpec(matrix.shape, min(matrix.shape), matrix.layout, FLOATS[base.tensors[matrix.key].dtype])
            for name, matrix in self._matrices.items()
        }

    def factors(self, module: str) -> Dense:
        matrix = self._matrices[module]
        trained = matrix.of(self._tensors[matrix.key]).read()
        check_finite(trained, matrix.key, f"model '{self.info.name}'")
        # float64 numbers may be beyond float32, which the engine refuses by name.
        kind = self._base.tensors[matrix.key].torch_dtype
        W = change(trained, self._base.read(matrix), kind).to(torch.float32).flatten(1)
        return Dense(W.mT if matrix.transposed else W)

    def unmatched_targets(self) -> list[str]:
        return []


def change(trained: Tensor, base: Tensor, kind: torch.dtype | None) -> Tensor:
    """``W_i - W_base`` in float32, or float64 where one of them is. A number of a model in another type than its base model is no
    change where it is the base model's, rounded to that type: saving in a smaller type trains nothing.

    Args:
        trained: As it is stored.
        base: In float32 or float64.
        kind: The type in which the base model is stored.
    """
    wide = torch.promote_types(torch.promote_types(trained.dtype, base.dtype), torch.float32)
    if trained.dtype in (kind, wide):
        return trained.to(wide).sub_(base)  # which are new numbers, or those that were read
    return trained.to(wide).sub_(base).masked_fill_(base.to(trained.dtype) == trained, 0)


def read_finite(tensor: StoredTensor, key: str, whose: str) -> Tensor:
    """A stored tensor in float32, or float64 where it is stored so.

    Raises:
        SourceError: it holds NaN or Inf.
    """
    numbers = tensor.read()
    check_finite(numbers, key, whose)
    return numbers if numbers.dtype == torch.float64 else numbers.to(torch.float32)


def check_finite(numbers: Tensor, key: str, whose: str) -> None:
    """
    Raises:
        SourceError: the numbers hold NaN or Inf.
    """
    if not all_finite(numbers):
        raise SourceError(
            f"'{key}' of {whose} holds NaN or Inf: expected finite numbers; the training diverged or the file is damaged, use an "
            "earlier checkpoint"
        )

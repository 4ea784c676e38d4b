"""Which tensor of a fine-tuned model belongs to which one of its base model, and what may differ between the two."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from dc_merge_peft.errors import IncompatibleAdaptersError, UnsupportedAdapterError, preview
from dc_merge_peft.sources.base_names import FiledModel
from dc_merge_peft.sources.full_kinds import tensors_of
from dc_merge_peft.sources.stored import FLOATS, StoredTensor
from dc_merge_peft.sources.ties import sharing_parameters


def matched_tensors(name: str, model: FiledModel, base: FiledModel) -> Mapping[str, StoredTensor]:
    """By the base model's stored tensors those of a model, found by the parameters that they are in the class of both: the
    files may spell them in different ways.

    Raises:
        IncompatibleAdaptersError: the model is of another class, or has other tensors, shapes or ties.
        UnsupportedAdapterError: a tensor that is quantised in the model alone.
    """
    own, expected = type(model.skeleton).__name__, type(base.skeleton).__name__
    if own != expected:
        raise IncompatibleAdaptersError(
            f"model '{name}' is a {own}, the base model a {expected}: expected models of one class, fine-tuned from this base model; "
            f"load the models as a {expected} and save them, which leaves out heads that the base model lacks (a base model that is loaded "
            "with such a head gets random numbers in it, which would be merged)"
        )
    ties, base_ties = _ties(model), _ties(base)
    if ties != base_ties:
        odd = min(ties ^ base_ties, key=sorted)
        tying, other = ("", "not ") if odd in ties else ("not ", "")
        raise IncompatibleAdaptersError(
            f"model '{name}' has {preview(sorted(odd))} {tying}tied, the base model has them {other}tied: expected models of one "
            "configuration; save one of them as the other is"
        )
    kept = _representatives(base, base_ties)
    found = _representatives(model, base_ties)
    if lost := [part for part in kept if part not in found]:
        raise IncompatibleAdaptersError(
            f"model '{name}' has no {preview(lost)}, which the base model has: expected all tensors of the base model it was "
            "fine-tuned from; save it whole, or give its own base model"
        )
    if more := [part for part in found if part not in kept]:
        raise IncompatibleAdaptersError(
            f"model '{name}' has {preview(more)}, which the base model lacks: expected the base model that it was fine-tuned from, "
            "with the same layers and heads"
        )
    tensors: dict[str, StoredTensor] = {}
    for part, holder in kept.items():
        _refuse_other_shape(name, part, model.shape(found[part]), base.shape(holder))
        here, there = base.stored(holder), model.stored(found[part])
        if here.converted != there.converted or (here.converted and len(here.keys) != len(there.keys)):
            raise IncompatibleAdaptersError(
                f"'{part}' is stored in another form in model '{name}' than in the base model: expected files of one layout; load "
                "both and save them again with this version of transformers"
            )
        others = there.keys if here.converted else there.keys[:1] * len(here.keys)  # equal ones, under several names
        for key, other in zip(here.keys, others, strict=True):
            _refuse_other_shape(name, key, model.files.tensors[other].shape, base.files.tensors[key].shape)
            tensors[key] = model.files.tensors[other]
    for key, names in tensors_of(base).items():
        if key not in tensors:  # the second name of a tie that is stored twice
            tensors[key] = tensors[base.stored(kept[_representative(names[0], base_ties)]).keys[0]]
        _refuse_quantised(name, key, tensors[key], base.files.tensors[key])
    return tensors


def _ties(model: FiledModel) -> frozenset[frozenset[str]]:
    return frozenset(frozenset(group) for group in sharing_parameters(model.skeleton))


def _representative(name: str, ties: Iterable[frozenset[str]]) -> str:
    """The first name of what may have several."""
    return next((min(group) for group in ties if name in group), name)


def _representatives(model: FiledModel, ties: frozenset[frozenset[str]]) -> dict[str, str]:
    """What the files hold by its first name, and one of the names that they hold it under."""
    found: dict[str, str] = {}
    for name in model.skeleton.state_dict():
        if model.has(name):
            found.setdefault(_representative(name, ties), name)
    return found


def _refuse_other_shape(model: str, name: str, found: tuple[int, ...], expected: tuple[int, ...]) -> None:
    if found == expected:
        return
    resized = (
        "; or, if it has other labels, merge what the models share (as with AutoModel.from_pretrained and save_pretrained, which leave "
        "the head out), and if its vocabulary was resized, resize the base model's in the same way"
        if found[1:] == expected[1:]
        else ""
    )
    raise IncompatibleAdaptersError(
        f"model '{model}' has shape {found} in '{name}', the base model has {expected}: expected models fine-tuned from this base "
        f"model; give the one that it was trained from{resized}"
    )


def _refuse_quantised(model: str, name: str, found: StoredTensor, base: StoredTensor) -> None:
    if base.dtype in FLOATS and found.dtype not in FLOATS:
        raise UnsupportedAdapterError(
            f"'{name}' of model '{model}' is quantised ({found.dtype}): expected floating-point weights; give the model as it "
            "was before"
        )

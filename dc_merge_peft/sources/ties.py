"""Which parameters of a base model are one, as tied embeddings are."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import nn


def sharing(model: nn.Module) -> dict[str, list[str]]:
    """For the paths of modules that share a parameter all those that hold it."""
    groups = [[name.rpartition(".")[0] for name in names] for names in sharing_parameters(model)]
    return {path: paths for paths in groups for path in paths}


def has_followers(model: nn.Module, path: str) -> bool:
    """Whether layers that share the weight of the embedding at ``path`` take over its trained tokens in PEFT: those of a tied input
    embedding do, others keep the rows of the base model."""
    if not getattr(getattr(model, "config", None), "tie_word_embeddings", False):
        return False
    # By its path: in transformers 4 the embeddings of a T5 are one module at three places, and PEFT puts its own at one.
    found = next(_embeddings(model), None)
    return path == next((name for name, module in model.named_modules() if module is found), None)


def sharing_parameters(model: nn.Module) -> list[list[str]]:
    """The names of parameters that are one, in groups.

    Offloaded parameters are meta tensors of their own, shared or not; there it counts what transformers declares.
    """
    holders: dict[object, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        holders.setdefault(id(parameter), []).append(name)
    for group in _declared_ties(model):
        if all(model.get_parameter(name).is_meta for name in group):
            holders[group] = list(group)
    return [names for names in holders.values() if len(names) > 1]


def untie(model: nn.Module, differ: Callable[[str, str], bool]) -> None:
    """As transformers 5 does on loading: what is declared to be one, but stored twice with different numbers, is two.

    Args:
        model: Of transformers, without numbers.
        differ: Whether two parameters are both stored, and not the same.
    """
    ties: dict[str, str] = getattr(model, "all_tied_weights_keys", {})
    for target, source in list(ties.items()):
        if differ(target, source):
            ties.pop(target)
            path, _, leaf = target.rpartition(".")
            owner, kept = model.get_submodule(path), model.get_parameter(target)
            setattr(owner, leaf, nn.Parameter(torch.empty_like(kept), requires_grad=kept.requires_grad))


def _declared_ties(model: nn.Module) -> Iterator[tuple[str, ...]]:
    """Groups of parameters that a transformers model ties, by name."""
    ties = getattr(model, "all_tied_weights_keys", None)  # transformers 5: {target: source}
    if ties is not None:
        yield from ((target, source) for target, source in ties.items())
    elif getattr(getattr(model, "config", None), "tie_word_embeddings", False):
        paths = {id(module): path for path, module in model.named_modules()}
        names = tuple(f"{paths[id(module)]}.weight" for module in _embeddings(model) if id(module) in paths)
        if len(names) == 2:
            yield names


def _embeddings(model: nn.Module) -> Iterator[nn.Module]:
    """The layers before and after a transformers model that ``tie_word_embeddings`` makes one.

    It is True by default, also where there are no words: then transformers 4 raises an error, or gives a layer of patches.
    """
    for getter in ("get_input_embeddings", "get_output_embeddings"):
        try:
            module = getattr(model, getter)()
        except (NotImplementedError, AttributeError):  # a model around one of transformers has its config alone
            continue
        if isinstance(getattr(module, "weight", None), nn.Parameter):
            yield module

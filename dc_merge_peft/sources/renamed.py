"""Adapters read under a rename, and remarks about those that may need one."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from importlib.metadata import version

from torch import Tensor
from torch.torch_version import TorchVersion

from dc_merge_peft.dense import Delta
from dc_merge_peft.errors import OptionError, SourceError, preview
from dc_merge_peft.lowrank import LowRank
from dc_merge_peft.sources.base import IN_MEMORY, AdapterInfo, Source
from dc_merge_peft.sources.experts import parameters_at, unmatched_parameters
from dc_merge_peft.sources.renames import RENAMES, new_path, rename_named
from dc_merge_peft.sources.targeting import Targets


class RenamedSource(Source):
    """An adapter whose modules have the names that they have in today's base model."""

    def __init__(self, source: Source, name: str, *, keep_extras: bool = True) -> None:
        """
        Args:
            source: The adapter.
            name: The rename.
            keep_extras: Whether tensors outside B and A may be kept. Otherwise those of modules that the rename does not know
                are no reason for a refusal, and have their old names.

        Raises:
            OptionError: no such rename, or it does not know a module of the adapter.
            SourceError: two modules would get one name.
        """
        self._source, self.directory = source, source.directory
        adapter, rename = source.info.name, rename_named(name)
        self._old = _by_new_name(source.modules, lambda path: _known_path(path, name, adapter), name, adapter)
        self.modules = {new: source.modules[old] for new, old in self._old.items()}

        def module_path(path: str) -> str:
            return _known_path(path, name, adapter) if keep_extras else new_path(path, rename) or path

        def extra_name(old: str) -> str:
            # A parameter of a module trained in full may lie deeper in it; other kinds hang on their module's own path.
            spec = source.extras[old]
            owner = old.rpartition(".")[0] if spec.kind == "module" else spec.module
            return module_path(owner) + old.removeprefix(owner)

        self._old_extras = _by_new_name(source.extras, extra_name, name, adapter)
        specs = {new: source.extras[old] for new, old in self._old_extras.items()}
        self.extras = {new: replace(spec, module=module_path(spec.module), beside=False) for new, spec in specs.items()}
        self.extras_reason, self.is_dora = source.extras_reason, source.is_dora
        parameters = _renamed_parameters(source, self._old)
        self.info, self.config = _renamed_info(source.info, name, parameters), source.config

    def scaling(self, module: str) -> float:
        return self._source.scaling(self._old[module])

    def on_cpu(self, module: str) -> bool:
        return self._source.on_cpu(self._old[module])

    def factors(self, module: str) -> Delta:
        return self._source.factors(self._old[module])

    def lora(self, module: str) -> LowRank:
        return self._source.lora(self._old[module])

    def extra(self, name: str) -> Tensor:
        return self._source.extra(self._old_extras[name])

    def magnitude(self, module: str) -> Tensor:
        return self._source.magnitude(self._old[module])

    def unmatched_targets(self) -> list[str]:
        return self._source.unmatched_targets()

    def untargeted_modules(self) -> list[str]:
        return self._source.untargeted_modules()

    def close(self) -> None:
        self._source.close()


def _known_path(path: str, name: str, adapter: str) -> str:
    """The new path of a module, which the rename must know."""
    rename = rename_named(name)
    new = new_path(path, rename)
    if new is None:
        raise OptionError(
            f"rename '{name}' does not know '{path}' of adapter '{adapter}': expected modules of {rename.old}; leave the "
            f"rename out, or choose another one: {', '.join(RENAMES)}"
        )
    return new


def _by_new_name(olds: Iterable[str], new_name: Callable[[str], str], name: str, adapter: str) -> dict[str, str]:
    """The old names by their new ones, which must be different."""
    found: dict[str, str] = {}
    for old in olds:
        new = new_name(old)
        if new in found:
            raise SourceError(
                f"rename '{name}' gives '{found[new]}' and '{old}' of adapter '{adapter}' one name, '{new}': expected an "
                "adapter of one training run; leave the rename out, or save the adapter anew"
            )
        found[new] = old
    return found


def _renamed_parameters(source: Source, old_names: Mapping[str, str]) -> frozenset[str]:
    """The targeted parameters by their whole new paths; those that no module belongs to stay as they are."""
    targets = source.info.target_parameters
    layouts = {new: source.modules[old].layout for new, old in old_names.items()}
    holders = {
        layout.base_path(new): layout.base_path(old_names[new])
        for new, layout in layouts.items()
        if layout.kind == "expert"
    }
    renamed = {f"{new}.{parameter}" for new, old in holders.items() for parameter in parameters_at(old, targets)}
    return frozenset(renamed).union(unmatched_parameters(targets, source.modules))


def _renamed_info(info: AdapterInfo, name: str, parameters: frozenset[str]) -> AdapterInfo:
    """The targets of the config are about the old paths, and may hit more in the new model: the original LLaVA's
    ``q_proj`` also the vision tower's. A converted copy of the base model has another name and class."""
    renamed = replace(info, rename=name, targets=Targets(), target_parameters=parameters)
    if RENAMES[name].other_base:
        return replace(renamed, same_base=False, base_revision=None, auto_mapping=None)
    return renamed


def rename_remarks(sources: Sequence[Source]) -> Iterable[str]:
    """What to know about adapters whose modules are named as in a known old layout, one remark a layout."""
    likely: dict[str, list[Source]] = {}
    for source in sources:
        name = _likely_rename(source)
        if name is not None:
            likely.setdefault(name, []).append(source)
    for name, found in likely.items():
        rename = RENAMES[name]
        yield (
            f"the modules of {preview(source.info.name for source in found)} are named as in {rename.old} "
            f"({preview(found[0].modules, 1)}), and so are those of the merged adapter; for {rename.new} merge with "
            f"rename='{name}' (--rename {name})"
        )


def _likely_rename(source: Source) -> str | None:
    """The rename that an adapter from disk would need under the installed transformers, by its paths and its config."""
    info = source.info
    if info.rename or info.location == IN_MEMORY:
        return None
    if any(spec.beside for spec in source.extras.values()):
        return "llava-hf"  # only the original repository leaves such a file
    text = f"{info.base_model or ''} {(info.auto_mapping or {}).get('base_model_class') or ''}"
    installed = TorchVersion(version("transformers"))
    for name, rename in RENAMES.items():
        likely = installed >= rename.since and re.search(rename.about, text) is not None
        likely = likely and any(re.match(rename.sign, path) for path in source.modules)
        if likely and all(new_path(path, rename) is not None for path in source.modules):
            return name
    return None

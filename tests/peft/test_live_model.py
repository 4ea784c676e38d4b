"""One look through a PEFT model, shared by all of its adapters."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from peft import LoHaConfig, LoraConfig, get_peft_model
from torch import nn

from dc_merge_peft import DCMergeAdapter, SourceError
from dc_merge_peft.outputs.targets import choose_targets
from dc_merge_peft.sources.live import LiveSource
from dc_merge_peft.sources.live_model import LiveModel
from dc_merge_peft.sources.targeting import Targets
from tests.support import models
from tests.support.refused import refused

NAMES = ("red", "green", "blue", "grey")


def adapted(names: Sequence[str]) -> nn.Module:
    """A BERT with these adapters."""
    return models.with_lora(models.bert(), {name: {"r": 2, "target_modules": ["query", "value"]} for name in names})


def walks(model: nn.Module, names: Sequence[str], monkeypatch: pytest.MonkeyPatch) -> int:
    """How often ``add_weighted_adapter`` goes through all modules of the model."""
    named_modules, base, found = nn.Module.named_modules, model.base_model.model, []

    def counted(self: nn.Module, memo=None, prefix="", remove_duplicate=True):
        if self is base and memo is None:
            found.append(self)
        return named_modules(self, memo, prefix, remove_duplicate)

    with monkeypatch.context() as patched:
        patched.setattr(nn.Module, "named_modules", counted)
        model.add_weighted_adapter(names, [1.0] * len(names), "new", combination_type="dc")
    model.delete_adapter("new")
    return len(found)


def test_walks_do_not_grow_with_adapters(monkeypatch: pytest.MonkeyPatch) -> None:
    """One walk serves all sources and the checks of the output; PEFT's own are not counted in."""
    model = adapted(NAMES)
    two, four = walks(model, NAMES[:2], monkeypatch), walks(model, NAMES, monkeypatch)
    assert two == four > 0


def test_shared_walk_gives_the_same_source() -> None:
    """A source that shares a walk has the modules and factors of one that walks itself."""
    model = adapted(NAMES[:2])
    seen = LiveModel.of(model.base_model.model)
    for name in NAMES[:2]:
        alone, shared = LiveSource(model.base_model, name), LiveSource(model.base_model, name, seen)
        assert shared.modules == alone.modules
        assert all((shared.factors(each).dense() == alone.factors(each).dense()).all() for each in alone.modules)


def test_an_adapter_that_the_model_has_deleted() -> None:
    """Is an error in words, whatever of it is read."""
    model = adapted(NAMES[:2])
    sources = [LiveSource(model.base_model, name) for name in NAMES[:2]]
    model.delete_adapter(NAMES[1])  # type: ignore[operator]
    module = next(iter(sources[1].modules))
    for read in (sources[1].factors, sources[1].scaling, sources[1].on_cpu):
        with refused(SourceError, "adapter 'green' is no longer in the model", "merge first"):
            read(module)
    with refused(SourceError, "adapter 'green' is no longer in the model"):
        DCMergeAdapter().merge(sources)


def test_own_modules() -> None:
    """Those of the base model, also where adapters of two kinds stand around one module; nothing of the adapters."""
    names = [name for name, _ in models.bert().named_modules() if name]
    adapted_model = get_peft_model(
        models.bert(), LoraConfig(r=2, target_modules=["query", "dense"]), adapter_name="red", mixed=True
    )
    adapted_model.add_adapter("green", LoHaConfig(r=2, target_modules=["query", "value"]))
    adapted_model.add_adapter("blue", LoraConfig(r=2, target_modules=["value"]))
    assert sorted(LiveModel.of(adapted_model.base_model.model).own) == sorted(names)
    assert LiveModel.of(models.bert()).own == names


def test_names_of_adapters_are_no_targets() -> None:
    """An adapter that is called as its target still has that target in the merge's config."""
    model = models.with_lora(
        models.bert(), {name: {"r": 2, "target_modules": ["query"]} for name in ("query", "value")}
    )
    model.add_weighted_adapter(["query", "value"], [1.0, 1.0], "new", combination_type="dc")
    assert model.peft_config["new"].target_modules == {"query"}


def test_targets_are_refused_at_the_first_wrong_module() -> None:
    """What resolves to one module too many, or to one too few, is no specification of the merged ones."""
    looked = []

    def resolve(spec: Targets):
        for name in ("a.q", "b.q", "b.k"):
            looked.append(name)
            if spec.matches(name):
                yield name

    own = Targets(target_modules=frozenset({"q"}))
    assert choose_targets(["a.q", "b.q"], [(own, True)], resolve) == own
    looked.clear()
    found = choose_targets(["b.q", "b.k"], [(own, True)], resolve)
    assert found != own and [name for name in ("a.q", "b.q", "b.k") if found.matches(name)] == ["b.q", "b.k"]
    assert looked[:2] == ["a.q", "a.q"]

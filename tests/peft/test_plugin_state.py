"""What ``add_weighted_adapter`` leaves as it was: base weights, other adapters, flags, and PEFT itself."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraModel
from torch import nn

from dc_merge_peft import DATA_METHODS, METHODS, OptionError, register, unregister
from dc_merge_peft.combination_types import PEFT_TYPES, combination_types
from dc_merge_peft.outputs import live
from tests.support import models
from tests.support.models import difference
from tests.support.refused import refused

NAMES = ["sentiment", "topic"]


@pytest.fixture
def model() -> Any:
    """A BERT with two adapters on different modules, the second active."""
    adapters: dict[str, dict[str, Any]] = {
        "sentiment": {"r": 2, "target_modules": ["query", "value"]},
        "topic": {"r": 2, "target_modules": ["query"], "lora_dropout": 0.1},
    }
    made = models.with_lora(models.bert(), adapters)
    made.set_adapter("topic")
    return made


@pytest.fixture(autouse=True)
def registered() -> Iterator[None]:
    """Registered before and after every test."""
    register()
    yield
    register()


def state(model: nn.Module) -> dict[str, Any]:
    """Everything observable: tensors, their requires_grad, configs, active adapters, training mode."""
    return {
        "tensors": {name: value.clone() for name, value in model.state_dict().items()},
        "grad": {name: parameter.requires_grad for name, parameter in model.named_parameters()},
        "configs": {name: str(config) for name, config in model.peft_config.items()},  # type: ignore[union-attr, operator]
        "active": (model.active_adapter, model.active_adapters, model.base_model.active_adapters),  # type: ignore[union-attr]
        "layers": {name: layer.active_adapters for name, layer in models.layers(model, "topic").items()},
        "training": {name: module.training for name, module in model.named_modules()},
    }


def same(now: dict[str, Any], before: dict[str, Any], new: str | None = None) -> None:
    """Both states agree, except for what the adapter ``new`` adds."""
    for part in before:
        found = now[part]
        if new is not None and isinstance(found, dict):
            found = {key: value for key, value in found.items() if new not in key.split(".")}
        if part == "tensors":
            assert found.keys() == before[part].keys()
            assert not [key for key, value in found.items() if not torch.equal(value, before[part][key])]
        else:
            assert found == before[part], part


@pytest.mark.parametrize("active", ["sentiment", "topic"])
@pytest.mark.parametrize("frozen", [False, True], ids=["trainable", "frozen"])
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("kind", ["dc", "ta", "average"])
def test_only_the_new_adapter_is_new(model: Any, active: str, frozen: bool, training: bool, kind: str) -> None:
    """Base weights and other adapters bit for bit, requires_grad, active adapter, mode: as before; the new one frozen."""
    model.set_adapter(active)
    model.train(training)
    if frozen:
        model.requires_grad_(False)
    before, output = state(model), models.output(model.eval())
    model.train(training)
    model.add_weighted_adapter(NAMES, [1.0, 1.0], "merged", combination_type=kind)
    same(state(model), before, new="merged")
    assert torch.equal(models.output(model.eval()), output)
    parameters = {name: value for name, value in model.named_parameters() if "merged" in name.split(".")}
    assert len(parameters) == 8 and not any(value.requires_grad for value in parameters.values())
    assert model.peft_config["merged"].inference_mode is True


def test_two_active_adapters(model: Any) -> None:
    """A list of active adapters stays, too."""
    model.base_model.set_adapter(NAMES)
    before, output = state(model), models.output(model)
    assert before["active"][2] == NAMES
    model.add_weighted_adapter(NAMES, [1.0, 1.0], "merged", combination_type="ta")
    same(state(model), before, new="merged")
    assert torch.equal(models.output(model), output)


def test_training_goes_on(model: Any) -> None:
    """A step after merging trains the active adapter and leaves the merged one alone."""
    model.add_weighted_adapter(NAMES, [1.0, 1.0], "merged", combination_type="ta")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model(models.IDS).last_hidden_state[..., 0].square().sum().backward()
    optimizer.step()
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed and all(".topic." in name for name in changed)


STEPS = {
    "write_factors": (live, "write_factors"),
    "inject_adapter": (LoraModel, "inject_adapter"),
    "_create_and_replace": (LoraModel, "_create_and_replace"),
    "stored_factors": (live, "stored_factors"),
}


@pytest.mark.parametrize("error", [RuntimeError("out of memory"), KeyboardInterrupt()], ids=["error", "interrupt"])
@pytest.mark.parametrize(("owner", "step"), STEPS.values(), ids=STEPS)
@pytest.mark.parametrize("calls", [0, 2], ids=["at once", "half way"])
def test_failure_rolls_back(
    model: Any, monkeypatch: pytest.MonkeyPatch, owner: Any, step: str, calls: int, error: BaseException
) -> None:
    """Whatever fails in the middle, the model is as before, and the next try works as if it were the first."""
    original, left = getattr(owner, step), [calls]

    def failing(*args: Any, **kwargs: Any) -> Any:
        if left[0] == 0 or step != "_create_and_replace":
            if calls:
                original(*args, **kwargs)
            raise error
        left[0] -= 1
        return original(*args, **kwargs)

    before = state(model)
    with monkeypatch.context() as patch:
        patch.setattr(owner, step, failing)
        with pytest.raises(type(error)):
            model.add_weighted_adapter(NAMES, [1.0, 1.0], "merged", combination_type="ta")
    same(state(model), before)
    assert models.layers(model, "merged") == {}
    model.add_weighted_adapter(NAMES, [1.0, 1.0], "merged", combination_type="ta")
    expected = models.deltas(model, "sentiment")
    topic = models.deltas(model, "topic")
    for module, delta in models.deltas(model, "merged").items():
        assert difference(delta, expected[module] + topic.get(module, 0)) < 2e-6


PEFT_CALLS: list[tuple[str, dict[str, Any]]] = [
    ("linear", {}), ("cat", {}), ("svd", {}), ("svd", {"svd_rank": 2, "svd_full_matrices": False}),
    ("ties", {"density": 0.5}), ("ties", {"density": 0.5, "majority_sign_method": "frequency"}),
    ("ties_svd", {"density": 0.5}), ("dare_linear", {"density": 0.5}), ("dare_ties", {"density": 0.5}),
    ("dare_ties_svd", {"density": 0.5}), ("dare_linear_svd", {"density": 0.5}), ("magnitude_prune", {"density": 0.5}),
    ("magnitude_prune_svd", {"density": 0.5}),
]  # fmt: skip


def by_peft(kind: str, options: dict[str, Any], *, positional: bool = False, seed: int = 3) -> dict[str, Any]:
    """The adapter that PEFT's own combination type gives under a seed, and the state of the random numbers after it."""
    fields = {"r": 2, "target_modules": ["query"]}
    model = models.with_lora(models.bert(), {"sentiment": fields, "topic": fields})
    torch.manual_seed(seed)
    if positional:
        model.add_weighted_adapter(NAMES, [1.0, 0.5], "merged", kind, **options)
    else:
        model.add_weighted_adapter(
            adapters=NAMES, weights=[1.0, 0.5], adapter_name="merged", combination_type=kind, **options
        )
    found = {name: value for name, value in model.state_dict().items() if "merged" in name}
    return {**found, "random numbers": torch.get_rng_state()}


@pytest.mark.parametrize(("positional", "seed"), [(True, 3), (False, 4)], ids=["positional", "keywords"])
@pytest.mark.parametrize(("kind", "options"), PEFT_CALLS)
def test_peft_types_are_untouched(kind: str, options: dict[str, Any], positional: bool, seed: int) -> None:
    """PEFT's own combination types give the same bits with and without this library, and draw the same random numbers."""
    with_us = by_peft(kind, options, positional=positional, seed=seed)
    unregister()
    without = by_peft(kind, options, positional=positional, seed=seed)
    assert with_us.keys() == without.keys() and len(with_us) == 5
    assert all(torch.equal(value, without[name]) for name, value in with_us.items())
    if kind.startswith("dare"):
        other = by_peft(kind, options, positional=positional, seed=seed + 2)
        assert not any(torch.equal(value, other[name]) for name, value in with_us.items() if "lora_A" in name)


@pytest.mark.parametrize(("kind", "options"), PEFT_CALLS)
def test_peft_types_on_other_layers(kind: str, options: dict[str, Any]) -> None:
    """The same for an embedding, and for a single adapter, which PEFT turns into ``linear``."""
    found = []
    for keep in (True, False):
        if not keep:
            unregister()
        model = models.with_lora(
            models.patches(), {name: {"r": 2, "target_modules": ["tokens", "blk.fc"]} for name in NAMES}
        )
        torch.manual_seed(5)
        failure = ""
        for adapters, name in ((NAMES, "merged"), (NAMES[:1], "single")):
            try:
                model.add_weighted_adapter(adapters, [1.0, 0.5][: len(adapters)], name, kind, **options)
            except (ValueError, RuntimeError, TypeError, AttributeError) as error:  # of PEFT, the same both times
                failure += str(error)
        found.append((failure, model.state_dict()))
    (with_us, state), (without, expected) = found
    assert with_us == without and state.keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in state.items())


def test_all_types_of_peft_are_known() -> None:
    """The types that PEFT's own documentation lists are the ones that stay PEFT's, and all of them are called above."""
    listed = re.search(r"merging type can be one of \[(.*?)\]", str(LoraModel.add_weighted_adapter.__doc__), re.DOTALL)
    assert listed and set(re.findall(r"`(\w+)`", listed[1])) <= PEFT_TYPES == {kind for kind, _ in PEFT_CALLS}


def test_mixed_models_of_peft_refuse_peft_types() -> None:
    """PEFT has no weighted adapters in mixed models: its own types get its own answer there."""
    config = LoraConfig(r=2, target_modules=["query"])
    model: Any = get_peft_model(models.bert(), config, adapter_name="sentiment", mixed=True)
    for kind in sorted(PEFT_TYPES):
        with pytest.raises(NotImplementedError, match="not supported for MixedModel"):
            model.base_model.add_weighted_adapter(["sentiment"], [1.0], "new", combination_type=kind)


def test_default_and_unknown_types_are_pefts(model: Any) -> None:
    """No combination type is PEFT's default; an unknown one is PEFT's error to give, with ours that it may have meant."""
    model.add_weighted_adapter(["sentiment"], [0.5], "scaled")
    each, scaled = models.deltas(model, "sentiment"), models.deltas(model, "scaled")
    assert max(difference(scaled[module], 0.5 * each[module]) for module in each) < 1e-5
    with pytest.raises(ValueError, match=r"^Invalid combination_type: dcc; of dc_merge_peft: .* did you mean 'dc'\?"):
        model.add_weighted_adapter(NAMES, [1.0, 1.0], "new", combination_type="dcc")
    with pytest.raises(TypeError, match=r"argument 'rho'; of dc_merge_peft: unknown type 'dcc': did you mean 'dc'\?"):
        model.add_weighted_adapter(NAMES, [1.0, 1.0], "new", combination_type="dcc", rho=5.0)
    with pytest.raises(TypeError, match=r"argument 'rho'$"):
        model.add_weighted_adapter(NAMES, [1.0, 1.0], "new", combination_type="svd", rho=5.0)
    with pytest.raises(ValueError, match="nobody") as caught:  # no word of ours in other errors
        model.add_weighted_adapter(["nobody"], [1.0], "new", combination_type="linear")
    assert "dc_merge_peft" not in str(caught.value)


@pytest.mark.parametrize(("kind", "adapters"), [("dc_svd", NAMES), ("ties_dw_svd", NAMES), ("DC", NAMES[:1])])
def test_types_that_nobody_knows(monkeypatch: pytest.MonkeyPatch, model: Any, kind: str, adapters: list[str]) -> None:
    """PEFT takes any type that ends in svd, whose adapter holds zeros, and any at all for one adapter: they are refused as the others
    are. One that PEFT's documentation lists is PEFT's."""
    with pytest.raises(
        ValueError, match=rf"^Invalid combination_type: {kind}; of dc_merge_peft: unknown type '{kind}'"
    ):
        model.add_weighted_adapter(adapters, [1.0] * len(adapters), "new", combination_type=kind)
    assert set(model.peft_config) == set(NAMES)
    unregister()
    listing = f"{LoraModel.add_weighted_adapter.__doc__}, `{kind}`"
    monkeypatch.setattr(LoraModel.add_weighted_adapter, "__doc__", listing)
    register()
    model.add_weighted_adapter(adapters, [1.0] * len(adapters), "new", combination_type=kind)


@pytest.mark.filterwarnings("ignore:in 2 of 4 modules .* fewer than min_tasks=2")
def test_every_method_is_a_type(model: Any) -> None:
    """Every method of the library whose name PEFT does not have is a combination type."""
    assert set(combination_types().values()) == {*METHODS, *DATA_METHODS} and not set(combination_types()) & PEFT_TYPES
    for kind in [kind for kind, name in combination_types().items() if name in METHODS]:  # the others need data
        model.add_weighted_adapter(NAMES, [1.0, 1.0], f"by_{kind}", combination_type=kind, svd_rank=16)
        assert len(models.layers(model, f"by_{kind}")) == 4


def test_names_that_torch_reserves(model: Any) -> None:
    """An adapter can't be called like an attribute of ModuleDict."""
    before = state(model)
    with refused(OptionError, "'keys'", "expected"):
        model.add_weighted_adapter(NAMES, [1.0, 1.0], "keys", combination_type="ta")
    same(state(model), before)


def test_fresh_config(model: Any) -> None:
    """Nothing of the sources' configs comes along that would change the result or the base weights."""
    model.peft_config["sentiment"].init_lora_weights = "gaussian"
    model.peft_config["sentiment"].exclude_modules = {"value"}
    model.add_weighted_adapter(NAMES, [1.0, 1.0], "merged", combination_type="ta")
    config: LoraConfig = model.peft_config["merged"]
    assert (config.init_lora_weights, config.use_rslora, config.lora_dropout) == (True, False, 0.0)
    assert (config.layers_to_transform, config.exclude_modules, config.modules_to_save) == (None, None, None)
    assert config.target_modules == {"query", "value"} and config.bias == "none"

"""Layers whose class has a forward pass of its own: merged where B and A act as one weight, else refused, never another function."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners import lora
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from dc_merge_peft import DCMergeAdapter, OutputError, UnsupportedAdapterError
from dc_merge_peft.own_forward import factors_act_as_one, multiplies_by_its_weight
from tests.support import models, own_layers
from tests.support.models import difference
from tests.support.refused import refused

NAMES = ["sentiment", "topic"]
pytestmark = [
    pytest.mark.filterwarnings("ignore:Found embed_scale attribute with shape"),  # PEFT leaves it out, and says so
    pytest.mark.filterwarnings("ignore:Unsupported layer type:UserWarning"),
]


class Holder(nn.Module):
    """One layer, so that its output is linear in the deltas."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


def two(layer: nn.Module, **fields: Any) -> Any:
    """The layer with two adapters."""
    return models.with_lora(Holder(layer), {name: {"r": 2, "target_modules": ["layer"], **fields} for name in NAMES})


def effect(model: Any, adapter: str, x: Tensor) -> Tensor:
    """What an adapter adds to the output."""
    model.set_adapter(adapter)
    with torch.no_grad(), model.disable_adapter():
        plain = model(x)
    with torch.no_grad():
        return model(x) - plain


# layer, input, whether B and A act as one weight, whether a changed base weight does the same
IMAGES, ROWS, IDS = torch.randn(2, 4, 7, 7), torch.randn(3, 4), torch.tensor([[1, 5, 2]])
LAYERS: dict[str, tuple[Callable[[], Any], Tensor, bool, bool]] = {
    "torch's convolution": (lambda: nn.Conv2d(4, 4, 3), IMAGES, True, True),
    "standardised convolution": (lambda: own_layers.Standardised(4, 4, 3), IMAGES, False, False),
    "padded convolution": (lambda: own_layers.Padded(4, 4, (3, 2), stride=(2, 1)), IMAGES, True, True),
    "activated convolution": (lambda: own_layers.Activated(4, 4, 3, activation=nn.ReLU()), IMAGES, True, False),
    "written linear": (lambda: own_layers.Written(4, 5), ROWS, True, True),
    "doubled linear": (lambda: own_layers.Doubled(4, 5), ROWS, True, False),
    "scaled embedding": (lambda: own_layers.Scaled(9, 4, torch.tensor(3.0)), IDS, True, True),
    "embedding scaled by column": (lambda: own_layers.Scaled(9, 4, torch.arange(1.0, 5.0)), IDS, True, False),
    "normed embedding": (lambda: own_layers.Normed(9, 4), IDS, True, False),
    "positions": (lambda: own_layers.Positions(9, 4), IDS, True, False),
}


@pytest.mark.parametrize(("layer", "x", "merges", "fuses"), LAYERS.values(), ids=LAYERS)
def test_what_the_small_layer_says(layer: Any, x: Tensor, merges: bool, fuses: bool) -> None:
    """On the CPU and on the meta device, whatever a script has set; neither the layer nor the script's random numbers change."""
    made, before = layer(), torch.get_rng_state()
    weights = {name: value.clone() for name, value in made.state_dict().items()}
    with torch.autocast("cpu", torch.bfloat16), torch.inference_mode():
        assert (factors_act_as_one(made), multiplies_by_its_weight(made)) == (merges, fuses)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(made.state_dict()[name], value) for name, value in weights.items())
    assert (factors_act_as_one(layer().to("meta")), multiplies_by_its_weight(layer().to("meta"))) == (merges, fuses)


@pytest.mark.parametrize(("layer", "x", "merges", "fuses"), LAYERS.values(), ids=LAYERS)
def test_in_memory_and_from_disk(tmp_path: Path, layer: Any, x: Tensor, merges: bool, fuses: bool) -> None:
    """The sum of what the adapters do, or a refusal that leaves the model as it was."""
    model = two(layer())
    folders = models.save_adapters(model, tmp_path)
    expected = effect(model, NAMES[0], x) - 0.5 * effect(model, NAMES[1], x)
    merged = DCMergeAdapter(method="ta").merge(folders, [1.0, -0.5])  # a checkpoint does not say what the layer is
    if not merges:
        for add in (
            lambda: model.add_weighted_adapter(NAMES, [1.0, -0.5], "both", combination_type="ta"),
            lambda: merged.add_to(Holder(layer())),
        ):
            with refused(
                UnsupportedAdapterError, "'layer' is a Standardised", "as torch's", "train the adapter without"
            ):
                add()
        assert list(model.peft_config) == NAMES
        return
    model.add_weighted_adapter(NAMES, [1.0, -0.5], "both", combination_type="ta")
    assert difference(effect(model, "both", x), expected) < 1e-5
    assert (
        difference(effect(merged.add_to(Holder(model.base_model.model.layer.base_layer)), "merged", x), expected) < 1e-5
    )


@pytest.mark.parametrize(("layer", "x", "merges", "fuses"), LAYERS.values(), ids=LAYERS)
def test_fuse(tmp_path: Path, layer: Any, x: Tensor, merges: bool, fuses: bool) -> None:
    """The fused weight computes what the adapters do, or the fuse is refused."""
    model = two(layer())
    folders = models.save_adapters(model, tmp_path)
    if isinstance(model.base_model.model.layer.base_layer, own_layers.Scaled) and not hasattr(
        LoraLayer, "_get_embed_scale"
    ):
        pytest.skip("this PEFT does not scale what it adds to an embedding with a scale")
    expected = effect(model, NAMES[0], x) + effect(model, NAMES[1], x)
    base = Holder(model.base_model.model.layer.base_layer)
    with torch.no_grad():
        plain = base(x)
    if not fuses:
        with refused(UnsupportedAdapterError, "'layer' is a", "forward pass is its own", "as torch's"):
            DCMergeAdapter(method="ta").fuse(base, folders)
        return
    fused: Any = DCMergeAdapter(method="ta").fuse(base, folders)
    with torch.no_grad():
        assert difference(fused(x) - plain, expected) < 1e-5


@pytest.mark.parametrize("where", ["memory", "disk"])
def test_dora(tmp_path: Path, where: str) -> None:
    """DoRA's delta is that of a weight which is multiplied by."""
    model = two(own_layers.Doubled(4, 5), use_dora=True)
    with refused(
        UnsupportedAdapterError, "'layer' is a Doubled", "is DoRA, whose delta depends on that weight", "as torch's"
    ):
        if where == "memory":
            model.add_weighted_adapter(NAMES, [1.0, 1.0], "both", combination_type="ta")
        else:
            folders = models.save_adapters(model, tmp_path)
            DCMergeAdapter(method="ta").merge(folders, base=Holder(model.base_model.model.layer.base_layer))


class Table(nn.Module):
    """A module that PEFT knows nothing of."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(5, 4)), None
        self.in_features, self.out_features = 4, 5

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.T


class Same(lora.Linear):
    """The user's class for it that computes as PEFT's."""


class Squashed(lora.Linear):
    """One that does not."""

    def forward(self, x: Tensor, *args: Any, **options: Any) -> Tensor:
        return torch.tanh(super().forward(x, *args, **options))


def registered(kind: type[nn.Module]) -> Any:
    """Two adapters on a module of the user's, by a class of the user's."""

    def config(r: int) -> LoraConfig:
        made = LoraConfig(r=r, target_modules=["layer"])
        made._register_custom_module({Table: kind})
        return made

    model = get_peft_model(Holder(Table()), config(2), adapter_name=NAMES[0])  # type: ignore[arg-type]
    model.add_adapter(NAMES[1], config(3))
    for seed, name in enumerate(NAMES):
        models.randomize(model, name, seed)
    return model.eval()


def test_registered_classes(tmp_path: Path) -> None:
    """A class of the user's is merged where PEFT has written its forward pass."""
    model = registered(Same)
    expected = effect(model, NAMES[0], ROWS) + effect(model, NAMES[1], ROWS)
    model.add_weighted_adapter(NAMES, [1.0, 1.0], "both", combination_type="ta")
    assert difference(effect(model, "both", ROWS), expected) < 1e-5
    with refused(UnsupportedAdapterError, "'layer' is a Squashed", "none of PEFT's", "keep its forward pass"):
        registered(Squashed).add_weighted_adapter(NAMES, [1.0, 1.0], "both", combination_type="ta")
    merged = DCMergeAdapter(method="ta").merge(models.save_adapters(model, tmp_path, NAMES))
    with refused(OutputError, "PEFT can't add the adapter", "Table() is not supported", "expected the base model"):
        merged.add_to(Holder(Table()))


class Packed(Tensor):
    """A tensor as torchao makes them: it says that it is in float32, and is something else inside."""


@pytest.mark.parametrize("use_dora", [False, True])
def test_tensors_of_a_class_of_their_own(tmp_path: Path, use_dora: bool) -> None:
    """Their numbers are neither read nor changed; beside them adapters are merged."""
    model = two(nn.Linear(4, 5), use_dora=use_dora)
    folders = models.save_adapters(model, tmp_path)
    base = Holder(nn.Linear(4, 5))
    base.layer.weight = nn.Parameter(base.layer.weight.detach().as_subclass(Packed))  # type: ignore[arg-type]
    if use_dora:
        with refused(UnsupportedAdapterError, "base weight of 'layer', a Linear, is quantised", "is DoRA"):
            DCMergeAdapter(method="ta").merge(folders, base=base)
        return
    with refused(UnsupportedAdapterError, "'layer' is quantised (Packed)", "expected floating-point"):
        DCMergeAdapter(method="ta").fuse(base, folders)
    found: Any = DCMergeAdapter(method="ta").merge(folders).add_to(base)
    assert type(found.base_model.model.layer.base_layer.weight) is Packed

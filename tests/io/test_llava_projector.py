"""The projectors that the original LLaVA leaves beside an adapter, in ``non_lora_trainables.bin``: refused, averaged, chosen
or dropped, into transformers' LLaVA and back into such a file."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor

from dc_merge_peft import DCMergeAdapter, MergeWarning, OptionError, SourceError, UnsupportedAdapterError
from tests.support import llava as tiny
from tests.support import models
from tests.support.families import answer
from tests.support.models import difference
from tests.support.refused import merge_refused
from tests.support.versions import needs_safe_pickles

SEEDS = (40, 41)
FILE = "non_lora_trainables.bin"
TA = DCMergeAdapter(method="ta")
NEW = {"0": "linear_1", "2": "linear_2"}
# By policy, the projector that comes out of those of the two adapters.
POLICIES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "average": lambda first, second: ((first.double() + second.double()) / 2).float(),
    "first": lambda first, _: first,
    "LLaVA_41": lambda _, second: second,
}
pytestmark = [needs_safe_pickles, pytest.mark.filterwarnings("ignore:(kept|left out) outside B and A")]


@cache
def base() -> Any:
    """One base model for all tests; they work on copies."""
    return tiny.llava()


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two original adapters with a trained projector each."""
    folder = tmp_path_factory.mktemp("original")
    return [tiny.write_original(folder / f"LLaVA_{seed}", seed) for seed in SEEDS]


def expected_projector(policy: str) -> dict[str, Tensor]:
    """The projector by its original names, computed from what was written."""
    first, second = (tiny.projector(seed) for seed in SEEDS)
    return {name: POLICIES[policy](value, second[name]) for name, value in first.items()}


def hf_name(name: str) -> str:
    """Where transformers keeps a parameter of the original projector."""
    _, layer, leaf = name.rsplit(".", 2)
    return f"model.multi_modal_projector.{NEW[layer]}.{leaf}"


def expected_answer(policy: str) -> Tensor:
    """What the base model answers with the summed factors and the projector in it, put there by hand."""
    model = copy.deepcopy(base())
    for seed in SEEDS:
        for path, (A, B) in tiny.original_factors(seed).items():
            weight = model.get_parameter("model.language_model" + path.removeprefix("model") + ".weight")
            weight.data = (weight.double() + tiny.ALPHA / tiny.RANK * B.double() @ A.double()).float()
    for name, value in expected_projector(policy).items():
        model.get_parameter(hf_name(name)).data = value
    return answer(model, tiny.INPUTS)


@pytest.mark.parametrize("policy", POLICIES)
def test_into_transformers(folders: list[Path], tmp_path: Path, policy: str) -> None:
    """Renamed, factors and projector load by plain PEFT without a warning; added to a model and fused, they give the same
    answer as a model that was put together by hand."""
    merged = TA.merge(folders, rename="llava-hf", extras=policy)
    out = merged.save_pretrained(tmp_path / "out")
    assert not (out / FILE).exists()
    loaded: Any = PeftModel.from_pretrained(copy.deepcopy(base()), str(out)).eval()
    state = loaded.state_dict()
    for name, value in expected_projector(policy).items():
        owner, _, leaf = hf_name(name).rpartition(".")
        torch.testing.assert_close(state[f"base_model.model.{owner}.modules_to_save.default.{leaf}"], value)
        assert torch.equal(
            state[f"base_model.model.{owner}.original_module.{leaf}"], base().state_dict()[hf_name(name)]
        )
    expected = expected_answer(policy)
    assert difference(answer(loaded, tiny.INPUTS), expected) < 1e-5
    added: Any = merged.add_to(copy.deepcopy(base())).eval()
    assert difference(answer(added, tiny.INPUTS), expected) < 1e-5
    base().save_pretrained(tmp_path / "base")
    TA.fuse(tmp_path / "base", folders, tmp_path / "fused", rename="llava-hf", extras=policy)
    fused, report = type(base()).from_pretrained(tmp_path / "fused", output_loading_info=True)
    assert not any(report.values())
    assert difference(answer(fused.eval(), tiny.INPUTS), expected) < 1e-5


@pytest.mark.parametrize("policy", POLICIES)
def test_back_into_the_original_layout(folders: list[Path], tmp_path: Path, policy: str) -> None:
    """Without a rename the projector goes into a file of its own again, as the original repository looks for it, and not
    into PEFT's; the merged directory can be merged again."""
    with pytest.warns(MergeWarning, match="named as in the original LLaVA"):
        out = TA.merge(folders, extras=policy).save_pretrained(tmp_path / "out")
    trained = torch.load(out / FILE, weights_only=True)
    expected = {f"base_model.model.{name}": value for name, value in expected_projector(policy).items()}
    assert trained.keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in trained.items())
    assert not [key for key in load_file(out / "adapter_model.safetensors") if "lora_" not in key]
    assert json.loads((out / "adapter_config.json").read_text())["modules_to_save"] is None
    # As the original repository does it: first the file, without PEFT's prefix, then the adapter.
    model = tiny.original_llava()
    report = model.load_state_dict(
        {key.removeprefix("base_model.model."): value for key, value in trained.items()}, False
    )
    assert not report.unexpected_keys
    assert len(models.deltas(PeftModel.from_pretrained(model, str(out)), "default")) == 14
    record = yaml.safe_load((out / "dc_merge.yaml").read_text())
    assert record["extras"] == policy and set(record["record"]["extras"]["kept"]) == set(tiny.projector(0))
    again = TA.merge([out], rename="llava-hf", extras="first")
    assert all(
        torch.equal(again.extras.values[hf_name(name)].value, expected_projector(policy)[name])
        for name in tiny.projector(0)
    )


def test_dropped(folders: list[Path], tmp_path: Path) -> None:
    """``drop`` leaves the projectors out: the base model's stays, the factors are as without the files."""
    merged = TA.merge(folders, rename="llava-hf", extras="drop")
    out = merged.save_pretrained(tmp_path / "out")
    assert not (out / FILE).exists() and not [
        k for k in load_file(out / "adapter_model.safetensors") if "lora_" not in k
    ]
    A, B = tiny.original_factors(SEEDS[0])["model.layers.1.mlp.down_proj"]
    C, D = tiny.original_factors(SEEDS[1])["model.layers.1.mlp.down_proj"]
    found = merged.delta("model.language_model.layers.1.mlp.down_proj")
    assert difference(found, 2 * (B @ A + D @ C)) < 1e-6


def test_some_have_none(folders: list[Path], tmp_path: Path) -> None:
    """The mean is over the adapters that have a projector; an empty file is none."""
    bare = tiny.write_original(tmp_path / "bare", 7, with_projector=False)
    torch.save({}, bare / FILE)
    merged = TA.merge([bare, *folders], rename="llava-hf", extras="average")
    for name, value in expected_projector("average").items():
        torch.testing.assert_close(merged.extras.values[hf_name(name)].value, value)
    assert TA.merge([bare], rename="llava-hf").extras.values == {}


@pytest.mark.parametrize("rename", [None, "llava-hf"])
def test_refused_unless_asked(tmp_path: Path, rename: str | None) -> None:
    """Without a policy the file is no trifle to be skipped: refused by name, with what to say."""
    folder = tiny.write_original(tmp_path / "LLaVA_7B_lora_r16_vizwiz", 1)
    merge_refused(
        tmp_path, [folder], UnsupportedAdapterError, "adapter 'LLaVA_7B_lora_r16_vizwiz' has non_lora_trainables.bin",
        "fully trained weights", "projector", "'model.mm_projector.0.weight' and 3 more", "expected LoRA factors alone",
        "'average', 'first', 'drop'", "--extras", rename=rename,
    )  # fmt: skip


def test_files_that_can_not_be_used(tmp_path: Path) -> None:
    """A pickle with code, factors where full values belong, a value for the second time, a projector of another build."""
    contents: dict[str, tuple[Any, type[Exception], tuple[str, ...]]] = {
        "code": ({"x.weight": object}, SourceError, (f"an {FILE} that holds more than tensors", "could run code")),
        "factors": (
            {"base_model.model.model.layers.0.q.lora_A.weight": torch.ones(2, 2)},
            SourceError, (f"in its {FILE}", "lora_A", "expected parameters of the base model's modules without LoRA"),
        ),
        "twice": (
            {"base_model.model.model.mm_projector.0.weight": torch.ones(2, 2), "model.mm_projector.0.weight": torch.ones(2, 2)},
            SourceError, ("'model.mm_projector.0.weight'", "each once", "save or download it again"),
        ),
        "one-layer": (
            {"base_model.model.model.mm_projector.weight": torch.ones(2, 2)},
            OptionError, ("rename 'llava-hf' does not know 'model.mm_projector'", "of adapter 'one-layer'"),
        ),
        "nan": (
            {"base_model.model.model.mm_projector.0.weight": torch.tensor([[float("nan")]])},
            SourceError, ("'model.multi_modal_projector.linear_1.weight' in adapter 'nan' holds NaN", "extras='drop'"),
        ),
    }  # fmt: skip
    for name, (content, kind, words) in contents.items():
        folder = tiny.write_original(tmp_path / name, 1)
        torch.save(content, folder / FILE)
        merge_refused(tmp_path, [folder], kind, *words, rename="llava-hf", extras="average")


def test_the_file_tells_an_original_adapter(tmp_path: Path) -> None:
    """Whatever base model the config names: only the original repository leaves such a file."""
    folder = tiny.write_original(
        tmp_path / "task", 1, config={**tiny.CONFIG, "base_model_name_or_path": "lmsys/vicuna-7b"}
    )
    remarks = TA.plan([folder], extras="drop").remarks
    assert any("named as in the original LLaVA" in remark and "rename='llava-hf'" in remark for remark in remarks)

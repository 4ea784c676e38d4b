"""A part of the cases of ``python -m tests.fuzz``, and what it has found."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

from dc_merge_peft import DCMergeAdapter, MergeWarning, SourceError
from dc_merge_peft.sources import checkpoint
from dc_merge_peft.sources.base_model import load_base
from tests.fuzz.cases import Case, make_pristine, run_inside
from tests.fuzz.peft_reads import differs_from_peft
from tests.support.refused import refused
from tests.support.versions import needs_safe_pickles

ADAPTERS = ("math-lora", "code-lora")


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Good inputs."""
    return make_pristine(tmp_path_factory.mktemp("fuzz") / "pristine")


@pytest.fixture
def inputs(pristine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of them, and the working directory in it."""
    import shutil

    shutil.copytree(pristine, tmp_path / "inputs")
    monkeypatch.chdir(tmp_path / "inputs")
    return tmp_path / "inputs"


@needs_safe_pickles
@pytest.mark.parametrize("part", range(3))
def test_damaged_inputs(pristine: Path, tmp_path: Path, part: int) -> None:
    """Fifty cases each: a clear error without a trace, or a whole and finite result."""
    ends = Counter[str]()
    for number in range(50 * part, 50 * part + 50):
        case = Case.of(number, seed=7)
        outcome = run_inside(case, pristine, tmp_path / f"{number}")
        # Time and memory are for the program: here other tests use them as well.
        assert outcome.wrong is None or outcome.wrong.startswith("took"), f"{case}: {outcome}"
        ends[outcome.kind] += 1
    assert set(ends) == {"error", "result"} and ends["error"] > ends["result"]


ENDLESS = [
    ("num_hidden_layers", 10**5), ("num_labels", 10**9), ("depths", [2, 10**5]), ("num_local_experts", 10**8),
    ("n_routed_experts", 10**8), ("inner_group_num", 10**5),
]  # fmt: skip


@pytest.mark.parametrize(("field", "value"), ENDLESS)
def test_endless_base_models(inputs: Path, field: str, value: int | list[int]) -> None:
    """A config whose class would never be built."""
    file = inputs / "base-model" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), field: value}))
    count = max(value) if isinstance(value, list) else value
    with refused(SourceError, f"has {field} {count} in its config.json", "expected a config of these weights"):
        DCMergeAdapter().fuse_to_disk("base-model", ADAPTERS, "out")
    with refused(
        SourceError, f"has {field} {count} in its config.json: expected"
    ):  # as DoRA adapters and pickles have it loaded
        load_base("base-model")


def test_the_judge_knows_what_is_merged_on_purpose(inputs: Path) -> None:
    """Modules that a config does not target are right where merging has said so, and a difference where it has not."""
    file = inputs / "math-lora" / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "target_modules": ["query"]}))
    with pytest.warns(MergeWarning) as said:
        DCMergeAdapter().merge(["math-lora", "code-lora"])
    assert "PEFT has no LoRA on 'encoder.layer." in str(differs_from_peft(inputs / "math-lora"))
    assert differs_from_peft(inputs / "math-lora", " ".join(str(one.message) for one in said)) is None


def test_the_judge_can_tell(inputs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An adapter that we would read in another way than PEFT does is noticed; one that is read well is not."""
    assert differs_from_peft(inputs / "math-lora") is None
    monkeypatch.setattr(checkpoint, "lora_scaling", lambda *_: 0.3)
    assert "PEFT reads another delta of 'encoder.layer" in str(differs_from_peft(inputs / "math-lora"))

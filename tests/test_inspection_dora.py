"""Looking at DoRA adapters with their base model: what is measured is what PEFT merges."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from dc_merge_peft import DCMergeAdapter, OptionError, SourceError, inspect_adapters, inspect_merge, report_merge
from dc_merge_peft.sources import CheckpointSource
from tests.support.dora import MODELS, deltas_by_peft, save_dora
from tests.support.pages import parsed
from tests.support.program import run
from tests.support.refused import refused

BUILD, FIELDS = MODELS["linear"]
WHOLE = 16  # the smaller side of every layer: nothing of a delta is cut


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base model, and beside it two DoRA adapters and a plain one."""
    folder = tmp_path_factory.mktemp("dora")
    BUILD().save_pretrained(folder / "base")
    save_dora(folder, BUILD, FIELDS)
    return folder


def test_spectra_and_pairs(made: Path) -> None:
    """Singular values and CosSim of the deltas that PEFT merges, DoRA's and a plain one's."""
    paths = [made / name for name in ("sentiment", "topic", "plain")]
    found = inspect_adapters(paths, base=made / "base", dora_rank=WHOLE, progress=False)
    expected = [deltas_by_peft(BUILD, path) for path in paths]
    for adapter, deltas in zip(found.adapters, expected, strict=True):
        assert adapter.problem is None and set(adapter.modules) == set(deltas)
        for name, delta in deltas.items():
            S, measured = torch.linalg.svdvals(delta), torch.tensor(adapter.modules[name].S, dtype=torch.float64)
            kept = S[: len(measured)]
            assert torch.allclose(measured, kept, rtol=1e-4, atol=1e-5 * float(S[0])), name
            assert float(S[len(measured) :].norm()) < 1e-4 * float(S.norm())
    flat = [torch.cat([delta.flatten() for delta in deltas.values()]) for deltas in expected]
    assert found.pairs[0].overall is not None
    cosine = float(torch.cosine_similarity(flat[0], flat[1], dim=0))
    assert found.pairs[0].overall.cos_sim == pytest.approx(cosine, abs=1e-4)
    assert not [finding for finding in found.findings if finding.level == "refused"]


def test_the_rank_of_reading(made: Path) -> None:
    """Twice the adapter's by default; cut directions are the weakest."""
    twice = inspect_adapters([made / "sentiment"], base=BUILD(), progress=False).adapters[0]
    one = inspect_adapters([made / "sentiment"], base=BUILD(), dora_rank=1, progress=False).adapters[0]
    for name, module in twice.modules.items():
        assert len(module.S) == 4 and pytest.approx(module.S[:1], rel=1e-5) == one.modules[name].S


def test_sources_stay_their_owners(made: Path) -> None:
    """One that was open before is open afterwards, also where it was joined with the base model."""
    source = CheckpointSource(made / "sentiment")
    first = inspect_adapters([source], base=made / "base", progress=False).adapters[0]
    assert inspect_adapters([source], base=made / "base", progress=False).adapters[0].modules == first.modules
    assert source.lora(next(iter(source.modules))).rank == 2
    source.close()


@pytest.mark.filterwarnings("ignore:adapter '.*' is DoRA, whose delta is dense")
def test_after_merging(made: Path) -> None:
    """With the base model of the record, that of a merge in memory, and another way to it, the numbers are the same."""
    paths = [made / "sentiment", made / "topic"]
    merged = DCMergeAdapter(method="ta").merge(paths, base=made / "base", dora_rank=WHOLE)
    merged.save_pretrained(made / "both")
    recorded = inspect_merge(made / "both", paths, progress=False)
    assert recorded == inspect_merge(made / "both", paths, base=BUILD(), dora_rank=WHOLE, progress=False)
    assert recorded.modules != inspect_merge(made / "both", paths, dora_rank=1, progress=False).modules
    here = inspect_merge(merged, progress=False)
    for name, kept in recorded.overall.items():
        assert asdict(here.overall[name]) == pytest.approx(asdict(kept), rel=1e-5)
    assert all(numbers.projected_dir_sim > 0.5 for numbers in recorded.overall.values())


def test_program(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """``--base`` measures what is not measured without, and merges it too; a base model that is not there ends it."""
    monkeypatch.chdir(made)
    plain = json.loads(run("inspect", "sentiment", "topic", "--json").stdout)
    assert all(not module["S"] for module in plain["adapters"][0]["modules"].values())
    arguments = ["inspect", "sentiment", "topic", "--json", "--base", "base", "--dora-rank", str(WHOLE)]
    result = run(*arguments, "-m", "dc")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert all(len(module["S"]) == WHOLE for module in found["adapters"][0]["modules"].values())
    assert set(found["merge"]["adapters"]) == {"sentiment", "topic"}
    assert json.loads(run(*arguments).stdout)["adapters"] == found["adapters"]
    gone = run("inspect", "sentiment", "topic", "--base", "gone")
    assert gone.exit_code != 0 and "gone" in gone.stderr and "Traceback" not in gone.stderr


def test_program_reads_adapters_as_the_record_says(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside ``--merged`` the base model and the rank are those of the merge, whether its adapters are named or not."""
    monkeypatch.chdir(made)
    names = ["sentiment", "topic"]
    done = run("merge", *names, "--base", "base", "--dora-rank", "3", "-o", "of-rank-3")
    assert done.exit_code == 0, done.output
    shown = [
        json.loads(run("inspect", *arguments, "--merged", "of-rank-3", "--json").stdout)
        for arguments in ([], names, [*names, "--base", "base"])
    ]
    assert shown[0] == shown[1] == shown[2]
    assert {len(module["S"]) for module in shown[0]["adapters"][0]["modules"].values()} == {3}


@pytest.mark.filterwarnings("ignore:adapter '.*' is DoRA, whose delta is dense")
def test_the_page_says_how_well_they_were_read(made: Path) -> None:
    """Once for each DoRA adapter, of a merge in memory and on disk."""
    merged = DCMergeAdapter(method="ta").merge([made / "sentiment", made / "plain"], base=made / "base", dora_rank=2)
    merged.save_pretrained(made / "seen")
    for target in (merged, made / "seen"):
        page = report_merge(target, made / "page.html", progress=False, overwrite=True)
        notes = parsed(page.read_text("utf-8")).one("section", id="findings").all("li", class_="note")
        (said,) = [note.text for note in notes if "is DoRA" in note.text]
        assert merged.dora is not None
        assert (
            f"'sentiment' is DoRA, whose delta is dense: it was read at a lower rank with a relative error of {merged.dora.errors[0]:.2%}"
            in said
        )


def test_refusals(made: Path) -> None:
    """A base model that can't be loaded is one error and no trouble of each module; a rank is a number."""
    with refused(SourceError, "nowhere"):
        inspect_adapters([made / "sentiment"], base=made / "nowhere", progress=False)
    with refused(OptionError, "dora_rank is 0"):
        inspect_adapters([made / "sentiment"], base=made / "base", dora_rank=0, progress=False)
    other = inspect_adapters([made / "sentiment"], base=MODELS["Conv1D"][0](), progress=False).adapters[0]
    assert all("has no module" in str(module.problem) for module in other.modules.values())

"""Inspections against PEFT's own deltas in dense numpy, trouble in words, and adapters that can't be merged."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from dc_merge_peft import DCMergeAdapter, LowRank, inspect_adapters, inspect_merge
from dc_merge_peft.errors import IncompatibleAdaptersError, MergeWarning, OptionError, SourceError
from dc_merge_peft.inspection import Inspection

from .support import measures
from .support.models import bert, deltas, factors, save_adapters, with_lora, write_checkpoint
from .support.refused import refused
from .support.strategies import memory_sources, random_tasks, zero_task
from .support.workspace import ADAPTERS


def checkpoint(folder: Path, A: Tensor, B: Tensor, module: str = "enc.q", **fields: Any) -> Path:
    """An adapter of one module."""
    key = f"base_model.model.{module}"
    return write_checkpoint(folder, {f"{key}.lora_A.weight": A, f"{key}.lora_B.weight": B}, **fields)


def texts(inspection: Inspection, level: str) -> list[str]:
    """The findings of one level."""
    return [finding.text for finding in inspection.findings if finding.level == level]


def inspected(*tasks: LowRank) -> Inspection:
    """Adapters of one module in memory."""
    return inspect_adapters(memory_sources({"layers.0.q": list(tasks)}), progress=False)


# ------------------------------------------------------------------------------------------------ numbers


@pytest.fixture(scope="module")
def peft_adapters(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Path], dict[str, dict[str, np.ndarray]]]:
    """Two adapters of different rank and scaling on disk, one of them rsLoRA, and their deltas by PEFT."""
    folder = tmp_path_factory.mktemp("adapters")
    model = with_lora(bert(), ADAPTERS)
    oracle = {
        name: {module: delta.double().numpy() for module, delta in deltas(model, name).items()} for name in ADAPTERS
    }
    return save_adapters(model, folder), oracle


def test_numbers_are_those_of_pefts_deltas(peft_adapters: Any) -> None:
    """Spectra and pairs of every module, scaling included, and CosSim over the whole model."""
    paths, oracle = peft_adapters
    found = inspect_adapters(paths, progress=False)
    assert found.names == tuple(oracle) and found.modules == {name: [0, 1] for name in oracle["math-lora"]}
    for adapter in found.adapters:
        for module, spectrum in adapter.modules.items():
            S = np.linalg.svd(oracle[adapter.name][module], compute_uv=False)[: spectrum.rank]
            assert pytest.approx(S, rel=1e-4) == spectrum.S
            assert spectrum.norm == pytest.approx(np.linalg.norm(S), rel=1e-5)
        whole = np.concatenate([delta.ravel() for delta in oracle[adapter.name].values()])
        assert adapter.norm == pytest.approx(np.linalg.norm(whole), rel=1e-5)
    first, second = oracle.values()
    (pair,) = found.pairs
    for module, numbers in pair.modules.items():
        pieces = first[module], second[module]
        assert numbers.cos_sim == pytest.approx(measures.cos_sim(*pieces), abs=1e-5)
        assert numbers.dir_sim == pytest.approx(measures.dir_sim(*pieces), abs=1e-5)
        assert (numbers.left_overlap, numbers.right_overlap) == pytest.approx(measures.overlap(*pieces), abs=1e-5)
        assert numbers.sign_conflict == pytest.approx(measures.sign_conflict(*pieces), abs=1e-4)
    flat = [np.concatenate([side[module].ravel() for module in pair.modules]) for side in (first, second)]
    assert pair.overall is not None
    assert pair.overall.cos_sim == pytest.approx(measures.cos_sim(*flat), abs=1e-6)


def test_kept_is_that_of_pefts_deltas(peft_adapters: Any, tmp_path: Path) -> None:
    """What is kept, in memory and from disk, and its means."""
    paths, oracle = peft_adapters
    merged = DCMergeAdapter().merge(paths, svd_rank=6, progress=False)
    merged.save_pretrained(tmp_path / "merged")
    for target, sources in ((merged, None), (tmp_path / "merged", paths)):
        found = inspect_merge(target, sources, progress=False)
        for name in oracle:
            rows = []
            for module, delta in oracle[name].items():
                whole = merged.delta(module).double().numpy()
                kept = found.modules[module][name]
                projected = measures.project(delta, whole)
                assert kept.projected_dir_sim == pytest.approx(measures.dir_sim(delta, projected), abs=1e-4)
                assert kept.projected_cos_sim == pytest.approx(measures.cos_sim(delta, projected), abs=1e-4)
                assert kept.retained_energy == pytest.approx(measures.retained_energy(delta, whole), abs=1e-4)
                assert kept.strength == pytest.approx((delta * whole).sum() / (delta**2).sum(), abs=1e-4)
                rows.append((kept, (delta**2).sum()))
            overall, energy = found.overall[name], sum(weight for _, weight in rows)
            assert overall.projected_dir_sim == pytest.approx(np.mean([kept.projected_dir_sim for kept, _ in rows]))
            for field in ("retained_energy", "strength"):
                mean = sum(getattr(kept, field) * weight for kept, weight in rows) / energy
                assert getattr(overall, field) == pytest.approx(mean, rel=1e-4)


def test_spectra_of_the_merge_are_those_of_its_deltas(peft_adapters: Any, tmp_path: Path) -> None:
    """Singular values at the alpha in force, in memory and from disk; what truncation took is known in memory alone."""
    paths, _ = peft_adapters
    merged = DCMergeAdapter().merge(paths, svd_rank=6, progress=False)
    merged.save_pretrained(tmp_path / "merged")
    for target, sources in ((merged, None), (tmp_path / "merged", paths)):
        found = inspect_merge(target, sources, progress=False).spectra
        assert found.keys() == merged.modules.keys()
        for name, spectrum in found.items():
            S = np.linalg.svd(merged.delta(name).double().numpy(), compute_uv=False)[:6]
            assert pytest.approx(S, rel=1e-4) == spectrum.S and spectrum.rank == len(spectrum.S) == 6
            whole = merged.modules[name].S
            assert whole is not None
            lost = float(whole[6:].norm() / whole.norm())
            expected = (len(whole), pytest.approx(lost)) if target is merged else (None, None)
            assert (spectrum.full_rank, spectrum.truncation_error) == expected


def test_adapters_in_memory() -> None:
    """Adapters of a PEFT model, at the scaling in force there."""
    from dc_merge_peft.sources.live import LiveSource

    model = with_lora(bert(), ADAPTERS)
    sources = [LiveSource(model.base_model, name) for name in ADAPTERS]
    found = inspect_adapters(sources, progress=False)
    assert [adapter.rslora for adapter in found.adapters] == [False, True]
    assert found.adapters[0].scalings == (2.0,) and found.adapters[0].config_ranks == (4,)
    module, delta = next(iter(deltas(model, "code-lora").items()))
    assert found.adapters[1].modules[module].norm == pytest.approx(float(delta.norm()), rel=1e-5)
    merged = DCMergeAdapter(method="ta").merge(sources, progress=False)
    with refused(OptionError, "model in memory", "expected them as sources"):
        inspect_merge(merged)
    assert inspect_merge(merged, sources, progress=False).overall["math-lora"].retained_energy == pytest.approx(1.0)


def test_everything_is_plain_json(peft_adapters: Any) -> None:
    """Both reports survive a round trip, with a number for each module and adapter."""
    paths, _ = peft_adapters
    before = inspect_adapters(paths, progress=False).to_dict()
    after = inspect_merge(DCMergeAdapter().merge(paths, progress=False), progress=False).to_dict()
    for plain in (before, after):
        assert json.loads(json.dumps(plain, allow_nan=False)) == plain
    assert len(before["adapters"][0]["modules"]) == len(after["modules"]) == len(before["cover"]) == 4
    assert before["adapters"][1]["rslora"] is True and before["pairs"][0]["adapters"] == list(ADAPTERS)


# ------------------------------------------------------------------------------------------------ trouble, in words

TASK, OTHER = random_tasks(2, (24, 20), (4, 4), overlap=0.0)


@pytest.mark.parametrize(
    ("tasks", "level", "words"),
    [
        ([TASK, TASK.scaled(3.0)], "warning", "near copies: a sum counts their task twice, and dc loses"),
        ([TASK, TASK.scaled(-0.5)], "warning", "near opposites: merging them cancels both"),
        ([TASK, OTHER.scaled(20.0)], "warning", "times their median. With equal weights it decides"),
        ([TASK, OTHER, zero_task((24, 20), 4)], "refused", "in 'task2' 1 of 1 modules can't be measured"),
        ([TASK, LowRank(OTHER.B * float("nan"), OTHER.A)], "refused", "holds NaN or Inf"),
        (random_tasks(1, (24, 20), (9, 12)), "warning", "more than min(m, n)"),
        ([TASK, *random_tasks(1, (24, 21), (4,))], "refused", "different shapes or layer types in 1 modules"),
        (random_tasks(1, (24, 20), (4,), decay=0.999), "note", "flat spectrum"),
        (random_tasks(1, (24, 20), (8,), decay=0.15), "note", "peaked spectrum"),
    ],
)
def test_predicted_trouble(tasks: Sequence[LowRank], level: str, words: str) -> None:
    """Each kind of trouble is named, and unrelated plain adapters have none."""
    assert any(words in text for text in texts(inspected(*tasks), level))
    assert inspected(*random_tasks(2, (24, 20), (4, 4), overlap=0.0)).findings == ()


def test_every_module_below_its_rank_is_counted() -> None:
    """Also those of a single direction, in which there is nothing to be flat or peaked."""
    one, three = (LowRank(TASK.B * torch.tensor([1.0] * r + [0.0] * (4 - r)), TASK.A) for r in (1, 3))
    modules = {"layers.0.q": [one, OTHER], "layers.1.q": [three, OTHER], "layers.2.q": [TASK, OTHER]}
    for parts, words in ((modules, "in 2 of 3 modules"), ({"layers.0.q": [one, OTHER]}, "in 1 of 1 modules")):
        found = inspect_adapters(memory_sources(parts), progress=False)
        assert [words in text for text in texts(found, "note") if "fewer directions than its rank" in text] == [True]


def test_sign_conflict_is_a_warning() -> None:
    """Two tasks on the same directions, half of them reversed."""
    flipped = LowRank(TASK.svd.U * TASK.svd.S * torch.tensor([-1.0, 1.0, -1.0, 1.0]), TASK.svd.Vh)
    found = inspected(TASK, flipped)
    assert any("pull in opposite directions" in text for text in texts(found, "warning"))
    conflict = found.pairs[0].overall.sign_conflict  # type: ignore[union-attr]
    S = TASK.svd.S
    assert conflict == pytest.approx(float((S[0] + S[2]) / S.sum()), abs=1e-5)


def test_configs_in_words(tmp_path: Path) -> None:
    """Different bases, rsLoRA, patterns, targets without factors, dtypes, modules that only some have."""
    A, B = factors(24, 20, 2)
    paths = [
        checkpoint(tmp_path / "a", A, B, base_model_name_or_path="org/one", use_rslora=True),
        checkpoint(tmp_path / "b", A.flip(0) * 0.5, B.half(), base_model_name_or_path="org/two", rank_pattern={"q": 2}),
        checkpoint(tmp_path / "c", *factors(9, 8, 2, seed=5), module="dec.v", target_modules=["v", "gone"]),
    ]
    found = inspect_adapters(paths, progress=False)
    assert any("'org/one' (a); 'org/two' (b)" in text for text in texts(found, "refused"))
    assert any("'c' has no module in common" in text for text in texts(found, "refused"))
    notes = "\n".join(texts(found, "note"))
    assert "'a' uses rsLoRA" in notes and "'b' uses rank_pattern" in notes and "'c' targets 'gone'" in notes
    assert "some of the adapters only" in notes
    assert found.adapters[0].scalings == pytest.approx((4 / 2**0.5,))
    assert [finding.level for finding in found.findings] == sorted(
        (finding.level for finding in found.findings), key=["refused", "warning", "note"].index
    )


def test_an_adapter_that_cannot_be_merged_is_shown(tmp_path: Path) -> None:
    """DoRA, a damaged weight file and another kind of adapter: the config, and the reason instead of an exception."""
    good = write_checkpoint(tmp_path / "good")
    dora = write_checkpoint(tmp_path / "dora", use_dora=True, base_model_name_or_path="org/base")
    broken = write_checkpoint(tmp_path / "broken")
    (broken / "adapter_model.safetensors").write_bytes(b"no")
    foreign = write_checkpoint(tmp_path / "foreign", peft_type="IA3", r="many", rank_pattern=[1], target_modules=3)
    found = inspect_adapters([good, dora, broken, foreign], progress=False)
    assert [adapter.problem is None for adapter in found.adapters] == [True, False, False, False]
    assert "DoRA" in (found.adapters[1].problem or "") and found.adapters[1].info.base_model == "org/base"
    assert found.adapters[1].ranks == (2,) and found.adapters[1].target_modules == ("q",)
    assert "unreadable adapter_model.safetensors" in (found.adapters[2].problem or "")
    assert found.adapters[3].peft_type == "IA3" and found.adapters[3].ranks == ()
    assert len(texts(found, "refused")) == 3 and found.pairs[0].overall is None
    assert json.dumps(found.to_dict(), allow_nan=False)


def test_refusals(tmp_path: Path) -> None:
    """Where nothing is known there is nothing to show."""
    one = write_checkpoint(tmp_path / "one")
    with refused(SourceError, "no adapter directory", "nowhere"):
        inspect_adapters([one, tmp_path / "nowhere"])
    with refused(SourceError, "has no adapter_config.json"):
        inspect_adapters([tmp_path])
    with refused(OptionError, "no adapters to inspect"):
        inspect_adapters([])
    with refused(OptionError, "expected a list of adapters"):
        inspect_adapters(str(one))
    with refused(OptionError, "found a dict of adapters", "expected a list"):
        inspect_adapters({one: 1.0})  # type: ignore[arg-type]
    with refused(OptionError, "found a LowRank among the adapters"):
        inspect_adapters([LowRank(*factors(6, 5, 2)[::-1])])  # type: ignore[list-item]
    with refused(OptionError, "device 'moon'"):
        inspect_adapters([one], device="moon")
    with refused(OptionError, "expected those it was made from"):
        inspect_merge(one)
    with refused(OptionError, "no adapters to compare the merge with"):
        inspect_merge(one, [])
    other = checkpoint(tmp_path / "other", *factors(6, 9, 2))
    with refused(IncompatibleAdaptersError, "(6, 9)", "(6, 5)", "compare a merge with the adapters it was made from"):
        inspect_merge(one, [other], progress=False)


def test_a_merge_of_other_adapters_says_so() -> None:
    """Modules that the merge lacks count as lost; an adapter that is not in it has no strength."""
    first, second = memory_sources(
        {"layers.0.q": random_tasks(1, (9, 8), (2, 2)), "layers.1.q": random_tasks(2, (9, 8), (2, 2))}
    )
    only = memory_sources({"layers.0.q": [first.factors("layers.0.q")]})
    merged = DCMergeAdapter(method="ta").merge(only, progress=False)
    found = inspect_merge(merged, [first, second], progress=False)
    warnings = "\n".join(finding.text for finding in found.findings)
    assert "the merge has nothing for 1 modules of 'task0' ('layers.1.q')" in warnings
    assert found.modules["layers.1.q"]["task0"].projected_dir_sim == 0.0
    assert found.modules["layers.0.q"]["task0"].strength == pytest.approx(1.0)
    opposed = DCMergeAdapter(method="ta").merge([first, second], weights=[1.0, -1.0], progress=False)
    kept = inspect_merge(opposed, [first, second], progress=False)
    assert any("'task1' is not in the merge or is opposed" in finding.text for finding in kept.findings)


def test_a_task_left_behind_is_named() -> None:
    """An adapter at a twentieth of the others' weight keeps less of its directions than they do."""
    sources = memory_sources({"layers.0.q": random_tasks(0, (30, 30), (4, 4, 4), overlap=0.3)})
    merged = DCMergeAdapter(method="ta").merge(sources, [1.0, 1.0, 0.05], progress=False)
    found = [finding.text for finding in inspect_merge(merged, sources, progress=False).findings]
    assert any("'task2' keeps far less of its directions" in text for text in found)


def test_lost_directions_and_remarks_are_findings() -> None:
    """One warning for all adapters that lost directions, the worst first, and whatever the merge itself remarks."""
    sources = memory_sources({"layers.0.q": random_tasks(0, (30, 30), (4, 4), overlap=0.0)})
    cut = DCMergeAdapter(method="ta").merge(sources, [0.4, 1.0], svd_rank=1, progress=False)
    found = inspect_merge(cut, sources, progress=False)
    (lost,) = [finding for finding in found.findings if "has lost directions" in finding.text]
    kept = {name: kept.retained_energy for name, kept in found.overall.items()}
    assert lost.level == "warning" and kept["task0"] < kept["task1"] < 0.9
    assert f"{kept['task0']:.0%} of 'task0', {kept['task1']:.0%} of 'task1'. Raise svd_rank" in lost.text
    with pytest.warns(MergeWarning):
        ties = DCMergeAdapter(method="ties").merge(sources, progress=False)
    notes = [finding for finding in inspect_merge(ties, sources, progress=False).findings if finding.level == "note"]
    assert [note.text for note in notes] == list(ties.remarks)
    assert "fuse it into the base model" in notes[0].text and notes[0].adapters == ("task0", "task1")

"""Methods with data through every door: Python, the command line, YAML files, PEFT, resumed merges, and what is recorded."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from typer.testing import CliRunner

from dc_merge_peft import DATA_METHODS, METHODS, DCMergeAdapter, OptionError, statistics, tune
from dc_merge_peft.cli import app
from dc_merge_peft.errors import OutputError
from dc_merge_peft.methods import EVERY_METHOD
from dc_merge_peft.outputs.public import public_copy
from dc_merge_peft.runconfig import RunConfig, run_record
from tests.data.conftest import Prepared
from tests.support import models
from tests.support.refused import listing, refused

pytestmark = pytest.mark.filterwarnings("ignore::dc_merge_peft.MergeWarning")
every_data_method = pytest.mark.parametrize("name", DATA_METHODS)


def test_registers_are_apart() -> None:
    """Both kinds can be chosen by name; those that need no data come first."""
    assert list(EVERY_METHOD) == [*METHODS, *DATA_METHODS]
    for name, method in DATA_METHODS.items():
        assert method.name == name and method.title and method.reference and method.link


@every_data_method
def test_every_door_gives_the_same(name: str, prepared: Prepared, tmp_path: Path) -> None:
    """Statistics in memory, in files, on the command line, in a configuration, and in PEFT; in the adapters' order."""
    given = prepared.loaded(name)
    merged = DCMergeAdapter(method=name, statistics=given).merge(prepared.adapters, svd_rank=4)
    unsigned = [
        dataclasses.replace(part, delta_norms={}) for part in given[::-1]
    ]  # with their owners known they are refused
    swapped = DCMergeAdapter(method=name, statistics=unsigned).merge(prepared.adapters, svd_rank=4)
    module = next(iter(merged.modules))
    assert models.difference(swapped.delta(module), merged.delta(module)) > 1e-2

    out, again = tmp_path / "out", tmp_path / "again"
    command = [
        "merge",
        *prepared.adapters,
        "-o",
        str(out),
        "-m",
        name,
        "--svd-rank",
        "4",
        "-O",
        f"statistics={','.join(prepared.files[name])}",
    ]
    assert CliRunner().invoke(app, command, catch_exceptions=False).exit_code == 0
    assert RunConfig.read(out / "dc_merge.yaml").options["statistics"] == prepared.files[name]
    command = ["merge", "--config", str(out / "dc_merge.yaml"), "-o", str(again)]
    assert CliRunner().invoke(app, command, catch_exceptions=False).exit_code == 0
    paths = [Path(file) for file in prepared.files[name]]
    resumed = DCMergeAdapter(method=name, statistics=paths).merge(
        prepared.adapters, svd_rank=4, resume=tmp_path / "work"
    )

    prepared.model.add_weighted_adapter(
        ["math", "prose"], [1.0, 1.0], name, combination_type=name, svd_rank=4, statistics=paths
    )
    live = models.deltas(prepared.model, name)
    prepared.model.delete_adapter(name)
    saved = [DCMergeAdapter(method="ta").merge([folder]) for folder in (out, again)]
    for module in merged.modules:
        for found in (*(result.delta(module) for result in (*saved, resumed)), live[module]):
            assert models.difference(found, merged.delta(module)) < 1e-6


@every_data_method
def test_result_is_kept_whole(name: str, prepared: Prepared) -> None:
    """RegMean's is a LoRA of the summed rank without any error; Fisher's has full rank. Both take weights and alpha="auto"."""
    merger = DCMergeAdapter(method=name, statistics=prepared.files[name], alpha="auto")
    merged = merger.merge(prepared.adapters, [1.0, 0.5], keep_dense=True)
    assert merged.alpha > 0 and (merged.max_rank, merged.truncation_error) == (
        (4, 0.0) if name == "regmean" else (16, 0.0)
    )
    assert (merged.alpha == 1.0) == (name == "regmean")  # an optimum has its strength already
    plain = DCMergeAdapter(method="average").merge(prepared.adapters, [1.0, 0.5])
    module = next(iter(merged.modules))
    assert 1e-3 < models.difference(merged.with_alpha(1.0).delta(module), plain.delta(module)) < 1


def test_files_hold_what_was_collected(prepared: Prepared, tmp_path: Path) -> None:
    """Tensors to the last bit, and where they come from; a file that exists is replaced."""
    (found, _), target = prepared.loaded("fisher"), tmp_path / "new" / "copy.safetensors"
    for _ in range(2):
        copy = statistics.load(statistics.save(found, target))
        (tmp_path / "ordinary").touch()
        assert target.stat().st_mode == (tmp_path / "ordinary").stat().st_mode
    assert (copy.kind, copy.examples, copy.rule) == (found.kind, 6, found.rule) and "drawn" in copy.rule
    assert copy.tensors.keys() == found.tensors.keys() and len(copy.tensors) == 4
    assert all(torch.equal(copy.tensors[path], values) for path, values in found.tensors.items())
    assert [file.name for file in target.parent.iterdir()] == ["copy.safetensors"]
    with pytest.raises(OutputError, match="can't be written"):
        statistics.save(found, target / "below.safetensors")


def test_what_is_recorded(prepared: Prepared) -> None:
    """Files by their paths, and by their names alone where it is published; statistics in memory by what they are."""
    files = prepared.files["regmean"]
    merged = DCMergeAdapter(method="regmean", statistics=files).merge(prepared.adapters)
    assert run_record(merged)["options"]["statistics"] == files
    published = yaml.safe_dump(run_record(public_copy(merged)))
    assert "math-regmean.safetensors" in published and str(Path(files[0]).parent) not in published
    (one, other), path = prepared.loaded("regmean"), "bert.encoder.layer.0.attention.self.query"
    bare = [statistics.Statistics(given.kind, {**given.tensors}, given.examples) for given in (one, other)]
    merged = DCMergeAdapter(method="regmean", statistics=bare).merge(prepared.adapters)
    assert run_record(merged)["options"]["statistics"] == ["<in memory: gram of 6 examples>"] * 2
    assert path in merged.modules
    with pytest.raises(OptionError, match=r"<in memory: gram of 6 examples> were in memory .* expected a file"):
        DCMergeAdapter(method="regmean", statistics=run_record(merged)["options"]["statistics"]).merge(
            prepared.adapters
        )


def test_statistics_are_not_overwritten(prepared: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where they lie beside an earlier output, it is not replaced: they went with it."""
    monkeypatch.chdir(tmp_path)
    merger, base = DCMergeAdapter(method="regmean", statistics=prepared.files["regmean"]), tmp_path / "base"
    merger.merge(prepared.adapters).save_pretrained("out")
    models.bert().save_pretrained(base)
    files = [shutil.copy(file, "out") for file in prepared.files["regmean"]]
    before, words = listing(tmp_path), f"the output 'out' holds '{files[0]}', of which it is to be made"
    merger = DCMergeAdapter(method="regmean", statistics=files)
    for write in (
        lambda: merger.merge(prepared.adapters).save_pretrained("out", overwrite=True),
        lambda: merger.fuse_to_disk(base, prepared.adapters, "out", overwrite=True),
        lambda: merger.fuse(base, prepared.adapters, "out", overwrite=True),
        lambda: merger.merge_full(base, [base], "out", overwrite=True),
    ):
        with refused(OutputError, words, "another directory"):
            write()
    options = ["-m", "regmean", "-O", f"statistics={','.join(files)}", "--overwrite"]
    tuning = ["tune", *prepared.adapters, "--command", "true {adapter}", "-o", "tuned.yaml", "--save", "out", *options]
    for command in (
        ["merge", *prepared.adapters, "-o", "out", *options],
        ["fuse", str(base), *prepared.adapters, "-o", "out", *options],
        ["merge-full", str(base), str(base), "-o", "out", *options],
        [*tuning, "--dry-run"],
    ):
        done = CliRunner().invoke(app, command)
        assert (done.exit_code, words in done.output) == (2, True), done.output
    assert listing(tmp_path) == before


def test_tuned_from_files(prepared: Prepared) -> None:
    """Options of a method with data are searched like any others, its statistics read for each merge."""
    found = tune(
        prepared.adapters, lambda merged: -abs(merged.options["off_diagonal"] - 0.5) - abs(merged.alpha - 2), {"off_diagonal": [0.5, 0.9]},
        merger=DCMergeAdapter(method="regmean", statistics=prepared.files["regmean"]), alphas=[1.0, 2.0], progress=False,
    )  # fmt: skip
    assert (found.best.settings["off_diagonal"], found.best.settings["alpha"]) == (0.5, 2.0)
    assert found.config.options["statistics"] == prepared.files["regmean"]


def test_other_statistics_are_another_merge(prepared: Prepared, tmp_path: Path) -> None:
    """What ``resume`` has kept is not used again for statistics that have changed since."""
    files = [
        statistics.save(given, tmp_path / f"{index}.safetensors")
        for index, given in enumerate(prepared.loaded("regmean"))
    ]
    from dc_merge_peft.plan import plan_merge
    from dc_merge_peft.sources.opening import open_sources
    from dc_merge_peft.work.manifest import differences, manifest

    merger = DCMergeAdapter(method="regmean", statistics=files)
    sources = open_sources(prepared.adapters, None, None, keep_extras=False)
    plan = plan_merge(sources, merger.method)
    settings = {"devices": (), "allow_zero": False, "keep_dense": False}
    before = manifest(plan, sources, merger.method, None, **settings)
    assert list(differences(before, manifest(plan, sources, merger.method, None, **settings))) == []
    statistics.save(prepared.loaded("regmean")[1], files[0])
    changed = list(differences(before, manifest(plan, sources, merger.method, None, **settings)))
    assert len(changed) == 1 and changed[0].startswith("statistics [")
    for source in sources:
        source.close()

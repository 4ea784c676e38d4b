"""Options, plans and reports of the vision tables: everything around what is measured."""

from __future__ import annotations

from pathlib import Path

import pytest
from reproduce import command, expected, needs
from reproduce.contenders import FFT, LORA, chosen
from reproduce.vision import run
from reproduce.vision.report import page

from tests.support.clip import write_adapter


@pytest.fixture
def adapters(tmp_path: Path) -> Path:
    """A folder with an adapter of one task."""
    write_adapter(tmp_path / "adapters/eurosat", 2)
    return tmp_path / "adapters"


def test_dry_run(clip_folder: Path, adapters: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What is missing is named, nothing is made, and a real run refuses with the same list."""
    places = ["--base", str(clip_folder), "--checkpoints", str(adapters), "--cache", str(tmp_path / "cache")]
    line = ["table1", *places, "--device", "cpu", "--tasks", "16"]
    assert command.main(["table2", *places, "--device", "cpu", "--tasks", "20", "--dry-run"]) == 1
    assert "MISSING: no id of the Hub is known; give --data DIR with a folder EMNIST" in capsys.readouterr().out
    assert command.main([*line, "--dry-run"]) == 1
    shown = capsys.readouterr().out
    assert f"| LoRA adapter of EuroSAT | {adapters / 'eurosat'} | 0.0 GB | there |" in shown
    assert "Estimates, not measurements" in shown and not (tmp_path / "cache").exists()
    with pytest.raises(
        SystemExit, match="things missing: expected them before the start\n- LoRA adapter of Cars: give --checkpoints"
    ):
        command.main(line)


def test_paths_that_lead_nowhere(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """They are no ids of the Hub: nothing is fetched before they are found missing."""
    line = [
        "table9",
        "--cache",
        str(tmp_path),
        "--device",
        "cpu",
        "--base",
        "./no-clip",
        "--checkpoint",
        f"Cars={tmp_path}/no",
    ]
    assert command.main([*line, "--dataset", f"Cars={tmp_path}", "--dry-run"]) == 1
    assert (
        capsys.readouterr().out.count("MISSING: there is no such file or folder") == 2
    )  # a data set's folder is there
    with pytest.raises(SystemExit, match=r"LoRA adapter of Cars: there is no such file or folder: .*/no\n"):
        command.main(line)


def test_room_for_what_is_fetched(
    clip_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The Hub's cache is another place than the run's own, and has room of its own."""
    shared = tmp_path / "hub"
    monkeypatch.setattr(needs, "HF_HOME", str(shared))
    monkeypatch.setattr(needs, "_free", lambda place: 20.0 if place == shared else 1000.0)
    line = ["table9", "--base", str(clip_folder), "--cache", str(tmp_path / "cache"), "--device", "cpu", "--dry-run"]
    command.main(line)
    shown = capsys.readouterr().out
    # The photographs of SUN397 alone are 14 GB, and as many again as tables.
    assert "| images of SUN397 | tanganke/sun397 on the Hub | 28.0 GB |" in shown
    assert f"fetched into {shared}, unless it is there: 4" in shown and "of 20 GB that are free there" in shown
    assert "There may be too little room for what is fetched: give another place with HF_HOME." in shown
    assert "too little room in the cache's place" not in shown


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--tasks", "1"], "found --tasks 1: expected numbers from 2 to 16"),
        (["--methods", "magic"], "found the method 'magic': expected some of dc, dc, average"),
        (["--checkpoint", "Cars"], "found --checkpoint Cars: expected --checkpoint TASK=VALUE"),
        (["--dataset", "Cars=a:b:c:d:e:f"], "expected TASK=ID"),
        (["--device", "cuda:77"], "found no device 'cuda:77'"),
        (["--classes", "nowhere.json"], "nowhere.json: can't be read as JSON"),
        (["--data", "nowhere"], "found no folder nowhere: expected one with a folder of images for each task"),
        (["--data", "nowhere", "--dataset", "Cars=a/b"], "found no folder nowhere"),
    ],
)
def test_wrong_options(more: list[str], message: str, tmp_path: Path) -> None:
    """Each is refused before anything is loaded."""
    with pytest.raises(SystemExit, match=message):
        command.main(["table1", "--cache", str(tmp_path), *more])


@pytest.mark.parametrize("content", ["[]", '{"DTD": "banded"}', '{"DTD": [1]}', "3"])
def test_wrong_classes(content: str, tmp_path: Path) -> None:
    """Names are lists of text, by task."""
    (tmp_path / "classes.json").write_text(content)
    with pytest.raises(SystemExit, match="found no lists of names by task"):
        command.main(["table1", "--cache", str(tmp_path), "--classes", str(tmp_path / "classes.json")])


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (["table1", "--examples", "0"], "--examples: found '0': expected a whole number of at least 1"),
        (["table1", "--threads", "-1"], "--threads: found '-1'"),
        (["mergebench", "--batch", "0"], "--batch: found '0'"),
        (["mergebench", "--alpha", "nan"], "--alpha: found 'nan': expected a number, or auto"),
        (["mergebench", "--alpha", "two"], "--alpha: found 'two'"),
    ],
)
def test_wrong_numbers(line: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Those that end in a traceback later, or count as all there is."""
    with pytest.raises(SystemExit):
        command.main(line)
    assert message in capsys.readouterr().err


def test_wrong_choices(tmp_path: Path) -> None:
    """The file of ImageNet's prompt is there and has something in it."""
    (tmp_path / "empty.txt").write_text("\n")
    for name, message in (("none.txt", "can't be read"), ("empty.txt", "found no names")):
        with pytest.raises(SystemExit, match=f"{name}: {message}"):
            command.main(["mergebench", "--imagenet-choices", str(tmp_path / name)])


def test_other_sources_by_option(tmp_path: Path) -> None:
    """Data sets and checkpoints of one's own, for single tasks."""
    line = [
        "table9",
        "--cache",
        str(tmp_path),
        "--dataset",
        "Cars=me/cars:main::valid",
        "--checkpoint",
        "dtd=me/dtd-lora",
    ]
    made = run.run_of("table9", command.parser().parse_args(line))
    cars = made.places["Cars"]
    assert cars is not None and cars.hub is not None
    assert (cars.hub.id, cars.hub.config, cars.hub.train, cars.hub.validation) == ("me/cars", "main", "train", "valid")
    assert (
        made.checkpoints["DTD"] == "me/dtd-lora"
        and made.checkpoints["SVHN"] == "hoffman-lab/KnOTS-ViT-B-32_lora_R16_svhn"
    )


def test_names_of_fusion_benchs_models(tmp_path: Path) -> None:
    """Their heads stand for other classes than the authors' where the labels do not fit the authors' names."""
    line = ["table2", "--cache", str(tmp_path), "--tasks", "14", "--device", "cpu"]
    theirs = run.run_of("table2", command.parser().parse_args([*line, "--fusion-bench"]))
    assert theirs.given.classes["FER2013"][4] == "neutral"
    assert not run.run_of("table2", command.parser().parse_args(line)).given.classes


def test_methods_are_rows_of_the_tables() -> None:
    """Every row of the paper's tables has a method, and every method a row."""
    labels = {contender.label.partition(",")[0] for contender in LORA} | {"own adapters"}
    assert all(set(rows) == labels for rows in expected.TABLE1.values())
    assert {*labels} - {"own adapters"} == set(expected.TABLE9)
    labels = {contender.label for contender in FFT} | {"own adapters"}
    assert all(set(rows) == labels for rows in expected.TABLE2.values())
    assert [one.label for one in chosen(LORA, ["ta"])] == ["dc", "ta"]


def test_papers_numbers_agree_with_each_other() -> None:
    """Averages printed in one table are those of the tasks printed in another, but for one of the paper's own slips."""
    for label, row in expected.TABLE9.items():
        assert sum(row[:8]) / 8 == pytest.approx(row[8], abs=0.06), label
    for label, (seen, unseen) in expected.TABLE3.items():
        row = expected.TABLE13[label]
        assert sum(row[:8]) / 8 == pytest.approx(seen, abs=0.1 if label == "robust" else 0.011), label
        assert unseen is None or sum(row[8:]) / 4 == pytest.approx(unseen, abs=0.011), label


def line_of(label: str, rule: str, value: float, tasks: float) -> dict[str, object]:
    """A line of results at eight tasks."""
    interval = {"value": value, "low": value - 0.01, "high": value + 0.01}
    by_task = dict.fromkeys(expected.TABLE9_TASKS, tasks)
    return {
        "tasks": 8,
        "label": label,
        "rule": rule,
        "accuracy": interval,
        "normalized": interval,
        "by_task": by_task,
        "alpha": [1.2],
    }


def test_report_has_the_differences() -> None:
    """Measured minus the paper's, in points; none on a part of the examples."""
    lines = [
        line_of("own adapters", "", 0.88, 0.8),
        line_of("dc", "validation", 0.65, 0.4),
        line_of("dc", "auto", 0.1, 0.1),
    ]
    results = {"settings": {"counts": [8]}, "merged": lines, "unseen": []}
    numbers = expected.TABLE1["ViT-B/32"]
    text = page("T", results, numbers, (8, 12, 16), ["a note"], complete=True, by_task=True)
    assert "| DC-Merge | 65.0 (64.0 to 66.0) | 64.17 | +0.83 | 65.0 (64.0 to 66.0) | 73.90 | -8.90 | 1.2 |" in text
    # Half of the own adapters' accuracy on every task, against 90.9 on Cars.
    assert "| DC-Merge | 50.0 (-40.9) |" in text and "- a note" in text and text.count("| DC-Merge |") == 2
    part = page("T", results, numbers, (8, 12, 16), [], complete=False)
    assert "+0.83" not in part and "nothing here can be compared with the paper" in part

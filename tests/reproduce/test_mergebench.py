"""MM-MergeBench on a tiny LLaVA: question files to the report, by the way the real ones go."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accuracy.evaluate import Rows
from PIL import Image
from reproduce import command
from reproduce.contenders import MERGEBENCH
from reproduce.expected import TABLE13, TABLE13_SEEN, TABLE13_UNSEEN
from reproduce.mergebench import model as llava
from reproduce.mergebench import report, run
from reproduce.mergebench.questions import Questions, read
from reproduce.mergebench.scoring import Score
from reproduce.mergebench.tasks import SEEN, TASKS, UNSEEN

from dc_merge_peft import DCMergeAdapter, MergeWarning
from tests.support.llava import llava as tiny_llava
from tests.support.llava import write_original
from tests.support.versions import needs_safe_pickles
from tests.support.words import llava_processor

SHORT = {name: dataclasses.replace(task, tokens=2) for name, task in TASKS.items()}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny LLaVA with its processor."""
    folder = tmp_path_factory.mktemp("llava")
    tiny_llava().save_pretrained(folder)
    llava_processor().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight adapters of the original repository's layout under their names on the Hub."""
    folder = tmp_path_factory.mktemp("adapters")
    for seed, task in enumerate(SEEN):
        write_original(folder / f"LLaVA_7B_lora_r16_{TASKS[task].adapter}", 60 + seed)
    return folder


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Question files and images of every task, two questions each."""
    folder = tmp_path_factory.mktemp("bench")
    images = folder / "images"
    (images / "ScienceQA").mkdir(parents=True)
    numbers = np.random.default_rng(0)
    for name, sides in (("wide.png", (8, 14)), ("tall.png", (15, 8))):
        Image.fromarray(numbers.integers(0, 255, (*sides, 3), dtype=np.uint8)).save(images / name)
    problems = {str(n): {"choices": ["x", "y"], "answer": n % 2} for n in range(2)}
    (images / "ScienceQA/problems.json").write_text(json.dumps(problems))
    for name, task in TASKS.items():
        rows: list[dict[str, Any]] = [
            {
                "question_id": str(n),
                "text": "<image>\nwhat is in the picture\nbe short",
                "answer": "square",
                "image": f"./{file}",
            }
            for n, file in enumerate(("wide.png", "tall.png"))
        ]
        if name == "ScienceQA":
            del rows[1]["image"]
        if name == "REC":
            rows = [{**row, "answer_bbox": "[0.1, 0.1, 0.9, 0.9]"} for row in rows]
        file = folder / "instructions" / task.questions
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(rows))
        if task.captions:
            lines = [{"image_id": n, "caption": text} for n in (1, 2) for text in ("a square", "the circle")]
            (folder / "instructions" / task.captions).write_text(json.dumps({"annotations": lines}))
    return folder


def questions(bench: Path, task: str) -> Questions:
    """Of one task."""
    return read(SHORT[task], bench / "instructions", bench / "images")


def test_tasks_are_the_papers() -> None:
    """Eight with adapters and four without, in the order of Table 13, whose rows all have methods."""
    assert SEEN == TABLE13_SEEN and UNSEEN == TABLE13_UNSEEN
    assert TASKS["Flickr30k"].adapter_id == "AuroraZengfh/LLaVA_7B_lora_r16_flickr30k"
    assert {one.label for one in MERGEBENCH} == TABLE13.keys() - {"own adapters", "base model"}


def test_prompts(bench: Path) -> None:
    """One image token, before the question; none without an image. ImageNet's prompt lists names."""
    with_image, without = questions(bench, "ScienceQA").rows
    assert llava.prompt(with_image).endswith("USER: <image>\nwhat is in the picture\nbe short ASSISTANT:")
    assert "USER: what is in the picture" in llava.prompt(without)
    assert (
        questions(bench, "ImageNet").rows[0]["text"]
        == "what is in the picture\nChoose an answer from the choices below: square."
    )
    listed = read(TASKS["ImageNet"], bench / "instructions", bench / "images", choices="Cat, Dog.")
    assert listed.rows[0]["text"].endswith("below: Cat, Dog.")


def test_pictures(bench: Path, base: Path) -> None:
    """Padded ones are squares with the picture in the middle, nothing lost; the others stay as they are."""
    _, processor = llava.load(base, "float32", "cpu")
    file = bench / "images/wide.png"
    padded = np.asarray(llava.picture(file, processor, padded=True))
    original = np.asarray(Image.open(file))
    assert padded.shape == (14, 14, 3) and np.array_equal(padded[3:11], original)
    assert tuple(padded[0, 0]) == tuple(int(255 * mean) for mean in processor.image_processor.image_mean)
    assert llava.picture(file, processor, padded=False).size == (14, 8)


def test_batches_keep_the_order() -> None:
    """Questions with an image and those without are never asked together."""
    rows = [{"question_id": n, **({"image": "x"} if n in (0, 1, 2, 5) else {})} for n in range(6)]
    found = [[row["question_id"] for row in group] for group in llava.batches(rows, 2)]
    assert found == [[0, 1], [2], [3, 4], [5]]


def test_answers_in_batches(bench: Path, base: Path) -> None:
    """Questions of different lengths, padded together, get the answers that they get alone."""
    model, processor = llava.load(base, "float32", "cpu")
    asked = questions(bench, "VQAv2")
    longer = [{**asked.rows[0], "text": "write a function that adds two numbers"}, *asked.rows]
    asked = dataclasses.replace(asked, rows=longer)
    together = list(llava.answered(model, processor, asked, bench / "images", 3))
    assert together == list(llava.answered(model, processor, asked, bench / "images", 1)) and any(together)


@needs_safe_pickles
@pytest.mark.parametrize("method", ["ta", "ties"])
def test_adapters_are_in_the_model(method: str, base: Path, adapters: Path, tmp_path: Path) -> None:
    """Weights and projector are those of the library's own merge, whole where it has no low rank; alpha is on the deltas alone."""
    places = []
    for number, place in enumerate(sorted(adapters.iterdir())[:3]):
        places.append(shutil.copytree(place, tmp_path / place.name))
        config = json.loads((places[-1] / "adapter_config.json").read_text())
        config["base_model_name_or_path"] = f"/home/{number}/llava-v1.5-7b"
        (places[-1] / "adapter_config.json").write_text(json.dumps(config))
    model, _ = llava.load(base, "float32", "cpu")
    plain = {name: value.clone() for name, value in model.state_dict().items()}
    assert llava.with_adapters(model, places, method, {}, 0.5, tmp_path / "scratch") == 0.5
    with pytest.warns(MergeWarning, match="the plain mean"):
        merged = DCMergeAdapter(method=method, alpha=0.5).merge(
            places, rename="llava-hf", extras="average", keep_dense=True, allow_different_bases=True
        )
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, plain[name])}
    weights = {f"{module}.weight" for module in merged.modules}
    projector = {f"model.multi_modal_projector.linear_{n}.{kind}" for n in (1, 2) for kind in ("weight", "bias")}
    assert changed == weights | projector and not list((tmp_path / "scratch").iterdir())
    for module in merged.modules:
        expected = plain[f"{module}.weight"] + merged.delta(module)
        torch.testing.assert_close(model.state_dict()[f"{module}.weight"], expected, atol=1e-5, rtol=1e-4)
    for name in projector:
        torch.testing.assert_close(model.state_dict()[name], merged.extras.values[name].value)


def line(base: Path, adapters: Path, bench: Path, cache: Path, *more: str) -> list[str]:
    """A command line."""
    return [
        "mergebench", "--base", str(base), "--checkpoints", str(adapters), "--instructions", str(bench / "instructions"),
        "--images", str(bench / "images"), "--cache", str(cache), "--device", "cpu", "--dtype", "float32", *more,
    ]  # fmt: skip


@needs_safe_pickles
def test_from_questions_to_the_report(
    base: Path,
    adapters: Path,
    bench: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """One command asks everything; a second one asks nothing, and after a change of questions only those."""
    few = [
        dataclasses.replace(one, options={**one.options, **({"density": 0.1} if "density" in one.options else {})})
        for one in MERGEBENCH
    ]
    monkeypatch.setattr(run, "MERGEBENCH", few)
    monkeypatch.setattr(run, "TASKS", SHORT)
    monkeypatch.setattr(run, "SAID_EVERY", 1)
    arguments = line(base, adapters, bench, tmp_path)
    assert command.main(arguments) == 0
    shown = capsys.readouterr()
    assert "base model, VQAv2: 2 of 2 answers" in shown.err
    text = Path(shown.out.strip()).read_text(encoding="utf-8")
    file = tmp_path / "mergebench/results/answers-float32.jsonl"
    rows = Rows(file).found
    # The base model and one merge on twelve tasks, eight adapters on their own.
    assert len(rows) == 2 * 12 + 8 and all(len(row["answers"]) == 2 for row in rows.values())
    assert len({tuple(row["answers"]) for row in rows.values()}) > 3  # models differ in what they say
    assert "| Individual |" in text and "| DC-Merge |" in text and "without METEOR, so not the paper's number" in text

    asked: list[str] = []
    real = llava.answered
    monkeypatch.setattr(
        llava, "answered", lambda model, p, q, i, b: asked.append(q.task.name) or real(model, p, q, i, b)
    )
    assert command.main(arguments) == 0 and not asked
    before = file.read_bytes()
    assert command.main([*arguments, "--examples", "1"]) == 0 and file.read_bytes() == before  # a try stands beside it
    asked.clear()
    assert command.main(arguments) == 0 and not asked
    # Another library whose merges are the same asks nothing either; one with other merges asks them again.
    monkeypatch.setattr(run, "code_key", lambda: "another")
    assert command.main(arguments) == 0 and not asked
    assert {row["code"] for row in Rows(file).found.values()} == {"", "another"}
    merge = llava.with_adapters
    monkeypatch.setattr(run, "code_key", lambda: "a third")
    monkeypatch.setattr(llava, "with_adapters", lambda model, places, *more: merge(model, places[:7], *more))
    assert command.main(arguments) == 0 and len(asked) == 12
    asked.clear()
    listed = tmp_path / "names.txt"
    listed.write_text("Cat, Dog")
    assert command.main([*arguments, "--imagenet-choices", str(listed)]) == 0 and set(asked) == {"ImageNet"}
    assert len(asked) == 3


def test_dry_run(base: Path, adapters: Path, bench: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """All is there, or what is not is named."""
    assert command.main([*line(base, adapters, bench, tmp_path), "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert "Nothing is known to be missing." in shown and f"written to {tmp_path / 'mergebench'}: 0 GB" in shown
    assert command.main([*line(base, adapters, bench, tmp_path), "--dry-run", "--methods", "ties"]) == 0
    assert "mergebench: 26 GB" in capsys.readouterr().out
    arguments = [*line(base, adapters, bench, tmp_path), "--instructions", str(tmp_path), "--seen-only"]
    assert command.main([*arguments, "--dry-run"]) == 1
    shown = capsys.readouterr().out
    # Eight tasks' questions, and two tasks' captions.
    assert "10 of 20 things are missing." in shown and "from AuroraZengfh/MM-MergeBench" in shown
    with pytest.raises(SystemExit, match="found 10 things missing"):
        command.main(arguments)


def test_questions_as_the_hub_has_them(bench: Path, tmp_path: Path) -> None:
    """Seen and unseen tasks have folders of their own there; ScienceQA's right letters are in its questions, too."""
    for task in TASKS.values():
        for name in filter(None, (task.questions, task.captions)):
            file = tmp_path / ("Unseen_data" if task.adapter is None else "Seen_data") / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes((bench / "instructions" / name).read_bytes())
    for name, task in TASKS.items():
        assert (
            read(task, tmp_path, bench / "images").key() == read(task, bench / "instructions", bench / "images").key()
        ), name
    file, images = tmp_path / "Seen_data/ScienceQA/test.json", tmp_path / "images"
    images.mkdir()
    rows = [{"question_id": n, "text": "which", "answer": letter} for n, letter in enumerate("BA")]
    file.write_text(json.dumps(rows))
    science = TASKS["ScienceQA"]
    asked = read(science, tmp_path, images).rows
    assert science.right is not None and [science.right("B", row) for row in asked] == [True, False]
    file.write_text(json.dumps([{**row, "answer": "the second"} for row in rows]))
    with pytest.raises(SystemExit, match=r"found no file .*problems.json: expected it"):
        read(science, tmp_path, images)


def test_wrong_questions(bench: Path, tmp_path: Path) -> None:
    """Files that lack something are refused before a model is loaded."""
    task = TASKS["VQAv2"]
    file = tmp_path / task.questions
    file.parent.mkdir()
    for content, message in (
        ("[]", "found no list of questions"),
        ("{", "found no JSON"),
        ('[{"question_id": 1, "text": "a"}]', "found a question without answer: expected it"),
        ('[{"question_id": 1, "text": "a", "answer": "b", "image": "no.png"}]', "found no 1 of 1 images"),
    ):
        file.write_text(content)
        with pytest.raises(SystemExit, match=message):
            read(task, tmp_path, bench / "images")
    with pytest.raises(SystemExit, match="found no file"):
        read(TASKS["IconQA"], tmp_path, bench / "images")
    with pytest.raises(SystemExit, match="found --checkpoint Birds=x: expected TASK=PLACE with a task of ScienceQA"):
        command.main(["mergebench", "--checkpoint", "Birds=x"])
    with pytest.raises(
        SystemExit, match="found no adapter of ScienceQA: expected a folder named LLaVA_7B_lora_r16_ScienceQA"
    ):
        command.main(["mergebench", "--checkpoints", str(tmp_path)])


def test_report_has_the_differences() -> None:
    """Measured minus Table 13 where the measure is the paper's, and averages only of such."""
    scores = {("dc", task): Score(50.0, comparable=task != "VizWiz") for task in SEEN}
    row = report._row("dc", list(scores.values()), SEEN, complete=True)
    assert row[0] == "50.00 (-27.05)" and row[5] == "50.00" and row[-1] == "50.00"
    comparable = report._row("dc", [Score(50.0)] * 8, SEEN, complete=True)
    assert comparable[-1] == "50.00 (-9.62)"
    assert report._row("dc", [Score(50.0)] * 8, SEEN, complete=False)[-1] == "50.00"

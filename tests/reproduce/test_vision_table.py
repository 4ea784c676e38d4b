"""From folders to the report: Tables 1, 2 and 9 on tiny models, measured as the programs measure the real ones."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from accuracy.evaluate import Rows
from accuracy.kinds import FullModels
from peft import PeftModel
from PIL import Image
from reproduce import command
from reproduce.contenders import FFT
from reproduce.vision import run
from reproduce.vision.backbones import load_clip, load_tokenizer
from reproduce.vision.benches import PAPER_GRID, GridBench, grid_of
from reproduce.vision.checkpoints import keep_base, kept_tower
from reproduce.vision.images import Place
from reproduce.vision.openclip import AVERAGED, from_clip, load_tower
from reproduce.vision.suite import ClipSuite, Given
from transformers import CLIPImageProcessor, CLIPVisionModel

from dc_merge_peft import DCMergeAdapter
from tests.support.clip import SIDE, stored_encoder, tiny_clip
from tests.support.versions import needs_v5

TASKS = ("RenderedSST2", "EuroSAT", "FER2013")


def given(clip: Path, data: Path, adapters: Path, cache: Path) -> Given:
    """A suite's things."""
    names = dict(zip(TASKS, ("sst2", "eurosat", "fer2013"), strict=True))
    places = {task: Place(data / task) for task in TASKS}
    return Given(clip, places, {task: str(adapters / name) for task, name in names.items()}, cache, batch=4)


def test_hits_are_clips_own(clip_folder: Path, data: Path, adapters: Path, tmp_path: Path) -> None:
    """Right answers are those of the whole CLIP model, with PEFT's adapter in it, image by image."""
    suite = ClipSuite(given(clip_folder, data, adapters, tmp_path), TASKS)
    bench, clip = GridBench(suite, "float32"), load_clip(clip_folder)
    tower = PeftModel.from_pretrained(clip.vision_model, suite.adapter("EuroSAT", 0)).eval()
    processor = CLIPImageProcessor(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE})
    part, names = suite.parts("EuroSAT")["test"], suite.names("EuroSAT")
    tokenizer = load_tokenizer(clip_folder)
    prompts = (
        "a centered satellite photo of {}.",
        "a centered satellite photo of a {}.",
        "a centered satellite photo of the {}.",
    )
    texts = []
    for name in names:
        tokens = [tokenizer(prompt.format(name), return_tensors="pt")["input_ids"] for prompt in prompts]
        vectors = [clip.text_projection(clip.text_model(input_ids=ids).pooler_output)[0] for ids in tokens]
        texts.append(torch.stack([vector / vector.norm() for vector in vectors]).mean(dim=0))
    head = torch.stack([text / text.norm() for text in texts])
    expected_hits = ""
    for index in part.chosen:
        pixels = processor(part.images.image(index), return_tensors="pt")["pixel_values"]
        image = clip.visual_projection(tower(pixel_values=pixels).pooler_output)[0]
        right = int((image / image.norm() @ head.T).argmax()) == part.images.labels[index]
        expected_hits += str(int(right))
    found = bench.alone("EuroSAT", 0, {"test": 1000})
    assert found["test"] == expected_hits and set(expected_hits) == {"0", "1"}
    assert bench.alone("EuroSAT", None, {"test": 1000})["test"] != expected_hits


def options(table: str, clip: Path, data: Path, checkpoints: Path, cache: Path, *more: str) -> list[str]:
    """A command line."""
    places = ["--base", str(clip), "--data", str(data), "--checkpoints", str(checkpoints), "--cache", str(cache)]
    return [table, *places, "--device", "cpu", "--batch", "64", *more]


def digits(hits: torch.Tensor) -> str:
    """As rows keep them."""
    return "".join(str(int(hit)) for hit in hits)


def small_table(monkeypatch: pytest.MonkeyPatch, name: str, **orders: Sequence[str]) -> None:
    """Few tasks, by what is merged, and a density for tiny models: of 0.1 percent of their entries nothing would be left."""
    rows = [
        dataclasses.replace(c, options={**c.options, **({"density": 0.1} if "density" in c.options else {})})
        for c in run.TABLES[name].contenders
    ]
    monkeypatch.setattr(run, "ORDERS", orders)
    monkeypatch.setitem(run.TABLES, name, dataclasses.replace(run.TABLES[name], contenders=rows))


def test_table_of_adapters(
    clip_folder: Path,
    data: Path,
    adapters: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """One command gives the report; a second run measures nothing, another adapter only what it is in."""
    small_table(monkeypatch, "table1", lora=TASKS)
    line = options(
        "table1", clip_folder, data, adapters, tmp_path, "--tasks", "2", "3", "--methods", "ta", "dc, average"
    )
    assert command.main(line) == 0
    report = Path(capsys.readouterr().out.strip())
    text = report.read_text(encoding="utf-8")
    assert "## 3 tasks" in text and "DC-Merge, average" in text and "Task Arithmetic" in text and "Iso-CTS" not in text
    file = tmp_path / "table1/ViT-B-32/results/rows-float32-grid.jsonl"
    rows = Rows(file).found
    # Three tasks alone and with the base model, three methods at two numbers of tasks.
    assert len(rows) == 2 * 3 + 3 * 2
    assert {float(alpha) for alpha in rows["ta | RenderedSST2+EuroSAT | 0"]["scores"]} == set(PAPER_GRID)
    results = json.loads((report.parent / "results.json").read_text(encoding="utf-8"))
    own = next(one for one in results["merged"] if one["label"] == "own adapters" and one["tasks"] == 3)
    assert own["normalized"]["value"] == 1.0 and own["by_task"]["FER2013"] == np.mean(
        [int(hit) for hit in rows["FER2013 | 0"]["test"]]
    ).round(4)
    # What a row says is what a fresh model says with PEFT's own sum of the two adapters.
    row = rows["ta | RenderedSST2+EuroSAT | 0"]
    kept = tmp_path / "table1/ViT-B-32/checkpoints"
    suite = ClipSuite(given(clip_folder, data, adapters, tmp_path / "fresh"), TASKS)
    merged = DCMergeAdapter(method="ta", alpha=row["best"]).merge([kept / "RenderedSST2", kept / "EuroSAT"])
    model = PeftModel.from_pretrained(suite.model(), merged.save_pretrained(tmp_path / "merged")).eval()
    with torch.no_grad():
        fresh = {task: suite.hits(model, task, "test", 1000) for task in TASKS[:2]}
        base = suite.hits(suite.model(), "EuroSAT", "test", 1000)
    assert row["hits"]["validation"] == {task: digits(hits) for task, hits in fresh.items()}
    assert rows["EuroSAT | base"]["test"] == digits(base) != row["hits"]["validation"]["EuroSAT"]
    lines = file.read_text(encoding="utf-8").count("\n")
    assert command.main(line) == 0 and file.read_text(encoding="utf-8").count("\n") == lines
    assert report.read_text(encoding="utf-8") == text


@pytest.fixture(scope="module")
def towers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two towers near the base, one as transformers saves it and one as open_clip's programs do."""
    folder = tmp_path_factory.mktemp("towers")
    for seed, name in enumerate(("RenderedSST2Val", "EuroSATVal"), 1):
        tuned, generator = tiny_clip(), torch.Generator().manual_seed(seed)
        for parameter in (*tuned.vision_model.parameters(), tuned.visual_projection.weight):
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
        if seed == 1:
            vision = CLIPVisionModel(tuned.config.vision_config)
            inner = getattr(vision, "vision_model", vision)
            inner.load_state_dict(getattr(tuned.vision_model, "vision_model", tuned.vision_model).state_dict())
            vision.save_pretrained(folder / name)
        else:
            (folder / name).mkdir()
            torch.save(stored_encoder(tuned), folder / name / "nonlinear_finetuned.pt")
    return folder


@needs_v5
def test_table_of_towers(
    clip_folder: Path,
    data: Path,
    towers: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Fully fine-tuned models go the same way; their plain sum is base plus alpha times the differences of all."""
    small_table(monkeypatch, "table2", fft=TASKS[:2])
    line = options(
        "table2",
        clip_folder,
        data,
        towers,
        tmp_path,
        "--tasks",
        "2",
        "--methods",
        "ta",
        "average",
        "--search",
        "ladder",
    )
    assert command.main(line) == 0
    report = Path(capsys.readouterr().out.strip())
    text = report.read_text(encoding="utf-8")
    assert "| Task Arithmetic |" in text and "| Individual |" in text
    rows = Rows(report.parent / "rows-float32-ladder.jsonl").found
    tried = {name.partition(" |")[0]: len(row["scores"]) for name, row in rows.items() if "scores" in row}
    assert tried["average"] == 1 and tried["ta"] > 3 and rows["average | RenderedSST2+EuroSAT | 0"]["best"] == 1.0
    kept = tmp_path / "table2/ViT-B-32/checkpoints"
    places = [kept / "base", kept / "RenderedSST2", kept / "EuroSAT"]
    kind = FullModels(places[0], load_tower, how={"average": AVERAGED})
    one, two = (kind.own(place) for place in places[1:])
    merged = kind.merge(places[1:], "ta", {})
    # Query, key and value are one matrix, as where they were merged first; so are tables of two dimensions.
    assert one["transformer.resblocks.0.attn.in_proj_weight"].shape == (48, 16)
    for name in ("transformer.resblocks.0.attn.in_proj_weight", "proj.weight", "positional_embedding.weight"):
        # The first tower's projection is the base's: transformers' files have none.
        torch.testing.assert_close(merged.deltas[name], one.get(name, 0) + two[name], atol=1e-5, rtol=1e-4)
    for name in ("transformer.resblocks.0.ln_1.weight", "conv1.weight", "class_embedding"):
        torch.testing.assert_close(merged.deltas[name], (one[name] + two[name]) / 2, atol=1e-5, rtol=1e-4)


def test_labels_in_another_order_stop_a_run(clip_folder: Path, adapters: Path, tmp_path: Path) -> None:
    """Folders whose order would give the prompts to the wrong classes are refused by name."""
    for name in ("negative", "a positive"):
        place = tmp_path / "data/RenderedSST2/test" / name
        place.mkdir(parents=True)
        for number in range(5):
            Image.new("RGB", (16, 16)).save(place / f"{number}.png")
    made = Given(clip_folder, {"RenderedSST2": Place(tmp_path / "data/RenderedSST2")}, {}, tmp_path)
    with pytest.raises(SystemExit, match="found the label 'a positive' as number 0, where the prompts have 'negative'"):
        ClipSuite(made, ("RenderedSST2",)).head("RenderedSST2")


def test_grids_are_the_papers() -> None:
    """0.1 to 3.0; in full fine-tuning others for the oldest methods, and the mean of models is their mean."""
    assert grid_of("ta", "adapter") == PAPER_GRID == grid_of("tsvm", "model") == grid_of("dc", "model")
    assert tuple(grid_of("average", "model")) == (1.0,)
    fine = grid_of("ta", "model")
    assert (fine[0], fine[-1], len(fine)) == (pytest.approx(1 / 30, abs=1e-4), 1.0, 30) and fine == grid_of(
        "ties", "model"
    )


def test_stored_heads_of_other_classes_stop_a_run(
    clip_folder: Path, data: Path, adapters: Path, tmp_path: Path
) -> None:
    """The authors' heads count only where they fit the data's labels."""
    made = given(clip_folder, data, adapters, tmp_path)
    head = ClipSuite(made, TASKS, "fft").head("RenderedSST2")
    torch.save(100 * head, tmp_path / "sst2_head.pt")
    stored = ClipSuite(dataclasses.replace(made, heads=tmp_path), TASKS, "fft")
    torch.testing.assert_close(stored.head("RenderedSST2"), head)
    torch.save(100 * head.flip(0), tmp_path / "sst2_head.pt")
    with pytest.raises(SystemExit, match=r"sst2_head\.pt: found 2 of 2 classes nearest to the prompts of others"):
        ClipSuite(dataclasses.replace(made, heads=tmp_path), TASKS, "fft").head("RenderedSST2")


@needs_v5
def test_every_method_merges_towers(clip_folder: Path, towers: Path, tmp_path: Path) -> None:
    """All rows of Table 2, on the files that the programs keep; data-free alpha where it has a solution."""
    base = from_clip(load_clip(clip_folder))
    kept = [kept_tower(str(place), base, tmp_path / place.name) for place in sorted(towers.iterdir())]
    kind = FullModels(keep_base(base, tmp_path / "base"), load_tower, how={"average": AVERAGED})
    for one in FFT:
        options = {**one.options, **({"density": 0.1} if "density" in one.options else {})}
        merged = kind.merge(kept, one.method, options)
        assert merged.deltas.keys() <= dict(base.named_parameters()).keys(), one.label
        assert all(torch.isfinite(value).all() for value in merged.deltas.values()), one.label
        assert len(merged.deltas) > 20 and (merged.auto is None or merged.auto > 0), one.label

"""Tasks, class names, images and their parts, pixels: what a model is asked, before there is a model."""

from __future__ import annotations

import io
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from reproduce.vision.images import FolderImages, HubImages, Place, place_of
from reproduce.vision.parts import parts_of
from reproduce.vision.pixels import MEAN, STD, pixels, square
from reproduce.vision.tasks import NAMES, ORDERS, TASKS, HubData, class_names, scene, task_named
from transformers import CLIPImageProcessor

from tests.support.clip import write_images


def test_tasks_are_the_papers() -> None:
    """Numbers, orders and names fit together, and every prompt has room for a class."""
    assert len(TASKS) == 20 == len(set(ORDERS["fft"])) and len(ORDERS["lora"]) == 16
    assert set(ORDERS["lora"][8:12]) == {"CIFAR100", "Flowers102", "OxfordIIITPet", "STL10"}
    assert set(ORDERS["fft"][8:14]) == {"CIFAR100", "STL10", "Flowers102", "OxfordIIITPet", "PCAM", "FER2013"}
    for task in TASKS.values():
        assert all(prompt.count("{}") == 1 for prompt in (*task.templates, *task.fft_templates))
        assert len(NAMES.get(task.name, range(task.classes))) == task.classes
    assert len(TASKS["CIFAR100"].templates) == 18 == len(TASKS["RESISC45"].templates)
    assert TASKS["EuroSAT"].templates[1] == "a centered satellite photo of a {}."
    assert (len(TASKS["STL10"].prompts("lora")), len(TASKS["STL10"].prompts("fft"))) == (18, 2)


def test_tasks_by_other_names() -> None:
    """Folders' names are understood, and unknown ones listed."""
    assert task_named("stanford-cars").name == "Cars" and task_named("sst2").name == "RenderedSST2"
    with pytest.raises(SystemExit, match="found the task 'Birds': expected one of Cars, DTD"):
        task_named("Birds")


def test_class_names() -> None:
    """Labels become names, in their order; numbers and known names give those of the prompts."""
    pets = [f"breed_{n}" for n in range(37)]
    assert class_names(TASKS["OxfordIIITPet"], pets)[1] == "Breed 1"
    assert scene("a_airplane_cabin") == "airplane cabin" == scene("/a/airplane_cabin") and scene("abbey") == "abbey"
    assert class_names(TASKS["RenderedSST2"], ["0", "1"]) == ["negative", "positive"]
    own = list(TASKS["EuroSAT"].labels)
    assert class_names(TASKS["EuroSAT"], own)[2] == "brushland or shrubland"
    with pytest.raises(SystemExit, match="RenderedSST2: found the label 'positive' as number 0"):
        class_names(TASKS["RenderedSST2"], ["positive", "negative"])
    with pytest.raises(SystemExit, match="DTD: found 2 classes, as 'a': expected 47"):
        class_names(TASKS["DTD"], ["a", "b"])
    with pytest.raises(SystemExit, match="DTD: found numbers for classes"):
        class_names(TASKS["DTD"], [str(n) for n in range(47)])


def test_labels_as_published_data_have_them() -> None:
    """The flowers' data name one class otherwise than the prompts, and have spaces and question marks in others."""
    names = list(NAMES["Flowers102"])
    changed = {"air plant": "ball moss", "pink and yellow dahlia": "pink-yellow dahlia?", "hippeastrum": "hippeastrum "}
    assert class_names(TASKS["Flowers102"], [changed.get(name, name) for name in names]) == names
    with pytest.raises(SystemExit, match="found the label 'ball moss' as number 0"):
        class_names(TASKS["Flowers102"], ["ball moss", *names[1:]])


def test_faces_keep_the_order_that_models_were_trained_with() -> None:
    """Labels in alphabetical order, prompts in another: what the authors' models learned. Data in the prompts' order are refused."""
    faces, prompts = TASKS["FER2013"], NAMES["FER2013"]
    assert class_names(faces, ["angry", "disgust", "fear", "happy", "neutral", "sad", "surprise"]) == prompts
    assert class_names(faces, ["angry", "disgusted", "fearful", "happy", "neutral", "sad", "surprised"]) == prompts
    assert class_names(faces, [str(n) for n in range(7)]) == prompts and prompts[4] == "['sad', 'depressed']"
    with pytest.raises(
        SystemExit, match="'sad' as number 4, where the models were trained with 'neutral': expected the labels"
    ):
        class_names(faces, ["angry", "disgust", "fear", "happy", "sad", "surprise", "neutral"])


def test_images_of_folders(tmp_path: Path) -> None:
    """Classes stand by number where they are numbers; empty folders are refused."""
    write_images(tmp_path, {"test": 2}, ["10", "9", "2"], 0)
    found = FolderImages.read(tmp_path / "test")
    assert found.names == ["2", "9", "10"] and found.labels == [0, 0, 1, 1, 2, 2] and found.image(0).mode == "RGB"
    (tmp_path / "test" / "3").mkdir()
    with pytest.raises(SystemExit, match="3: found no images"):
        FolderImages.read(tmp_path / "test")
    with pytest.raises(SystemExit, match="found no folders"):
        FolderImages.read(tmp_path / "test" / "3")


class Rows:
    """Just enough of a data set of the package ``datasets``."""

    def __init__(self, columns: dict[str, list[object]], names: list[str] | None) -> None:
        self.columns, self.column_names = columns, list(columns)
        self.features = {name: type("Feature", (), {"names": names}) for name in columns}
        self._fingerprint = "fingerprint"

    def select_columns(self, names: list[str]) -> Rows:
        return Rows({name: self.columns[name] for name in names}, self.features[names[1]].names)

    def rename_columns(self, names: dict[str, str]) -> Rows:
        first = next(iter(self.features.values())).names
        return Rows({names[name]: values for name, values in self.columns.items()}, first)

    def __getitem__(self, key: str | int) -> object:
        if isinstance(key, str):
            return self.columns[key]
        return {name: values[key] for name, values in self.columns.items()}


def test_images_of_the_hub() -> None:
    """Columns of other names are found, and none are refused."""
    picture = Image.new("L", (4, 4))
    found = HubImages.of(Rows({"img": [picture] * 2, "fine_label": [1, 0], "more": [0, 0]}, ["a", "b"]), "data")
    assert (found.labels, found.names, found.key()) == ([1, 0], ["a", "b"], "fingerprint")
    assert found.image(0).mode == "RGB"
    assert HubImages.of(Rows({"image": [picture] * 2, "label": [1, 0]}, None), "data").names == ["0", "1"]
    with pytest.raises(SystemExit, match="org/data, test: found the columns pixels: expected 'image' and 'label'"):
        HubImages.of(Rows({"pixels": []}, None), "org/data, test")
    for label in ("cat", None, -1):
        with pytest.raises(SystemExit, match=f"org/data, test: found the label {label!r}: expected numbers from 0"):
            HubImages.of(Rows({"image": [picture] * 2, "label": [0, label]}, None), "org/data, test")


def test_where_images_come_from(tmp_path: Path) -> None:
    """What is given first, then a folder, then the table."""
    (tmp_path / "stanford_cars").mkdir()
    cars, digits = TASKS["Cars"], TASKS["EMNIST"]
    assert place_of(cars, tmp_path, {}) == Place(tmp_path / "stanford_cars")
    assert place_of(cars, tmp_path, {"Cars": HubData("a/b")}) == Place(hub=HubData("a/b"))
    assert place_of(cars, None, {}) == Place(hub=cars.hub) and place_of(digits, tmp_path, {}) is None


@pytest.mark.parametrize("setting", ["lora", "fft"])
def test_parts_share_nothing(setting: str, tmp_path: Path) -> None:
    """Validation is a fifth of the test data, or training data; what is reported is never looked at for alpha."""
    place = Place(write_images(tmp_path, {"train": 10, "test": 10}, ["0", "1"], 0))
    parts = parts_of(TASKS["RenderedSST2"], place, setting)
    files = {
        name: {str(part.images.files[i]) for i in part.chosen}  # type: ignore[attr-defined]
        for name, part in parts.items()
    }
    sizes = {"lora": (4, 16), "fft": (2, 20)}[setting]
    assert (len(files["validation"]), len(files["test"])) == sizes and not files["validation"] & files["test"]
    assert parts_of(TASKS["RenderedSST2"], place, setting)["test"].chosen == parts["test"].chosen


def test_own_validation_part(tmp_path: Path) -> None:
    """A data set's own part counts where the protocol says so; where it is missing the report says what was taken."""
    both = Place(write_images(tmp_path / "both", {"val": 3, "test": 5}, ["0", "1"], 0))
    parts = parts_of(TASKS["EuroSAT"], both, "lora")
    assert (len(parts["validation"].chosen), len(parts["test"].chosen)) == (6, 10)
    one = Place(write_images(tmp_path / "one", {"test": 5}, ["0", "1"], 0))
    note = parts_of(TASKS["EuroSAT"], one, "lora")["validation"].note
    assert note == "a fifth of the test part, since the data have no validation part"
    with pytest.raises(SystemExit, match="MNIST: found no part 'train' in"):
        parts_of(TASKS["MNIST"], one, "fft")


@pytest.mark.parametrize(
    ("task", "setting", "part", "classes", "message"),
    [
        (
            "EuroSAT",
            "lora",
            "val",
            ["0", "2"],
            "found the class '2' as number 1 in one part of .* where the test part has '1'",
        ),
        (
            "MNIST",
            "fft",
            "train",
            ["0", "1", "2", "3"],
            "found the class '3' as number 3 in one part of .* has no class",
        ),
    ],
)
def test_parts_of_other_classes(
    task: str, setting: str, part: str, classes: list[str], message: str, tmp_path: Path
) -> None:
    """Labels of a part that lacks a class would stand for the classes after it: alpha would be chosen by wrong answers."""
    write_images(tmp_path, {"test": 5}, ["0", "1", "2"], 0)
    write_images(tmp_path, {part: 5}, classes, 0)
    with pytest.raises(SystemExit, match=f"^{task}: {message}: expected the same classes in all parts"):
        parts_of(TASKS[task], Place(tmp_path), setting)
    shutil.rmtree(tmp_path / part)
    write_images(tmp_path, {part: 5}, ["0", "1"], 0)  # the last one has no examples: the others' numbers are right
    assert parts_of(TASKS[task], Place(tmp_path), setting)["validation"].images.names == ["0", "1"]


@pytest.mark.parametrize("sides", [(20, 16), (16, 31), (16, 16), (9, 40)])
def test_pixels_are_those_of_transformers(sides: tuple[int, int]) -> None:
    """The same numbers as CLIP's image processor makes."""
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (*sides, 3), dtype=np.uint8))
    processor = CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    expected = np.asarray(processor(image, return_tensors="np")["pixel_values"][0])
    mean, std = (np.array(values).reshape(3, 1, 1) for values in (MEAN, STD))
    np.testing.assert_allclose((square(image, 16) / 255 - mean) / std, expected, atol=1e-5)


def test_pixels_are_kept(tmp_path: Path) -> None:
    """Images are decoded once, in their order, and again when one of them is another file."""
    place = Place(write_images(tmp_path / "data", {"test": 5}, ["0", "1"], 0))
    part = parts_of(TASKS["RenderedSST2"], place, "lora")["test"]
    first = pixels(part, 16, tmp_path / "pixels/one", 2)
    for position, index in enumerate(part.chosen):
        assert np.array_equal(first.images[position], square(part.images.image(index), 16))
        assert first.labels[position] == part.images.labels[index]
    before = (tmp_path / "pixels/one.npy").stat().st_mtime_ns
    pixels(part, 16, tmp_path / "pixels/one", 2)
    assert (tmp_path / "pixels/one.npy").stat().st_mtime_ns == before
    Image.new("RGB", (40, 40)).save(part.images.files[part.chosen[0]])  # type: ignore[attr-defined]
    again = pixels(part, 16, tmp_path / "pixels/one", 2)
    assert again.images[0].max() == 0
    batches = list(again.batches(5, 2, torch.device("cpu")))
    assert [len(batch) for batch in batches] == [2, 2, 1] and batches[0].dtype == torch.float32


def _folder(path: Path) -> Path:
    path.mkdir(parents=True)
    return path


def test_data_sets_as_the_package_reads_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Real files of the Hub's kinds, with names of classes or numbers; parts that are not there are none, other ids are refused."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=["negative", "positive"])}
    )
    pictures = [Image.new("RGB", (8, 8), (10 * n, 0, 0)) for n in range(10)]
    made = datasets.Dataset.from_dict({"image": pictures, "label": [n % 2 for n in range(10)]}, features=features)
    made.to_parquet(tmp_path / "data/test-00000-of-00001.parquet")
    place = Place(hub=HubData(str(tmp_path / "data")))
    found = place.part("test")
    assert found is not None and list(found.names) == ["negative", "positive"] and list(found.labels) == [0, 1] * 5
    assert found.image(3).getpixel((0, 0)) == (30, 0, 0) and place.part("train") is None
    assert found.key() == place.part("test").key()  # type: ignore[union-attr]
    assert len(parts_of(TASKS["RenderedSST2"], place, "lora")["test"].chosen) == 8

    with tarfile.open(_folder(tmp_path / "tars/test") / "0.tar", "w") as tar:
        for number in range(3):
            picture = io.BytesIO()
            pictures[number].save(picture, "PNG")
            for ending, content in (("png", picture.getvalue()), ("cls", str(number).encode())):
                entry = tarfile.TarInfo(f"{number:03d}.{ending}")
                entry.size = len(content)
                tar.addfile(entry, io.BytesIO(content))
    tars = Place(hub=HubData(str(tmp_path / "tars"))).part("test")
    assert tars is not None and list(tars.labels) == [0, 1, 2] == [int(name) for name in tars.names]
    assert tars.image(2).getpixel((0, 0)) == (20, 0, 0)
    with pytest.raises(SystemExit, match=r"org/none: can't be read .*give another id with --dataset TASK=ID"):
        Place(hub=HubData("org/none")).part("test")

"""Readers, splits and the kept pictures of the image benchmark, on small pictures made on the spot."""

from __future__ import annotations

import gzip
import io
import json
import random
import subprocess
import tarfile
from dataclasses import replace
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import torch
from demo_data import Package, Splits, fetch
from demo_data.common import apart
from demo_data.fetch import unpack
from PIL import Image
from vision import data, drawn, readers
from vision.pictures import SIDE, ImageTask, Picture, normalised, squared
from vision.tasks import TASKS

FONTS = Path(matplotlib.get_data_path()) / "fonts/ttf"
RED = (255, 0, 0, 255)


def painted(file: Path, size: tuple[int, int] = (4, 4), colour: tuple[int, ...] = RED) -> None:
    """A PNG file of one colour."""
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGBA", size, colour).save(file)


def noise(seed: int) -> Image.Image:
    """A picture that is like no other."""
    pixels = np.random.default_rng(seed).integers(0, 255, (SIDE, SIDE, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def test_pictures_are_squares_on_white() -> None:
    """The whole picture in the middle, white around it and where it is transparent; the backbone gets channels of mean zero."""
    wide = squared(Image.new("RGBA", (100, 50), RED))
    assert wide.shape == (3, SIDE, SIDE) and wide.dtype == torch.uint8
    assert wide[:, SIDE // 2, 0].tolist() == [255, 0, 0] and wide[:, 0, 0].tolist() == [255, 255, 255]
    assert squared(Image.new("RGBA", (9, 9), (0, 0, 0, 0))).eq(255).all()
    scaled = normalised(torch.tensor([124, 116, 104], dtype=torch.uint8).reshape(1, 3, 1, 1))
    assert scaled.abs().max() < 0.02 and normalised(torch.zeros(2, 3, 5, 5)).shape == (2, 3, 5, 5)


def test_digits(tmp_path: Path) -> None:
    """Numbers from nought to one in rows of 784."""
    folder = tmp_path / readers.DIGITS.folder / "package/src/digits"
    folder.mkdir(parents=True)
    values = [0.0] * 783 + [1.0] + [0.2] * 784
    (folder / "7.json").write_text(json.dumps({"data": values}))
    first, second = readers.digits(tmp_path)
    assert first.key == second.key == "7" and first.image.size == (28, 28)
    assert first.image.getpixel((27, 27)) == 255 and second.image.getpixel((0, 0)) == 51


def test_clothes(tmp_path: Path) -> None:
    """Images and labels of the training half; a file of another kind is refused."""
    folder = tmp_path / readers.FASHION.folder / "usr/share/datasets/fashion-mnist"
    folder.mkdir(parents=True)
    images = np.arange(2 * 28 * 28, dtype=np.uint8).reshape(2, 28, 28)
    head = b"\0\0\x08\x03" + b"".join(int(size).to_bytes(4, "big") for size in images.shape)
    (folder / "train-images-idx3-ubyte.gz").write_bytes(gzip.compress(head + images.tobytes()))
    (folder / "train-labels-idx1-ubyte.gz").write_bytes(gzip.compress(b"\0\0\x08\x01\0\0\0\x02\x05\x09"))
    found = list(readers.clothes(tmp_path))
    assert [picture.key for picture in found] == ["5", "9"]
    assert np.array_equal(np.asarray(found[1].image), images[1])
    (folder / "other.gz").write_bytes(gzip.compress(b"\0\0\x0d\x01\0\0\0\0"))
    with pytest.raises(ValueError, match=r"found 00000d01 at the start of other.gz: expected unsigned bytes, 000008"):
        readers.idx(folder / "other.gz")


def test_clipart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the topmost folder, a few of each second one, without icons and posters; variants of one drawing stay together."""
    root = tmp_path / readers.CLIPART.folder / "usr/share/openclipart/png"
    monkeypatch.setattr(readers, "PER_FOLDER", 3)
    monkeypatch.setattr(readers, "LARGEST", 1000)
    for name in ("animals/cat_01", "animals/bugs/ant_jane_02", "animals/bugs/ant_jane_03", "computer/icons/x/save"):
        painted(root / f"{name}.png")
    painted(root / "animals/bugs/ant_poster.png", (40, 40))
    for number in range(5):
        painted(root / f"food/fruit/{'abcde'[number]}.png")
    found = list(readers.clipart(tmp_path))
    assert [picture.key for picture in found] == ["animals"] * 3 + ["food"] * 3
    assert len({picture.group for picture in found[:3]}) == 2 and len({picture.group for picture in found[3:]}) == 3


def test_emoji(tmp_path: Path) -> None:
    """Those that Twitter drew; man and woman of one emoji are one group."""
    folder = tmp_path / readers.EMOJI.folder / "package"
    names = ("MAN RUNNING", "WOMAN RUNNING", "RED APPLE")
    entries = [
        {"name": name, "category": "Food & Drink" if "APPLE" in name else "People & Body", "image": f"{number}.png"}
        for number, name in enumerate((*names, "NEVER DRAWN"))
    ]
    for number in range(3):
        painted(folder / f"img/twitter/64/{number}.png")
    (folder / "emoji.json").write_text(json.dumps(entries))
    man, woman, apple = readers.emoji(tmp_path)
    assert man.group == woman.group == "running" and (apple.key, apple.group) == ("Food & Drink", "red apple")


def test_icons(tmp_path: Path) -> None:
    """By context, the larger of two sizes, links to nowhere left out; one name is one group in all themes."""
    gnome = tmp_path / readers.GNOME.folder / "usr/share/icons/gnome"
    painted(gnome / "48x48/places/folder-home.png", (48, 48))
    painted(gnome / "256x256/places/folder-home.png", (256, 256))
    (gnome / "48x48/places/gone.png").symlink_to("nowhere.png")
    painted(tmp_path / readers.FAENZA.folder / "usr/share/icons/Faenza/places/64/folder.png", (64, 64))
    painted(tmp_path / readers.FAENZA.folder / "usr/share/icons/Faenza/apps/64/shell.png", (64, 64))
    found = list(readers.icons(tmp_path, ["places"]))
    assert [picture.image.size for picture in found] == [(64, 64), (256, 256)]
    assert {picture.group for picture in found} == {"folder"} and {picture.key for picture in found} == {"places"}


def test_letters_are_those_of_the_font() -> None:
    """DejaVu has Armenian and no Bengali."""
    letters = drawn.letters_of("Armenian", [FONTS / "DejaVuSans.ttf", FONTS / "DejaVuSans-Bold.ttf"])
    assert "\u0531" in letters and len(letters) > 60
    with pytest.raises(ValueError, match=r"found no letters of Bengali in \['DejaVuSans.ttf'\]: expected some"):
        drawn.letters_of("Bengali", [FONTS / "DejaVuSans.ttf"])


def test_scripts_and_typefaces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Dark on light and the same each time; the same words in every typeface, in one group each."""
    monkeypatch.setattr(drawn, "PER_CLASS", 3)
    noto = tmp_path / drawn.NOTO.folder / drawn.FONTS / "truetype/noto"
    dejavu = tmp_path / drawn.DEJAVU.folder / drawn.FONTS
    for file in (
        *(noto / f"Noto{k}Georgian-{w}.ttf" for k in ("Sans", "Serif") for w in ("Regular", "Bold")),
        dejavu / "a.ttf",
    ):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.symlink_to(FONTS / "DejaVuSans.ttf")
    monkeypatch.setattr(drawn, "TYPEFACES", dict.fromkeys(("one", "two"), (drawn.DEJAVU, "a.ttf")))
    for found, again in (
        (list(drawn.scripts(tmp_path, ["Georgian"])), list(drawn.scripts(tmp_path, ["Georgian"]))),
        (list(drawn.typefaces(tmp_path)), list(drawn.typefaces(tmp_path))),
    ):
        assert [squared(p.image).tolist() for p in found] == [squared(p.image).tolist() for p in again]
        for picture in found:
            darkest, lightest = picture.image.getextrema()
            assert darkest < 130 and lightest >= 200
    assert [picture.group for picture in found[:3]] == [picture.group for picture in found[3:]]
    assert [picture.key for picture in found] == ["one"] * 3 + ["two"] * 3


@pytest.mark.parametrize("number", [1, 4, 6])
def test_things_can_be_counted(number: int) -> None:
    """So many separate patches of colour."""
    image = drawn.scattered(Image.new("RGBA", (64, 64), RED), number, random.Random(number))
    left = {(int(x), int(y)) for y, x in np.argwhere(np.asarray(image)[..., 1] < 128)}
    patches = 0
    while left:
        patches += 1
        edge = [left.pop()]
        while edge:
            x, y = edge.pop()
            near = {(x + 1, y), (x - 1, y), (x, y + 1), (x, y - 1)} & left
            left -= near
            edge += near
    assert patches == number


def test_no_room() -> None:
    """More things than there is room for are refused."""
    with pytest.raises(ValueError, match="found no room for 60 things"):
        drawn.scattered(Image.new("RGBA", (8, 8), RED), 60, random.Random(0))


def test_counted_things_are_one_group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each thing with every number, and only things of the groups that are counted."""
    things = [Picture(noise(n), key) for n, key in enumerate(("Food & Drink", "Symbols", "Animals & Nature"))]
    monkeypatch.setattr(drawn, "emoji", lambda folder: [Picture(p.image.convert("RGBA"), p.key) for p in things])
    found = list(drawn.counts(tmp_path, ("1", "2")))
    assert [(picture.key, picture.group) for picture in found] == [("1", "0"), ("2", "0"), ("1", "1"), ("2", "1")]


TASK = ImageTask("plain", "Plain", ("a", "b"), (), lambda folder: made(), validation=4, test=6, train_per_class=5)


def made() -> list[Picture]:
    """Sixty pictures of two classes, in groups of two; one of them twice, one of both classes, one of no class."""
    found = [Picture(noise(n), "ab"[n % 2], group=str(n // 4)) for n in range(60)]
    return [*found, found[0], Picture(noise(100), "a"), Picture(noise(100), "b"), Picture(noise(101), "c")]


def test_split_shares_nothing() -> None:
    """No picture and no group in two parts, classes as equal as can be, contradictions and unknown classes left out, the same
    each time."""
    parts, images = data.split(TASK, made(), 0)
    keys = [key for part in (parts.train, parts.validation, parts.test) for key, _ in part]
    assert len(keys) == len(set(keys)) and set(keys) <= set(images)
    assert len(parts.validation) == 4 and len(parts.test) == 6 and len(parts.train) == 10
    assert [sum(label for _, label in part) for part in (parts.validation, parts.test, parts.train)] == [2, 3, 5]
    groups = {key: int(seed) // 4 for seed in range(60) for key in [data.tensors_key({"": squared(noise(seed))})]}
    held = [{groups[key] for key, _ in part} for part in (parts.train, parts.validation, parts.test)]
    assert not (held[0] & held[1] or held[0] & held[2] or held[1] & held[2])
    assert data.split(TASK, made(), 0)[0] == parts != data.split(TASK, made(), 1)[0]


def test_parts_of_tasks_are_apart() -> None:
    """A picture of one task's test part is in no other task's training or validation part."""
    splits = {
        "one": Splits([("x", 0), ("y", 1)], [("z", 0)], [("w", 1)]),
        "two": Splits([("w", 0)], [("x", 1)], [("z", 0)]),
    }
    found = apart(splits, same=str)
    assert found["one"] == Splits([("y", 1)], [], [("w", 1)]) and found["two"] == Splits([], [("x", 1)], [("z", 0)])


def test_pictures_are_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Read once, and again when the task changes; what was saved comes back; a class without pictures is refused."""
    assert data.prepare({"plain": TASK}, tmp_path) and not data.prepare({"plain": TASK}, tmp_path)
    assert "plain: 4 validation, 6 test, 10 train" in capsys.readouterr().err
    parts, images = data.split(TASK, made(), 0)
    kept = data.load(tmp_path, "plain")
    assert (kept.title, kept.classes) == ("Plain", ("a", "b"))
    for part in ("train", "validation", "test"):
        rows = getattr(parts, part)
        assert kept.parts[part].labels.tolist() == [label for _, label in rows]
        assert torch.equal(kept.parts[part].images, torch.stack([images[key] for key, _ in rows]))
    assert kept.parts["test"].first(2).key != kept.parts["test"].key
    assert data.prepare({"plain": replace(TASK, test=5)}, tmp_path)
    with pytest.raises(SystemExit, match=r"Task 'plain' has no training pictures of 1 classes"):
        data.prepare({"plain": replace(TASK, classes=("a", "b", "d"))}, tmp_path)
    with pytest.raises(SystemExit, match=r"No pictures of task 'other' in .*: run the stage 'data' first"):
        data.load(tmp_path, "other")


def test_tasks_are_what_the_page_says() -> None:
    """Eight, in an order that never changes, from six sources at least."""
    assert list(TASKS) == ["digits", "emoji", "script", "clothes", "clipart", "typeface", "icons", "count"]
    assert len({package.name for task in TASKS.values() for package in task.packages}) >= 6
    assert all(len(set(task.classes)) == len(task.classes) > 5 for task in TASKS.values())


@pytest.mark.parametrize(("skip", "files"), [((), ["a.json", "b.png"]), ((".png",), ["a.json"])])
def test_packages_with_their_pictures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, skip: tuple[str, ...], files: list[str]
) -> None:
    """What the client packs is unpacked, less what is not wanted."""

    def pack(command: list[str], cwd: Path, **options: object) -> subprocess.CompletedProcess[str]:
        assert command == ["npm", "pack", "--silent", "drawings@1.0.0"]
        with tarfile.open(cwd / "drawings-1.0.0.tgz", "w:gz") as archive:
            for name in ("a.json", "b.png"):
                archive.addfile(tarfile.TarInfo(f"package/{name}"), io.BytesIO())
        return subprocess.CompletedProcess(command, 0, stdout="drawings-1.0.0.tgz\n")

    monkeypatch.setattr(subprocess, "run", pack)
    folder = fetch(Package("npm", "drawings", "1.0.0"), tmp_path, skip)
    assert sorted(path.name for path in folder.rglob("*.*")) == files


def test_archives_stay_in_their_folder(tmp_path: Path) -> None:
    """A file whose name leads out of the folder is refused, and not written."""
    with tarfile.open(tmp_path / "bad.tgz", "w:gz") as archive:
        archive.addfile(tarfile.TarInfo("../out.txt"), io.BytesIO())
    (tmp_path / "in").mkdir()
    with (
        tarfile.open(tmp_path / "bad.tgz") as archive,
        pytest.raises(ValueError, match=r"found '\.\./out\.txt' in an archive"),
    ):
        unpack(archive, archive.getmembers()[0], tmp_path / "in")
    assert not (tmp_path / "out.txt").exists()

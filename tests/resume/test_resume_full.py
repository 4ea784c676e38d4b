"""A merge of full models that is interrupted goes on where it was, and gives the bytes of one that was not."""

from __future__ import annotations

import os
import signal
from collections import Counter
from pathlib import Path

import pytest

from dc_merge_peft import DCMergeAdapter, MergeWarning, OptionError, OutputError
from dc_merge_peft.outputs import fused_stream
from dc_merge_peft.outputs.fused_stream import Piece
from dc_merge_peft.sources.finetuned import FullModelSource
from dc_merge_peft.work.place import WorkPlace
from tests.support import models
from tests.support.full import tune, write_models
from tests.support.fused import weight_files
from tests.support.many import finished, program, reads, stop_after, wait_until
from tests.support.refused import listing, refused
from tests.support.versions import needs_v5

pytestmark = needs_v5
SIZE = "5KB"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Path]]:
    """A base model and two fine-tuned ones, never changed."""
    return write_models(tmp_path_factory.mktemp("full"), models.llama(), 2)


def work_of(out: Path) -> Path:
    """Where a run to this output keeps what is finished."""
    return WorkPlace.beside(out, resume=True).folder


@pytest.mark.filterwarnings("ignore:7 averaged tensors can't be in a LoRA", "ignore:method 'ties' works on the entries")
@pytest.mark.parametrize("lora_rank", [None, 4])
@pytest.mark.parametrize("method", ["dc", "ta", "ties"])
def test_resumed_is_undisturbed(
    made: tuple[Path, list[Path]], tmp_path: Path, method: str, lora_rank: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Interrupted twice while it merges, then done: the same files, no finished matrix is read again, nothing is left."""
    base, places = made
    merger, out = DCMergeAdapter(method=method), tmp_path / "out"
    plain = merger.merge_full(base, places, tmp_path / "plain", lora_rank=lora_rank)
    every = list(plain.merged.modules)
    for _ in range(2):
        go_on = stop_after(monkeypatch, 3)
        with pytest.raises(KeyboardInterrupt):
            merger.merge_full(base, places, out, lora_rank=lora_rank, resume=True)
        go_on()
    assert len(list(work_of(out).glob("*.module"))) == 6 and not out.exists()
    read = reads(monkeypatch, FullModelSource, "factors")
    done = merger.merge_full(base, places, out, lora_rank=lora_rank, resume=True)
    surveyed = read[every[0]]  # thresholds of the whole model are found anew
    assert read == Counter({name: surveyed + (0 if name in every[:6] else 2) for name in every})
    assert (surveyed > 0) == (method == "ties")
    assert listing(out) == listing(tmp_path / "plain") and done.merged.alpha == plain.merged.alpha
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["out", "plain"]


def test_resumed_writing(made: tuple[Path, list[Path]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Interrupted while it is written, averaged tensors among the others: complete files are not touched again."""
    base, places = made
    merger, out, carry_out, touched = DCMergeAdapter(), tmp_path / "out", Piece.carry_out, set[str]()
    stop = True
    merger.merge_full(base, places, tmp_path / "plain", max_shard_size=SIZE)
    names = [file.name for file in weight_files(tmp_path / "plain")]
    assert len(names) > 3

    def stopping(self: Piece, scratch: fused_stream.Scratch) -> None:
        if stop and self.file.name == names[2]:
            raise KeyboardInterrupt
        touched.add(self.file.name)
        carry_out(self, scratch)

    monkeypatch.setattr(Piece, "carry_out", stopping)
    with pytest.raises(KeyboardInterrupt):
        merger.merge_full(base, places, out, max_shard_size=SIZE, resume=True)
    assert sorted(mark.name for mark in (work_of(out) / "written").iterdir()) == names[:2]
    stop = False
    touched.clear()
    read = reads(monkeypatch, FullModelSource, "factors")
    merger.merge_full(base, places, out, max_shard_size=SIZE, resume=True)
    assert touched == set(names[2:]) and not read
    assert listing(out) == listing(tmp_path / "plain") and not work_of(out).exists()


def test_only_the_same_merge_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Other parameters that are averaged, another rank, and a model that was saved again are called by name; the folder stays."""
    base, places = write_models(tmp_path, models.llama(), 2)
    merger, out, folder = DCMergeAdapter(method="ta"), tmp_path / "out", tmp_path / "work"
    go_on = stop_after(monkeypatch, 2)
    with pytest.raises(KeyboardInterrupt):
        merger.merge_full(base, places, out, average=["k_proj"], resume=folder)
    go_on()
    with refused(OutputError, 'average ["k_proj"] there, ["v_proj"] here', "expected the same merge"):
        merger.merge_full(base, places, out, average=["v_proj"], resume=folder)
    with refused(OutputError, "svd_rank null there, 2 here"):
        merger.merge_full(base, places, out, average=["k_proj"], lora_rank=2, resume=folder)
    (file,) = weight_files(places[1])
    tune(models.llama(), 7).save_pretrained(places[1])
    with refused(OutputError, f"'{file.name}' of '{places[1]}' has changed"):
        merger.merge_full(base, places, out, average=["k_proj"], resume=folder)
    assert len(list(folder.glob("*.module"))) == 2 and not out.exists()


def test_where_it_is_kept(made: tuple[Path, list[Path]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside a repository of the Hub there is no room; what is left of another run is noted by one that does not go on with it."""
    base, places = made
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    with refused(OptionError, "resume has no output", "expected a directory"):
        DCMergeAdapter().merge_full(base, places, push_to="me/merged", resume=True)
    go_on = stop_after(monkeypatch, 1)
    with pytest.raises(KeyboardInterrupt):
        DCMergeAdapter().merge_full(base, places, tmp_path / "out", resume=True)
    go_on()
    with pytest.warns(MergeWarning, match="unfinished merge to this output: --resume"):
        DCMergeAdapter().merge_full(base, places, tmp_path / "out")
    assert work_of(tmp_path / "out").is_dir()


def test_several_devices(made: tuple[Path, list[Path]], tmp_path: Path) -> None:
    """Matrices side by side on several devices: the same bytes."""
    base, places = made
    for out, device in (("one", None), ("several", "cpu,cpu,cpu")):
        DCMergeAdapter().merge_full(base, places, tmp_path / out, device=device)
    assert listing(tmp_path / "several") == listing(tmp_path / "one")


def test_the_program_is_killed(tmp_path: Path) -> None:
    """kill -9 in the middle: no output, and the next run does the rest."""
    write_models(tmp_path, models.llama(width=192, layers=6), 2)
    work, arguments = tmp_path / ".out.dc-merge-work", ["merge-full", "base", "tuned-0", "tuned-1", "--resume", "-o"]
    process = program([*arguments, "out"], tmp_path)
    wait_until(lambda: work.is_dir() and len(list(work.glob("*.module"))) >= 3, process)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate(timeout=60)
    assert not (tmp_path / "out").exists() and len(list(work.glob("*.module"))) >= 3
    finished(program([*arguments, "out"], tmp_path))
    finished(program([*arguments, "plain"], tmp_path))
    assert listing(tmp_path / "out") == listing(tmp_path / "plain") and not list(tmp_path.glob(".*"))

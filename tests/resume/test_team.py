"""How processes tell each other that they are alive, done or failed; two of them in one, without a launcher."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch

from dc_merge_peft import DCMergeAdapter, MergeError, MergeWarning, OptionError
from dc_merge_peft.work import meeting
from dc_merge_peft.work import team as teams
from dc_merge_peft.work.meeting import launched
from dc_merge_peft.work.place import WorkPlace
from dc_merge_peft.work.team import ShareDone, Team
from tests.support.many import finished, many_modules, started
from tests.support.program import run
from tests.support.refused import listing, refused

RUN = "0123456789abcdef"


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody waits for long here."""
    monkeypatch.setattr(teams, "PATIENCE", 0.5)
    monkeypatch.setattr(teams, "BEAT", 0.05)


def pair() -> tuple[Team, Team]:
    """Two processes of one run."""
    return Team(0, 2, "cpu", RUN), Team(1, 2, "cpu", RUN)


def side_by_side(*parts: Callable[[], Any]) -> list[Any]:
    """What each part gives or raises, each on a thread of its own."""
    results: list[Any] = [None] * len(parts)

    def carry_out(index: int) -> None:
        try:
            results[index] = parts[index]()
        except Exception as error:
            results[index] = error

    threads = [threading.Thread(target=carry_out, args=(index,)) for index in range(len(parts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    return results


def merged_by(sources: list[Path], out: Path, team: Team, **options: Any) -> None:
    """What the program does in one process."""
    place = WorkPlace.beside(out, resume=False, team=team)
    with place.opened(), DCMergeAdapter().merging(sources, resume=place, **options) as merged:
        merged.save_pretrained(out)


def test_shares(tmp_path: Path) -> None:
    """Both merge, the main one writes what one alone would have written, and the folder is gone."""
    sources, (main, other) = many_modules(tmp_path, 6), pair()
    with DCMergeAdapter().merging(sources) as merged:
        merged.save_pretrained(tmp_path / "plain")
    done = side_by_side(*(lambda team=team: merged_by(sources, tmp_path / "out", team) for team in (main, other)))
    assert done[0] is None and isinstance(done[1], ShareDone)
    assert listing(tmp_path / "out") == listing(tmp_path / "plain")
    assert not list(tmp_path.glob(".*"))


def test_other_inputs_are_refused(tmp_path: Path) -> None:
    """A machine with another copy of an adapter: both processes end, with the reason."""
    mine, yours, (main, other) = many_modules(tmp_path / "a", 3), many_modules(tmp_path / "b", 3), pair()
    found = side_by_side(
        lambda: merged_by(mine, tmp_path / "out", main), lambda: merged_by(yours, tmp_path / "out", other)
    )
    assert "process 1 on" in str(found[1]) and "other inputs or programs than process 0" in str(found[1])
    assert "process 1 has failed: process 1 on" in str(found[0])
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".*"))


def test_a_main_process_that_fails(tmp_path: Path) -> None:
    """Its reason reaches those that wait for it to start."""
    sources, (main, other), out = many_modules(tmp_path, 3), pair(), tmp_path / "out"

    def fail() -> None:
        place = WorkPlace.beside(out, resume=False, team=main)
        with place.opened():
            while not list(place.folder.glob("team-*/1.alive")):
                time.sleep(0.01)
            raise MergeError("no such adapter")

    found = side_by_side(fail, lambda: merged_by(sources, out, other))
    assert isinstance(found[1], MergeError)
    assert any(
        words in str(found[1]) for words in ("process 0 has failed: no such adapter", "process 0 has ended early")
    )
    assert not list(tmp_path.glob(".*"))


def test_a_folder_that_is_not_shared(tmp_path: Path) -> None:
    """A process that does not see what the main one has made says so; the main one misses it."""
    main, other = pair()
    (tmp_path / "a").mkdir()
    with refused(MergeError, "process 1 on", "does not see", "a file system that all machines share"):
        other.enter(tmp_path / "b")
    main.enter(tmp_path / "a")
    with refused(MergeError, "process 1 of 2 has ended, or shows no sign of life"):
        main.wait()
    main.leave()


def test_a_process_that_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the same machine it is missed at once, by its number."""
    monkeypatch.setattr(teams, "PATIENCE", 600)
    main, _ = pair()
    main.enter(tmp_path)
    dead = subprocess.Popen([sys.executable, "-c", ""])
    sign = json.loads(teams._whereabouts(3))
    (tmp_path / f"team-{RUN}" / "1.alive").write_text(json.dumps({**sign, "process": dead.pid}))
    dead.wait()
    with refused(MergeError, "process 1 of 2 has ended"):
        main.check([1])
    (tmp_path / f"team-{RUN}" / "1.alive").write_text(json.dumps({**sign, "system": "another", "process": dead.pid}))
    main.check([1])
    main.check([1])  # another machine's numbers mean nothing here
    (tmp_path / f"team-{RUN}" / "1.failed").write_text("no room")
    with refused(MergeError, "process 1 has failed: no room"):
        main.check()
    (tmp_path / f"team-{RUN}" / "1.done").write_text("")
    main.check()
    main.wait()
    main.leave()


def test_silence_is_noticed(tmp_path: Path) -> None:
    """A process elsewhere whose sign does not change any more."""
    main, other = pair()
    main.enter(tmp_path)
    other.enter(tmp_path)
    side_by_side(main.check, lambda: threading.Event().wait(0.8))
    main.check()  # it lives, longer than anyone's patience
    other._end()
    sign = tmp_path / f"team-{RUN}" / "1.alive"
    sign.write_text(json.dumps({**json.loads(sign.read_text()), "system": "elsewhere"}))
    with refused(MergeError, "shows no sign of life"):
        main.wait()
    main.leave()


def test_a_main_process_that_is_killed(tmp_path: Path) -> None:
    """Nobody can resume what it has left: the next run to the same output removes it, though not that of one that lives."""
    sources, out = many_modules(tmp_path / "in", 2), tmp_path / "out"
    lines = [
        "import os, signal",
        "from dc_merge_peft.work.place import WorkPlace",
        "from dc_merge_peft.work.team import Team",
        f"with WorkPlace.beside({str(out)!r}, resume=False, team=Team(0, 2, 'cpu', '{RUN}')).opened():",
        "    os.kill(os.getpid(), signal.SIGKILL)",
    ]
    finished(started([sys.executable, "-c", "\n".join(lines)], tmp_path), code=-signal.SIGKILL)
    assert len(list(tmp_path.glob(".*"))) == 1
    with WorkPlace.beside(out, resume=False, team=Team(0, 2, "cpu", RUN[::-1])).opened() as place:
        with pytest.warns(MergeWarning, match="had left beside"):
            DCMergeAdapter().merge(sources).save_pretrained(out)
        assert list(tmp_path.glob(".*")) == [place.folder]


def test_a_folder_that_is_gone(tmp_path: Path) -> None:
    """The main process has cleaned up after itself, and a late one does not wait for ever."""
    main, other = pair()
    main.enter(tmp_path)
    other.enter(tmp_path)
    main.leave()
    other._end()
    for file in (tmp_path / f"team-{RUN}").iterdir():
        file.unlink()
    (tmp_path / f"team-{RUN}").rmdir()
    with refused(MergeError, "is gone", "process 0 has ended early"):
        other.started()
    other.leave("too late")


def test_what_launchers_say(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The number of processes by torch's variable or MPI's; a device for one alone, and no output, are refused before they meet."""
    assert launched() == 1
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "3")
    assert launched() == 3
    with refused(OptionError, "device 'cuda:1' is given to 3 processes", "expected cpu, or cuda for a GPU each"):
        Team.join("cuda:1")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    many_modules(tmp_path, 1)
    result = run("merge", "lora-0", "lora-1", "--push-to", "me/merged")
    assert result.exit_code == 2 and "3 processes merge together without an output" in result.stderr


@pytest.mark.parametrize("command", ["inspect", "report", "tune"])
def test_commands_of_one_process(monkeypatch: pytest.MonkeyPatch, command: str) -> None:
    """Several would all do the same."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    result = run(command, "one", "two")
    assert result.exit_code == 2 and f"{command} is given to 2 processes: expected one" in result.stderr


def test_more_processes_than_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """Counted before they meet, on each machine by itself; on the CPU there may be any number."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with refused(OptionError, "found 2 processes on this machine, which has 1 GPU", "--device cpu"):
        Team.join(None)


def test_processes_that_do_not_meet(monkeypatch: pytest.MonkeyPatch) -> None:
    """Variables of a launcher without the launcher."""
    for name, value in {
        "WORLD_SIZE": "2",
        "RANK": "1",
        "LOCAL_RANK": "0",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "1",
    }.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(meeting, "MEETING", timedelta(seconds=1))
    with refused(MergeError, "the 2 processes of this launch can't reach each other", "accelerate launch"):
        Team.join("cpu")
    assert os.environ["WORLD_SIZE"] == "2"


@pytest.mark.parametrize(
    ("variables", "found"),
    [
        ({"RANK": "abc"}, "'abc'"),
        ({"RANK": "5"}, "rank 5 of 2 processes"),
        ({"RANK": "1", "OMPI_COMM_WORLD_SIZE": "4"}, "rank 1 of 2 processes, beside a launch of 4"),
    ],
)
def test_variables_that_do_not_fit_together(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], found: str
) -> None:
    """What a script has set by hand, or a launcher within another one: said at once, instead of waiting for processes that are not."""
    for name, value in {"WORLD_SIZE": "2", "LOCAL_RANK": "0", **variables}.items():
        monkeypatch.setenv(name, value)
    with refused(MergeError, found, "unset these variables"):
        Team.join("cpu")

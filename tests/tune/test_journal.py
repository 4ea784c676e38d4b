"""Journals: a search that was interrupted ends as one that was not, and no journal of anything else is touched."""

from __future__ import annotations

import fcntl
import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from dc_merge_peft import DCMergeAdapter, MergedAdapter, MergeWarning, OptionError, OutputError, TuneResult, tune
from dc_merge_peft.tuning import journal
from tests.support.evaluating import NAMES, count_merges
from tests.support.refused import listing, refused

SPACE: dict[str, Any] = {"smoothing": ["none", "linear"], "weights": [[1, 1], [2, 1]]}
ALPHAS = [0.5, 1, "auto"]
FILE = Path("trials.jsonl")


def score(merged: MergedAdapter) -> float:
    """Some number that differs from trial to trial."""
    return -abs(merged.alpha - 0.9) - 0.01 * merged.weights[0]


def search(evaluate: Callable[[MergedAdapter], float] = score, **options: Any) -> TuneResult:
    """Twelve trials of four merges."""
    return tune(NAMES, evaluate, **{"space": SPACE, "alphas": ALPHAS, "journal": FILE, **options})


def interrupted(after: int, error: type[BaseException] = KeyboardInterrupt) -> Callable[[MergedAdapter], float]:
    """An evaluation that ends so after some trials."""
    left = iter(range(after))

    def evaluate(merged: MergedAdapter) -> float:
        if next(left, None) is None:
            raise error
        return score(merged)

    return evaluate


def plain(result: TuneResult) -> list[dict[str, Any]]:
    """The trials without the time they took."""
    return [{**trial.to_dict(), "seconds": 0} for trial in result.trials]


def test_lines(workspace: Path) -> None:
    """A first line about the search, then a line for each trial, in order."""
    result = search()
    head, *lines = [json.loads(line) for line in FILE.read_text().splitlines()]
    assert lines == [trial.to_dict() for trial in result.trials] and len(lines) == 12
    assert lines[11]["settings"] == {"smoothing": "linear", "weights": [2.0, 1.0], "alpha": "auto"}
    assert (head["journal"], [each["location"] for each in head["adapters"]]) == ("dc-merge tune", list(NAMES))


@pytest.mark.parametrize("error", [KeyboardInterrupt, ZeroDivisionError])
@pytest.mark.parametrize("after", [1, 5, 11])
def test_resumed(workspace: Path, monkeypatch: pytest.MonkeyPatch, after: int, error: type[BaseException]) -> None:
    """After Ctrl-C or an error the rest is tried, and nothing that was finished: the same trials as without."""
    unbroken = search(journal=None)
    with pytest.raises(error):
        search(interrupted(after, error))
    assert FILE.read_text().count("\n") == 1 + after and FILE.read_text().endswith("\n")
    merges, asked = count_merges(monkeypatch), []
    resumed = search(lambda merged: asked.append(merged.alpha) or score(merged), resume=True)
    assert plain(resumed) == plain(unbroken) and resumed.best.settings == unbroken.best.settings
    assert len(asked) == 12 - after and len(merges) == 4 - after // 3
    content = FILE.read_bytes()
    assert plain(search(interrupted(0), resume=True)) == plain(unbroken)  # all are there
    assert FILE.read_bytes() == content


def test_killed_in_the_middle_of_a_line(workspace: Path) -> None:
    """The beginning of a line is no trial; that of the first line is no search."""
    unbroken = search()
    content = FILE.read_bytes()
    for cut in (0, 5, 40, content.index(b"\n"), content.index(b"\n") + 1, len(content) - 20, len(content) - 1):
        FILE.write_bytes(content[:cut])
        assert plain(search(resume=True)) == plain(unbroken), cut


def test_nothing_finished_leaves_nothing(workspace: Path) -> None:
    """Before the first trial is finished there is no journal to be in the way."""
    before = listing(workspace)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            search(interrupted(0), journal="new/trials.jsonl")
    assert {name for name in listing(workspace) if name not in before} <= {"new/"}
    assert len(search(resume=True).trials) == 12  # resuming nothing is starting


def test_a_journal_in_the_way(workspace: Path) -> None:
    """Neither overwritten nor resumed unasked."""
    search()
    content = FILE.read_bytes()
    with refused(
        OutputError, "the journal 'trials.jsonl' is there already, with 12 finished trials", "--resume", "--overwrite"
    ):
        search()
    assert FILE.read_bytes() == content
    assert len(search(alphas=[1], overwrite=True).trials) == 4
    assert FILE.read_text().count("\n") == 5


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"alphas": [0.5, 1, 2]}, ['alpha [0.5, 1.0, "auto"] there, [0.5, 1.0, 2.0] here']),
        ({"minimize": True}, ["minimize false there, true here"]),
        ({"weights": [1, 2]}, ["weights [1.0, 1.0] there, [1.0, 2.0] here"]),
        ({"svd_rank": 3}, ["svd_rank null there, 3 here"]),
        ({"dtype": "float16"}, ['dtype "float32" there, "float16" here']),
        ({"merger": DCMergeAdapter(rho=3.0)}, ["(rho 5.0 there, 3.0 here)"]),
        ({"merger": DCMergeAdapter(method="ta")}, ["method \"dc\" there, \"ta\" here", "smoothing"]),
        ({"space": {"density": {"min": 0.1, "max": 0.5, "step": 0.1}}}, ["density null there, [0.1, 0.2, 0.3, 0.4, 0.5] here"]),
    ],
)  # fmt: skip
def test_another_search(workspace: Path, changes: dict[str, Any], words: list[str]) -> None:
    """Other settings are named."""
    with pytest.raises(KeyboardInterrupt):
        search(interrupted(1))
    content = FILE.read_bytes()
    with refused(OutputError, "the journal 'trials.jsonl' is of another search (", "expected the same inputs", *words):
        search(**{"resume": True, **changes})
    assert FILE.read_bytes() == content


def test_another_order_and_changed_inputs(workspace: Path) -> None:
    """Adapters count by content: a copy of a file is the same, another number is not. Touching a file changes nothing."""
    with pytest.raises(KeyboardInterrupt):
        search(interrupted(1))
    os.utime("math-lora/adapter_model.safetensors", (1, 1))
    assert len(search(resume=True).trials) == 12
    file = Path("math-lora/adapter_model.safetensors")
    tensors = load_file(file)
    save_file({key: value * 2 for key, value in tensors.items()}, file)
    with refused(
        OutputError,
        "is of another search ('adapter_model.safetensors' of 'math-lora' has changed): expected the same inputs",
    ):
        search(resume=True)


@pytest.mark.parametrize(
    "content", ["a diary\n", "{}\n", '{"journal": "another"}\n', "[1]\n", "[" * 200_000 + "\n", "no line", '{"a": 1']
)
@pytest.mark.parametrize("how", [{"resume": True}, {"overwrite": True}, {}])
def test_no_journal(workspace: Path, content: str, how: dict[str, bool]) -> None:
    """A file of somebody's own is never changed, nor deleted."""
    FILE.write_text(content)
    with refused(
        OutputError, "'trials.jsonl' is no journal of a search: expected a file that dc-merge tune has written"
    ):
        search(**how)
    assert FILE.read_text() == content


EDITED: list[dict[str, Any]] = [
    {"score": "x"}, {"score": math.nan}, {"score": math.inf}, {"score": 1}, {"alpha": 0.7}, {"alpha": "x"}, {"alpha": None},
    {"alpha": math.nan}, {"seconds": "x"}, {"seconds": 10**400}, {"was": 1},
]  # fmt: skip


def test_edited_trials(workspace: Path) -> None:
    """A trial that is not the one of this search is refused, as is one of numbers that no trial has."""
    search()
    lines = FILE.read_text().splitlines(keepends=True)
    FILE.write_text("".join([lines[0], lines[2], *lines[2:]]))
    with refused(OutputError, "trial 1 in the journal 'trials.jsonl' has the settings", "in this search", "start anew"):
        search(resume=True)
    for change in EDITED:
        FILE.write_text("".join([lines[0], json.dumps({**json.loads(lines[1]), **change}) + "\n", *lines[2:]]))
        with refused(OutputError, "trial 1 in the journal 'trials.jsonl' has alpha", "score", "seconds", "start anew"):
            search(resume=True)


def test_two_at_a_time(workspace: Path) -> None:
    """A journal in use is refused."""
    search(interrupted(12))
    with FILE.open("r+") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with refused(OutputError, "another search is at work with the journal 'trials.jsonl'"):
            search(resume=True)


def test_places_that_can_not_be(workspace: Path) -> None:
    """A folder, or a file in the way."""
    with refused(OutputError, "the journal 'math-lora' can't be opened (Is a directory): expected a file"):
        search(journal="math-lora")
    with refused(OutputError, "the journal 'math-lora/adapter_config.json/j' can't be opened"):
        search(journal="math-lora/adapter_config.json/j")


def test_no_room(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A line that does not fit on the disk is not begun, and the lines before it stay."""
    write, sizes = os.write, []

    def full(file: int, content: bytes) -> int:
        sizes.append(len(content))
        if len(sizes) == 4:
            return write(file, content[:10])
        if len(sizes) > 4:
            raise OSError(28, "No space left on device")
        return write(file, content)

    with (
        monkeypatch.context() as patch,
        refused(OutputError, "can't write to the journal 'trials.jsonl' (No space left on device)"),
    ):
        patch.setattr(journal.os, "write", full)
        search()
    assert FILE.read_text().count("\n") == 3 and FILE.read_text().endswith("\n")
    assert len(search(resume=True).trials) == 12
    FILE.unlink()
    with (
        monkeypatch.context() as patch,
        refused(OutputError, "what was finished before is kept in it; make room, and resume"),
    ):
        patch.setattr(journal.os, "write", full)
        search()
    assert not FILE.exists()


def test_adapters_in_memory_have_no_journal(workspace: Path) -> None:
    """What can't be known again can't be resumed."""
    from tests.support import models
    from tests.support.workspace import ADAPTERS

    model: Any = models.with_lora(models.bert(), ADAPTERS)
    with refused(
        OptionError, "adapter 'math-lora' is in memory: expected adapters in files", "search without a journal"
    ):
        os.chdir(os.path.dirname(workspace))
        tune(NAMES, score, model=model, journal=FILE)


def test_base_models_count(workspace: Path) -> None:
    """That of DoRA adapters, by the content of its files; one in memory can't be known again."""
    from tests.support.models import bert, save_adapters, with_lora

    model = bert()
    model.save_pretrained("base")
    save_adapters(with_lora(model, {"speech": {"r": 2, "target_modules": ["query"], "use_dora": True}}), Path())
    arguments: dict[str, Any] = {"alphas": [1], "journal": FILE, "merger": DCMergeAdapter(method="ta")}
    with pytest.warns(MergeWarning, match="is DoRA"):
        tune(["speech"], lambda merged: 0.0, base="base", **arguments)
    Path("base/config.json").write_text(Path("base/config.json").read_text() + "\n")
    with refused(OutputError, "is of another search ('config.json' of 'base' has changed)"):
        tune(["speech"], lambda merged: 0.0, base="base", resume=True, **arguments)
    with refused(
        OptionError, "the base model of DoRA adapters is in memory: expected one in files", "without a journal"
    ):
        tune(["speech"], lambda merged: 0.0, base=bert(), resume=True, **arguments)

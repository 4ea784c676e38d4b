"""Evaluations by a program: what it is given, which number counts, and every way in which it can go wrong."""

from __future__ import annotations

import os
import shlex
import sys
import time
from pathlib import Path

import pytest
from torch import Tensor

from dc_merge_peft import DCMergeAdapter, EvaluationError, MergedAdapter, OptionError, OutputError, tune, tuning
from dc_merge_peft.tuning import CommandEvaluation
from dc_merge_peft.tuning.evaluation import last_number
from tests.support.evaluating import NAMES, combined, count_merges, runs, write_program
from tests.support.refused import listing, refused

Deltas = dict[str, dict[str, Tensor]]


@pytest.fixture
def merged(workspace: Path) -> MergedAdapter:
    """A candidate."""
    return DCMergeAdapter(method="ta").merge(NAMES)


def evaluation(code: str, timeout: float | None = None) -> CommandEvaluation:
    """A Python program as a command; ``sys.argv[1]`` is the candidate."""
    return CommandEvaluation(f"{sys.executable} -I -c {shlex.quote(code)} {{adapter}}", beside="out", timeout=timeout)


def test_a_search_with_a_program(workspace: Path, deltas: Deltas, monkeypatch: pytest.MonkeyPatch) -> None:
    """Real processes on real candidates find the known alpha; nothing but the best is left."""
    command = write_program(workspace, combined(deltas, 0.72, 0.72))
    before, merges = set(listing(workspace)), count_merges(monkeypatch)
    evaluate = CommandEvaluation(command, beside="tuned.yaml")
    result = tune(NAMES, evaluate, merger=DCMergeAdapter(method="ta"), alphas=[0.3, 0.7, 1.1])
    assert (result.best.alpha, len(merges)) == (0.7, 1)
    assert len(runs(workspace)) == 3
    assert set(listing(workspace)) - before == {"runs.txt"}


def test_the_candidate_is_an_adapter(merged: MergedAdapter) -> None:
    """Placeholder and environment name the same absolute directory, which holds what ``save_pretrained`` writes."""
    code = (
        "import os, shutil, sys; folder = os.environ['DC_MERGE_ADAPTER']; assert sys.argv[1] == folder; "
        "assert os.path.isabs(folder); shutil.copytree(folder, 'copy'); print(1)"
    )
    assert evaluation(code)(merged) == 1.0
    merged.save_pretrained("saved")
    assert listing(Path("copy")) == listing(Path("saved"))
    environment = CommandEvaluation(
        f"{sys.executable} -I -c \"import os; print(len(os.listdir(os.environ['DC_MERGE_ADAPTER'])))\"", beside="out"
    )
    assert environment(merged) == 4.0


@pytest.mark.parametrize(
    ("command", "found"),
    [
        ("python evaluate.py {adaptor}", "{adaptor}"),
        ("python evaluate.py --adapter={model}/weights", "{model}"),
        ("sh -c 'python evaluate.py {Adapter} | tail -1'", "{Adapter}"),
        ("python evaluate.py", None),
        ("python evaluate.py {adapter} {task}", None),
        ("sh -c 'python evaluate.py ${DC_MERGE_ADAPTER} {adaptor}'", None),
        ("sh -c 'python evaluate.py | awk \"{print}\"'", None),
        ("sh -c 'python evaluate.py ${adapters}'", None),
        ("python -c 'import mine; print(f\"{mine.score()} {points}\")'", None),
    ],
)
def test_placeholders_of_other_names(command: str, found: str | None) -> None:
    """Are refused with the right one, where nothing else names the candidate; braces of code and of a shell are no placeholders."""
    if found is None:
        assert CommandEvaluation(command, beside="out").command == command
        return
    with refused(OptionError, f"unknown placeholder '{found}'", "valid names are: {adapter}", "DC_MERGE_ADAPTER"):
        CommandEvaluation(command, beside="out")


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("0.5", 0.5),
        ("epoch 3\naccuracy: 0.81\n", 0.81),
        ("acc=83.5%", 83.5),
        ("loss -1.5e-3", -1.5e-3),
        ("[0.25, .75]", 0.75),
        ("1.\n", 1.0),
        ("+2E+2 done", 200.0),
        ("score: 0.4 (top@5, step12, v1.2.3a)", 0.4),
        ("nan nan 7", 7.0),
        ("0.9, information", 0.9),
        ('{"f1": 0.6}', 0.6),
        ("0.85 in 12.5s (9.5it/s, torch 2.5.1+cpu, 0.5_x)", 0.85),
        ("epoch 3\naccuracy \x1b[1;36m0.85\x1b[0m\x1b[K\n", 0.85),
        ("epoch,accuracy\n3,0.85\n", 0.85),
        ("[1,2,3]", 3.0),
        ("0.9, 1", 1.0),
    ],
)
def test_the_last_number_counts(text: str, number: float) -> None:
    """Among words, units and brackets; digits inside words are no numbers."""
    assert last_number(text, "eval") == number


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "the command 'eval' printed nothing on its standard output: expected the score as the last number there"),
        (" \n", "printed nothing on its standard output"),
        ("all done\n", "printed no number, at last 'all done', on its standard output: expected the score"),
        ("step12 top@5", "printed no number, at last 'step12 top@5',"),
        ("0.5\nNaN", "the command 'eval' printed nan: expected a finite number"),
        ("loss: -inf", "the command 'eval' printed -inf: expected a finite number"),
        ("1e999", "the command 'eval' printed inf: expected a finite number"),
        (
            "accuracy: 0,85\n",
            "the command 'eval' printed '0,85', which may be one number or two: expected the score with a decimal point",
        ),
        ("-12,345.", "printed '12,345', which may be one number or two"),
        ("took 12.5s", "printed no number, at last 'took 12.5s',"),
    ],
)
def test_no_number(text: str, words: str) -> None:
    """None, or none that could be compared."""
    with refused(EvaluationError, words):
        last_number(text, "eval")


def test_failures(merged: MergedAdapter) -> None:
    """A program that is not there, fails, or is ended by a signal; nothing is left beside the output."""
    before = listing(Path())
    with refused(EvaluationError, "the command 'no-such-program {adapter}' can't be started (No such file", "sh -c"):
        CommandEvaluation("no-such-program {adapter}", beside="out")(merged)
    with refused(EvaluationError, "ended with exit code 3: expected 0; run it by hand"):
        evaluation("import sys; sys.exit(3)")(merged)
    with refused(EvaluationError, "ended with exit code 1 (ValueError: no data): expected 0"):
        evaluation("print(0.5); raise ValueError('no data')")(merged)
    with refused(EvaluationError, "ended with exit code -9"):
        evaluation("import os; os.kill(os.getpid(), 9)")(merged)
    with refused(EvaluationError, "printed nothing on its standard output"):
        evaluation("import sys; print(0.5, file=sys.stderr)")(merged)
    assert listing(Path()) == before


def test_time(merged: MergedAdapter) -> None:
    """A program that takes too long is ended, with what it has started, even where it does not listen."""
    child = "import signal, time; signal.signal(15, signal.SIG_IGN); open('child', 'w').write('x'); time.sleep(60)"
    code = f"import subprocess, sys; subprocess.run([sys.executable, '-I', '-c', {child!r}])"
    start = time.monotonic()
    with refused(EvaluationError, "was ended after 1 s: expected a number by then; allow more (timeout, --timeout)"):
        evaluation(code, timeout=1)(merged)
    assert time.monotonic() - start < 8 and Path("child").exists()
    # A killed process whose parent is gone stays in the list until the system has looked after it.
    until = time.monotonic() + 5
    while left := [line for line in _commands() if "open('child'" in line]:
        assert time.monotonic() < until, left
        time.sleep(0.05)


@pytest.mark.parametrize("own_session", [False, True])
@pytest.mark.parametrize("timeout", [None, 30.0])
def test_what_a_program_leaves_running(
    merged: MergedAdapter, monkeypatch: pytest.MonkeyPatch, own_session: bool, timeout: float | None
) -> None:
    """With its output open: the search does not wait for its end, and the score counts."""
    monkeypatch.setattr(tuning.evaluation, "_GRACE", 0.5)
    left = f"import subprocess, sys; subprocess.Popen(['sleep', '20'], start_new_session={own_session}); print(0.5)"
    start = time.monotonic()
    assert evaluation(left, timeout)(merged) == 0.5
    assert time.monotonic() - start < 10


def _commands() -> list[str]:
    """The command lines of this machine's processes."""
    lines = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                lines.append((folder / "cmdline").read_bytes().decode(errors="replace"))
            except OSError:  # it has ended
                continue
    return lines


def test_where_nothing_can_be_written(merged: MergedAdapter) -> None:
    """The candidate's place is the output's."""
    evaluate = CommandEvaluation("true", beside="math-lora/adapter_config.json/out")
    with refused(OutputError, "can't write 'math-lora/adapter_config.json/out'"):
        evaluate(merged)


@pytest.mark.parametrize(
    ("command", "timeout", "words"),
    [
        ("", None, "the command is empty: expected a program, as in 'python evaluate.py {adapter}'"),
        ("python 'x", None, "can't be split into words (No closing quotation): close its quotes"),
        ("true", 0, "the timeout is 0: expected a number of seconds above 0"),
        ("true", float("nan"), "the timeout is nan"),
        ("true", True, "the timeout is True"),
        ("true", 10**400, "the timeout is 1000"),
    ],
)
def test_refused(command: str, timeout: float | None, words: str) -> None:
    """Before anything is run."""
    with refused(OptionError, words):
        CommandEvaluation(command, beside="out", timeout=timeout)


def test_names_with_spaces(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A path is one argument, whatever is in it."""
    strange = workspace / "a b'c"
    strange.mkdir()
    monkeypatch.chdir(strange)
    merged = DCMergeAdapter(method="ta").merge([os.path.join("..", name) for name in NAMES])
    assert evaluation("import os, sys; print(len(sys.argv) + os.path.isdir(sys.argv[1]))")(merged) == 3.0

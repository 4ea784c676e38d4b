"""``dc-merge tune`` through its runner and as a process: outputs, interruptions, and errors of one line."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from torch import Tensor
from typer.testing import Result

from dc_merge_peft.tuning.outcome import MARK
from tests.support.evaluating import NAMES, combined, count_merges, runs, write_program
from tests.support.program import run
from tests.support.refused import listing

Deltas = dict[str, dict[str, Tensor]]
OPTIONS = ("-m", "ta", "--alphas", "0.3, 0.7,1.1", "--try", "svd_rank=4,none")
OUT = ("-o", "tuned.yaml")


def failed(result: Result, *words: str) -> None:
    """Exit code 2 and an error of one line that has all the words."""
    assert result.exit_code == 2, result.output
    lines = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and "Traceback" not in result.output, result.stderr
    for word in words:
        assert word in lines[0]


@pytest.fixture
def command(workspace: Path, deltas: Deltas) -> str:
    """A program for which 0.72 times the sum is best, of all ranks."""
    return write_program(workspace, combined(deltas, 0.72, 0.72))


def tune(command: str, *more: str) -> Result:
    """Six trials of two merges."""
    return run("tune", *NAMES, "--command", command, *OPTIONS, *OUT, *more)


def test_from_adapters_to_the_best(workspace: Path, command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A table, a configuration that merges to the best candidate's bytes, the adapter itself, a figure, and all trials."""
    (workspace / "then.py").write_text(
        "import shutil; shutil.copytree(folder, f'kept/{os.path.getsize(\"runs.txt\")}')"
    )
    merges = count_merges(monkeypatch)
    result = tune(command, "--save", "best", "--plot", "search.png")
    assert result.exit_code == 0, result.output
    assert [merge["svd_rank"] for merge in merges] == [4, None, None]  # the last one is written
    assert "6 trials, best first" in result.stdout and "dc-merge merge --config tuned.yaml -o merged" in result.stdout
    (best, *_) = [row for row in map(str.split, result.stdout.splitlines()) if len(row) == 5 and row[0].isdigit()]
    assert (best[0], best[2:4]) == ("5", ["0.7", "none"])
    record = yaml.safe_load(Path("tuned.yaml").read_text())
    assert (record["options"]["alpha"], record["method"], record["record"]["tuned"]["trial"]) == (0.7, "ta", 5)
    assert run("merge", "--config", "tuned.yaml", "-o", "merged").exit_code == 0
    candidates = sorted(Path("kept").iterdir(), key=lambda folder: int(folder.name))
    assert listing(Path("merged")) == listing(Path("best")) == listing(candidates[4])
    assert Path("search.png").read_bytes().startswith(b"\x89PNG")
    assert len(Path("tuned.yaml.trials.jsonl").read_text().splitlines()) == 7
    assert not [name for name in os.listdir() if name.startswith(".")]


def test_settings_from_files(workspace: Path, command: str) -> None:
    """A configuration of a merge and a search space as YAML files; JSON has everything."""
    Path("run.yaml").write_text(
        "adapters: [math-lora, code-lora]\nmethod: ta\nalpha: 5\noutput: elsewhere\ndtype: float32\n"
    )
    Path("space.yaml").write_text("alpha: {min: 0.6, max: 0.8, step: 0.1}\nweights:\n  code-lora: [1.0, 0.5]\n")
    result = run("tune", "--config", "run.yaml", "--space", "space.yaml", "--command", command, *OUT, "--json")
    assert result.exit_code == 0, result.output
    said = json.loads(result.stdout)
    assert said["best"]["settings"] == {"weights.code-lora": 1.0, "alpha": 0.7}
    assert (len(said["trials"]), said["output"], said["saved"], said["plot"]) == (6, "tuned.yaml", None, None)
    assert said["config"]["weights"] == [1.0, 1.0] and not Path("elsewhere").exists()


def test_minimize(workspace: Path, command: str) -> None:
    """The score is minus a distance: the lowest is the farthest."""
    assert tune(command, "--minimize").exit_code == 0
    assert yaml.safe_load(Path("tuned.yaml").read_text())["options"]["alpha"] == 0.3


def test_all_the_same(workspace: Path) -> None:
    """A program that does not look at what it is given finds no best, which is said; one trial alone says nothing of the sort."""
    said = run("tune", *NAMES, "--command", "echo 0.5", *OPTIONS, *OUT)
    assert said.exit_code == 0
    assert "note: all 6 trials scored 0.5: the search says nothing" in " ".join(said.output.split())
    told = json.loads(run("tune", *NAMES, "--command", "echo 0.5", *OPTIONS, *OUT, "--json", "--overwrite").stdout)
    assert any("check that the evaluation reads the candidate" in remark for remark in told["remarks"])
    single = run("tune", *NAMES, "--command", "echo 0.5", "--alphas", "1", "-o", "one.yaml", "--json")
    assert not json.loads(single.stdout)["remarks"], single.stdout


def test_dry_run(workspace: Path, command: str) -> None:
    """The trials, or the space that optuna would search; nothing is run or written."""
    before = listing(workspace)
    result = run("tune", *NAMES, *OPTIONS, "--dry-run")
    assert result.exit_code == 0, result.output
    assert (
        "a grid of 6 trials, merged 2 times" in result.stdout
        and "nothing was merged, evaluated or written" in result.stdout
    )
    assert [line.split() for line in result.stdout.splitlines()[2:4]] == [["1", "4", "0.3"], ["2", "4", "0.7"]]
    plan = json.loads(run("tune", *NAMES, *OPTIONS, "--command", command, *OUT, "--dry-run", "--json").stdout)
    assert plan["trials"] == 6 and plan["settings"][5] == {"svd_rank": None, "alpha": 1.1}
    pytest.importorskip("optuna")
    Path("space.yaml").write_text("rho: {min: 1, max: 100, log: true}\n")
    searched = run("tune", *NAMES, "--space", "space.yaml", "--trials", "20", "--dry-run")
    assert "20 trials by optuna with seed 0" in searched.stdout and "1 to 100, by ratios" in searched.stdout
    os.unlink("space.yaml")
    assert listing(workspace) == before


def test_resuming_what_failed(workspace: Path, command: str, deltas: Deltas) -> None:
    """A program that fails once: its trials are kept, the error says which and how to go on, the rest gives the same result."""
    assert tune(command).exit_code == 0
    whole, trials = Path("tuned.yaml").read_bytes(), runs(workspace)
    for file in ("tuned.yaml", "tuned.yaml.trials.jsonl", "runs.txt"):
        os.unlink(file)
    (workspace / "then.py").write_text("if open('runs.txt').read().count('\\n') == 4: raise ValueError('no data')")
    broken = tune(command)
    failed(broken, "trial 4 (svd_rank none, alpha 0.3)", "exit code 1 (ValueError: no data)")
    assert (
        "note: the finished trials are kept in 'tuned.yaml.trials.jsonl'; --resume goes on with them" in broken.stderr
    )
    assert not Path("tuned.yaml").exists()
    failed(again := tune(command), "is there already, with 3 finished trials")
    assert "note" not in again.stderr
    failed(tune(command + " --all", "--resume"), "is of another search (command ")
    assert tune(command, "--resume").exit_code == 0
    assert Path("tuned.yaml").read_bytes() == whole and len(runs(workspace)) == len(trials) + 1
    assert tune(command, "--resume", "--save", "best").exit_code == 0 and len(runs(workspace)) == 7
    failed(tune(command), "the output 'tuned.yaml' already exists")
    assert tune(command, "--overwrite").exit_code == 0 and len(runs(workspace)) == 13


def test_what_overwrite_replaces(workspace: Path, command: str) -> None:
    """Files of an earlier search, and nothing else: no adapter's, no other configuration or figure, and no input."""
    Path("space.yaml").write_text(f"{MARK}\nalpha: [1, 2]\n")
    Path("other.yaml").write_text("method: ta\n")
    Path("other.png").write_bytes(b"\x89PNG")
    assert tune(command, "--plot", "search.svg").exit_code == 0
    before = listing(workspace)
    words = "of which it is to be made: expected another file"
    searched = ("tune", *NAMES, "--command", command, "--overwrite")
    failed(run(*searched, "-o", "evaluate.py"), words)
    failed(run(*searched, "-o", "./space.yaml", "--space", "space.yaml"), words)
    failed(run(*searched, *OUT, "--config", "tuned.yaml"), words)
    for file in ("math-lora/adapter_model.safetensors", "code-lora/adapter_config.json", "other.yaml"):
        failed(run(*searched, "-o", file), "is something else than an earlier output")
    failed(run(*searched, *OUT, "--plot", "other.png"), "is something else than an earlier output")
    failed(run(*searched, *OUT, "--save", "math-lora"), "of which it is to be made: expected another directory")
    assert listing(workspace) == before
    assert tune(command, "--plot", "search.svg", "--overwrite").exit_code == 0
    assert {name for name, content in listing(workspace).items() if content != before[name]} <= {
        "runs.txt",
        "tuned.yaml.trials.jsonl",
    }


def test_resuming_what_was_never_begun(workspace: Path, command: str) -> None:
    """Without a journal nothing that stands there is this search's own: a configuration and an adapter of others stay."""
    Path("tuned.yaml").write_text("method: ta\n")
    failed(tune(command, "--resume"), "the output 'tuned.yaml' already exists")
    os.unlink("tuned.yaml")
    before = listing(workspace)
    failed(tune(command, "--resume", "--save", "math-lora"), "the output 'math-lora' already exists")
    assert listing(workspace) == before


def test_interrupted(workspace: Path, command: str) -> None:
    """Ctrl-C ends the program too, keeps what is finished and leaves nothing half-written."""
    (workspace / "then.py").write_text(
        "import signal, time\n"
        "if open('runs.txt').read().count('\\n') == 3:\n"
        "    open('pid', 'w').write(str(os.getpid()))\n"
        "    os.kill(os.getppid(), signal.SIGINT)\n"
        "    time.sleep(60)\n"
    )
    result = tune(command)
    assert result.exit_code == 130, result.output
    assert "the finished trials are kept" in result.stderr and "stopped by SIGINT" in result.stderr
    with pytest.raises(ProcessLookupError):
        os.kill(int(Path("pid").read_text()), 0)
    assert not [name for name in os.listdir() if name.startswith(".")] and not Path("tuned.yaml").exists()
    assert len(Path("tuned.yaml.trials.jsonl").read_text().splitlines()) == 3
    (workspace / "then.py").unlink()
    assert tune(command, "--resume").exit_code == 0 and len(runs(workspace)) == 7
    assert yaml.safe_load(Path("tuned.yaml").read_text())["options"]["alpha"] == 0.7


def test_killed(workspace: Path, command: str) -> None:
    """A process that is killed for good: the next one removes what it has left, and ends as if nothing had been."""
    (workspace / "then.py").write_text(
        "import time\nif open('runs.txt').read().count('\\n') == 3:\n"
        "    open('hidden', 'w').write(str(os.getpid()))\n    os.rename('hidden', 'pid')\n    time.sleep(60)\n"
    )
    arguments = ["tune", *NAMES, "--command", command, *OPTIONS, *OUT]
    with (workspace / "said").open("w") as said:
        process = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-m", "dc_merge_peft", *arguments], stdout=said, stderr=said
        )
    try:
        for _ in range(600):
            if Path("pid").exists() or process.poll() is not None:
                break
            time.sleep(0.1)
        assert Path("pid").exists(), Path("said").read_text()
    finally:
        process.kill()
        process.wait()
        if Path("pid").exists():
            os.kill(int(Path("pid").read_text()), signal.SIGKILL)  # the program's session is its own
    assert [name for name in os.listdir() if name.startswith(".tuned.yaml.")]
    (workspace / "then.py").unlink()
    resumed = tune(command, "--resume")
    assert resumed.exit_code == 0, resumed.output
    assert "note: removed what process" in resumed.stderr
    assert len(runs(workspace)) == 7 and not [name for name in os.listdir() if name.startswith(".")]
    first = Path("tuned.yaml").read_bytes()
    assert tune(command, "--overwrite").exit_code == 0 and Path("tuned.yaml").read_bytes() == first


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--command", "true", *OUT], ["found no adapters to merge", "dc-merge tune --help"]),
        ([*NAMES, *OUT], ["found no --command: expected a program, as in 'python evaluate.py {adapter}', or --dry-run"]),
        ([*NAMES, "--command", "true"], ["found no output: expected -o FILE, as in -o tuned.yaml, or --dry-run"]),
        ([*NAMES, "--command", "true", "-o", ""], ["the output is an empty name: expected a file, as in tuned.yaml"]),
        ([*NAMES, "--command", "true", "-o", "math-lora"], ["the output 'math-lora' is a directory", "math-lora/tuned.yaml"]),
        ([*NAMES, "--command", "true", "-o", "goal.txt/x/t.yaml"], ["goal.txt' is a file, expected a directory"]),
        ([*NAMES, "--command", "true", *OUT, "--plot", "p.pdf"], ["the figure 'p.pdf' ends in '.pdf': expected .png or .svg"]),
        ([*NAMES, "--command", "true", *OUT, "--save", "math-lora"], ["the output 'math-lora' already exists"]),
        ([*NAMES, "--command", "true", *OUT, "--try", "rho"], ["--try is 'rho': expected option=value, as in --try smoothing=none,linear"]),
        ([*NAMES, "--command", "true", *OUT, "--try", "rho=2", "--try", "rho=3"], ["option 'rho' is given twice by --try"]),
        ([*NAMES, "--command", "true", *OUT, "--try", "rho=2", "--space", "space.yaml"], ["'rho' is given by --try and by --space"]),
        ([*NAMES, "--command", "true", *OUT, "--try", "rho=x"], ["option 'rho' is 'x': expected a number"]),
        ([*NAMES, "--command", "true", *OUT, "--alphas", "1,x"], ["option 'alpha' is 'x': expected a number or 'auto'"]),
        ([*NAMES, "--command", "true", *OUT, "--alphas", ""], ["option 'alpha' is ''"]),
        ([*NAMES, "--command", "true", *OUT, "--space", "none.yaml"], ["the search space 'none.yaml' can't be read"]),
        ([*NAMES, "--command", "true", *OUT, "--space", "list.yaml"], ["the search space 'list.yaml' is no mapping"]),
        ([*NAMES, "--command", "true", *OUT, "--resume", "--overwrite"], ["found resume and overwrite: expected one of them"]),
        ([*NAMES, "--command", "true", *OUT, "--timeout", "0"], ["the timeout is 0.0: expected a number of seconds above 0"]),
        ([*NAMES, "--command", "true", *OUT, "-m", "tsv"], ["unknown method 'tsv'", "did you mean 'tsvm'?"]),
        ([*NAMES, "--command", "sleep 60", *OUT, "--timeout", "0.2"], ["trial 1 (alpha 0.1)", "was ended after 0.2 s"]),
        ([*NAMES, "--command", "echo none", *OUT], ["trial 1 (alpha 0.1)", "printed no number, at last 'none',"]),
        ([*NAMES, "--command", "echo nan", *OUT], ["printed nan: expected a finite number"]),
        ([*NAMES, "--command", "false", *OUT], ["ended with exit code 1: expected 0"]),
    ],
)  # fmt: skip
def test_refused(workspace: Path, arguments: list[str], words: list[str]) -> None:
    """One line each, and nothing is written."""
    Path("goal.txt").write_text("")
    Path("space.yaml").write_text("rho: [1, 2]\n")
    Path("list.yaml").write_text("- rho\n")
    before = listing(workspace)
    failed(run("tune", *arguments), *words)
    assert listing(workspace) == before

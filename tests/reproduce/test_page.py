"""The page says what the programs do."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from reproduce import command
from reproduce.mergebench.tasks import TASKS as MERGE_TASKS
from reproduce.vision.tasks import TASKS

PAGE = (Path(__file__).parent.parent.parent / "docs/reproduce.md").read_text(encoding="utf-8")
LINES = re.findall(r"^python -m examples\.reproduce (.*)$", f"{PAGE}\n{command.__doc__}", re.MULTILINE)


@pytest.mark.parametrize("line", LINES)
def test_commands_are_understood(line: str) -> None:
    """Each with the options that there are."""
    options = command.parser().parse_args(shlex.split(line))
    assert options.table in (*command.VISION, "mergebench")


def test_data_sets_are_named() -> None:
    """Every task with the id that is used, and nothing else in its cell."""
    cells = dict(re.findall(r"\| (\w+)(?: \([^)]*\))? \| (`[^|]*?|none known)(?= \|)", PAGE))
    for name, task in TASKS.items():
        assert cells[name].startswith(f"`{task.hub.id}`" if task.hub else "none known"), name
    assert all(name in PAGE for name in MERGE_TASKS)


@pytest.mark.parametrize("table", ["", *command.VISION, "mergebench"])
def test_help(table: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Every command explains itself."""
    with pytest.raises(SystemExit) as ended:
        command.main([table, "--help"] if table else ["--help"])
    shown = capsys.readouterr().out
    assert ended.value.code == 0 and ("--dry-run" in shown) and len(shown) > 500

"""The examples of the page about the Hub, against a Hub on the loopback interface."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from dc_merge_peft.cli import app
from tests.support.hub_server import HubServer, hub_server, point_client_at
from tests.support.refused import listing
from tests.support.workspace import make_workspace
from tests.test_docs import ROOT, blocks

PAGE = ROOT / "docs" / "hub.md"


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[HubServer]:
    """A Hub with the repositories that the page names, and an empty working directory."""
    made = make_workspace(tmp_path / "made")
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    with hub_server() as running:
        point_client_at(monkeypatch, running, tmp_path, token=running.token)
        math, code = listing(made / "math-lora"), listing(made / "code-lora")
        running.add_repo("org/math-lora", math)
        running.add_repo("org/code-lora", code)
        running.add_tag("org/code-lora", "v1")
        running.add_repo("org/many", {f"chat/{name}": data for name, data in math.items()})
        running.add_repo("org/private-lora", math, private=True)
        running.add_repo("org/base", listing(made / "base-model"))
        yield running


def test_shell_lines(server: HubServer) -> None:
    """Every line of the program."""
    lines = [line for line in "\n".join(blocks(PAGE, "console")).splitlines() if line]
    for line in lines:
        program, *arguments = shlex.split(line.removeprefix("$ "))
        result = CliRunner().invoke(app, [*arguments, "--overwrite"], catch_exceptions=False)
        assert program == "dc-merge" and result.exit_code == 0, result.output
    assert len(lines) == 3 and server.commits("org/merged", "main")[-1].title == "Two in one"
    assert len(server.pull_requests("org/merged")) == 1


def test_python_blocks(server: HubServer) -> None:
    """All Python blocks, one after the other."""
    namespace: dict[str, object] = {"my_token": server.token}
    for block in blocks(PAGE, "python"):
        exec(compile(block, str(PAGE), "exec"), namespace)
    assert namespace["url"] and server.store.repos["org/fused"].private and Path("fused", "model.safetensors").exists()


def test_quickstart_pushes(server: HubServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The commands of the quickstart's section on the Hub, from the directories that its reader has."""
    monkeypatch.chdir(tmp_path / "made")
    section = (
        (ROOT / "docs/quickstart.md")
        .read_text(encoding="utf-8")
        .partition("## Push to the Hub")[2]
        .partition("\n## ")[0]
    )
    lines = [line.removeprefix("$ ") for line in section.splitlines() if line.startswith("$ dc-merge")]
    for line in lines:
        result = CliRunner().invoke(app, shlex.split(line)[1:], catch_exceptions=False)
        assert result.exit_code == 0, result.output
    assert len(lines) == 2 and all(server.store.repos[name].private for name in ("me/merged", "me/fused"))

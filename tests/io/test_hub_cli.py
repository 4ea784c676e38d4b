"""``dc-merge merge`` with ``--push-to``: its flags, and errors that say where the result is all the same."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import HfApi, constants
from typer.testing import CliRunner, Result

from dc_merge_peft.cli import app
from tests.support.hub_adapters import MERGED, ONE, PUBLISHED, TWO, adapter_hub
from tests.support.hub_server import HubServer


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[HubServer]:
    """A Hub with two adapters, and an empty working directory."""
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    with adapter_hub(monkeypatch, tmp_path) as running:
        yield running


def run(*arguments: str) -> Result:
    """A merge of the two."""
    return CliRunner().invoke(app, ["merge", ONE, TWO, "-m", "ta", *arguments], catch_exceptions=False)


def failed(result: Result, *words: str) -> None:
    """Exit code 2 and one line with all the words."""
    assert result.exit_code == 2 and result.stderr.count("\n") == 1, result.output
    assert not [word for word in words if word not in result.stderr], result.stderr


def test_every_flag(server: HubServer) -> None:
    """Private, with a title, to the Hub alone; then as a pull request, with the JSON naming it."""
    result = run("--push-to", MERGED, "--private", "--commit-message", "Say this")
    assert result.exit_code == 0 and f"uploaded: {server.endpoint}/{MERGED}/commit/" in result.stdout
    assert server.store.repos[MERGED].private and server.commits(MERGED, "main")[-1].title == "Say this"
    assert set(server.files(MERGED)) == PUBLISHED and not list(Path().iterdir())
    outcome = json.loads(
        run("--push-to", MERGED, "--create-pr", "--alpha", "0.5", "--commit-message", "Try", "--json").stdout
    )
    assert outcome["url"] == f"{server.endpoint}/{MERGED}/discussions/1" and outcome["output"] is None
    assert server.pull_requests(MERGED)[0].title == "Try"
    assert server.files(MERGED) != server.files(MERGED, "refs/pr/1")


@pytest.mark.parametrize("made", [False, True])
@pytest.mark.parametrize("output", [[], ["-o", "out"]])
def test_stopped(server: HubServer, monkeypatch: pytest.MonkeyPatch, output: list[str], made: bool) -> None:
    """Just before the commit or right behind it, which nobody here can tell apart; and where the Hub has answered."""
    original = HfApi.create_commit

    def stop(*_: Any, **__: Any) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(5)

    def stopped_commit(api: HfApi, *arguments: Any, **named: Any) -> None:
        if made:
            original(api, *arguments, **named)
        stop()

    monkeypatch.setattr(HfApi, "create_commit", stopped_commit)
    done = run("--push-to", MERGED, *output)
    here = f"'{Path('out').absolute()}' is complete" if output else "nothing unfinished was left"
    there = f"the upload to '{MERGED}' had begun: look there whether it has arrived, as a whole or not at all"
    assert (done.exit_code, done.stderr) == (143, f"stopped by SIGTERM: {here}; {there}\n")
    assert len(server.commits(MERGED, "main")) == 1 + made
    monkeypatch.setattr(HfApi, "create_commit", original)
    monkeypatch.setattr(sys.modules["dc_merge_peft.cli.merge"], "print_outcome", stop)
    done = run("--push-to", MERGED)
    assert done.exit_code == 143 and f"left; uploaded: {server.endpoint}/{MERGED}/commit/" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["-o", "out", "--private"], ["--private is given without --push-to", "me/merged"]),
        (["-o", "out", "--create-pr"], ["--create-pr is given without --push-to", "me/merged"]),
        (["-o", "out", "--commit-message", "x"], ["--commit-message is given without --push-to"]),
        (["--push-to", MERGED, "--commit-message", " "], ["--commit-message is empty", "expected a title"]),
        (["--push-to", " "], ["--push-to is empty", "me/merged"]),
        (["--push-to", "a b"], ["can't push to 'a b'", "expected a repository id such as me/merged"]),
        (["--push-to", "org/../x"], ["can't push to 'org/../x'", "check the name"]),
    ],
)
def test_wrong_flags_stop_before_the_work(server: HubServer, arguments: list[str], words: list[str]) -> None:
    """One line, and nothing was asked of the Hub."""
    failed(run(*arguments), *words)
    assert not server.requests and not list(Path().iterdir())


def test_no_token_on_the_command_line(server: HubServer) -> None:
    """A flag would stand in lists of processes and in the shell's history: there is none."""
    result = run("--push-to", MERGED, "--token", server.token)
    assert result.exit_code == 2 and "No such option" in result.stderr and not server.requests


def test_a_failed_push_after_saving(server: HubServer) -> None:
    """The adapter is where it was asked for, and the line says so; pushed alone it says nothing of the kind."""
    server.fail("POST", "/commit/", 500, times=99)
    failed(run("-o", "out", "--push-to", MERGED), "can't push", "500", "stays empty", "the merged adapter is in 'out'")
    assert {path.name for path in Path("out").iterdir()} == PUBLISHED
    result = run("--push-to", MERGED)
    failed(result, "can't push to 'org/merged'", "try again later")
    assert "merged adapter is in" not in result.stderr


def test_offline_is_said_before_the_work(server: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is merged that could not be pushed."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    failed(
        run("-o", "out", "--push-to", MERGED), "can't push to 'org/merged'", "expected a connection", "HF_HUB_OFFLINE"
    )
    assert not Path("out").exists()

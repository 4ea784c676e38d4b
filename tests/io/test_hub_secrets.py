"""The access token is nowhere: not in logs, errors, cards, configs, metadata, reprs or what the program prints."""

from __future__ import annotations

import json
import logging
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from dc_merge_peft import DCMergeAdapter, MergeError, OutputError, SourceError
from dc_merge_peft.cli import app
from dc_merge_peft.errors import HIDDEN, MergeWarning, without_secrets
from dc_merge_peft.sources import CheckpointSource
from tests.support import models
from tests.support.hub_adapters import MERGED, ONE, TWO, adapter_hub, merge
from tests.support.hub_server import HubServer, point_client_at
from tests.support.models import write_checkpoint
from tests.support.refused import listing

TOKEN = "hf_" + "Ab3dE5gH" * 4 + "xY"  # as long as real ones
UNREAD = "org/unread"  # what was read before would come from the cache
URL = f"https://jane:{TOKEN}@huggingface.co/org/one"


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[HubServer]:
    """A Hub with two private adapters that ``TOKEN`` opens; nobody is logged in."""
    with adapter_hub(monkeypatch, tmp_path) as running:
        running.add_repo(UNREAD, listing(tmp_path / "made" / ONE))
        for repo in (ONE, TWO, UNREAD):
            running.store.repos[repo].private = True
        running.add_token(TOKEN, "org")
        point_client_at(monkeypatch, running, tmp_path / "anonymous", token=None)
        yield running


@pytest.fixture
def log() -> Iterator[list[str]]:
    """Every record of every logger at level DEBUG, formatted, with tracebacks."""
    lines: list[str] = []
    handler = logging.Handler(logging.DEBUG)
    handler.emit = lambda record: lines.append(handler.format(record))  # type: ignore[method-assign]
    names = [
        "",
        *logging.root.manager.loggerDict,
        "huggingface_hub",
        "httpx2",
        "httpcore2",
        "transformers",
        "dc_merge_peft",
    ]
    loggers = [logging.getLogger(name) for name in dict.fromkeys(names)]
    before = [(logger, logger.level, logger.propagate) for logger in loggers]
    for logger in loggers:
        logger.addHandler(handler)
        logger.setLevel(logging.DEBUG)
        logger.propagate = False
    yield lines
    for logger, level, propagate in before:
        logger.removeHandler(handler)
        logger.setLevel(level)
        logger.propagate = propagate


def text_of(call: Callable[[], Any]) -> str:
    """The traceback of the error that a call ends in, its repr and arguments."""
    with pytest.raises(MergeError) as caught:
        call()
    error = caught.value
    return "".join(traceback.format_exception(error)) + repr(error) + repr(error.args)


@pytest.mark.parametrize("by", ["argument", "environment", "login"])
def test_a_whole_tour(
    server: HubServer,
    log: list[str],
    tmp_path: Path,
    by: str,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """Read, save, push, propose, fuse, print, and fail at each of these, with the token given in each way."""
    if by == "environment":
        monkeypatch.setenv("HF_TOKEN", TOKEN)
    elif by == "login":
        place = tmp_path / "anonymous" / "hf-home" / "token"
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(TOKEN)
    token = {"token": TOKEN if by == "argument" else None}
    models.bert().save_pretrained(tmp_path / "base")
    server.add_repo("org/base", listing(tmp_path / "base"), private=True)
    model = models.with_lora(models.bert(), {"first": {"r": 2, "target_modules": ["query"]}})
    server.add_repo("org/first", listing(models.save_adapters(model, tmp_path / "in")[0]), private=True)

    source = CheckpointSource(ONE, **token)
    merged = merge(source, TWO, **token)
    said = [repr(source), repr(vars(source)), repr(source.info), repr(merged), repr(merged.report())]
    merged.save_pretrained(tmp_path / "out")
    said.append(merged.push_to_hub(MERGED, **token, private=True))
    said.append(merged.with_alpha(0.5).push_to_hub(MERGED, **token, create_pr=True))  # type: ignore[attr-defined]
    merger = DCMergeAdapter(method="ta")
    merger.fuse("org/base", ["org/first"], tmp_path / "fused", push_to="org/fused", **token)
    if by != "argument":
        result = CliRunner().invoke(
            app, ["merge", ONE, TWO, "-o", str(tmp_path / "cli"), "--push-to", "org/cli", "--json"]
        )
        assert result.exit_code == 0, result.output
        said.append(result.output)
    for path in ("/repos/create", "/commit/", "/preupload/", f"/api/models/{UNREAD}"):
        server.fail(None, path, 403, times=99)
        call = (
            (lambda: merge(UNREAD, **token)) if UNREAD in path else (lambda: merged.push_to_hub("org/other", **token))
        )
        said.append(text_of(call))
        server.recover()

    published = [server.files(repo, "refs/pr/1" if repo == MERGED else "main") for repo in (MERGED, "org/fused")]
    files = {f"{number}/{name}": data for number, folder in enumerate(published) for name, data in folder.items()}
    files |= {name: data for place in ("out", "fused") for name, data in listing(tmp_path / place).items()}
    assert len(files) >= 14 and any(b"org/one" in data for data in files.values())
    assert not [name for name, data in files.items() if TOKEN.encode() in data]
    assert len(log) > 50 and any("/api/repos/create" in line for line in log)
    captured = capfd.readouterr()
    assert not [line for line in [*log, *said, captured.out, captured.err] if TOKEN in line]
    assert TOKEN not in repr(server.requests) and any(record.authorized for record in server.requests)


@pytest.mark.parametrize("by", ["argument", "environment"])
def test_a_hub_that_echoes_the_token(server: HubServer, monkeypatch: pytest.MonkeyPatch, by: str) -> None:
    """What the Hub says is repeated without the token, in the error and in the traceback of its cause."""
    if by == "environment":
        monkeypatch.setenv("HF_TOKEN", TOKEN)
    token = {"token": TOKEN if by == "argument" else None}
    merged = merge(ONE, TWO, **token)
    for path, call in (
        (f"/api/models/{UNREAD}", lambda: merge(UNREAD, **token)),
        ("/repos/create", lambda: merged.push_to_hub(MERGED, **token)),
        ("^/_lfs/", lambda: merged.push_to_hub(MERGED, **token)),
        ("/commit/", lambda: merged.push_to_hub(MERGED, **token)),
    ):
        server.fail(None, path, 400, times=99, message=f"bad token {TOKEN} for you", error_code=None)
        said = text_of(call)
        assert TOKEN not in said, path
        assert UNREAD in path or ("bad token" in said and HIDDEN in said)
        server.recover()


def test_short_tokens_are_known(server: HubServer) -> None:
    """A token of any form is kept out of errors, since it is known which one is used."""
    token = server.add_token("open sesame", "org")
    server.fail("POST", "/repos/create", 400, times=99, message=f"'{token}' is no door")
    said = text_of(lambda: merge(ONE, token=token).push_to_hub(MERGED, token=token))
    assert "sesame" not in said and "is no door" in said


@pytest.mark.parametrize(
    "call",
    [
        lambda folder: merge(URL),
        lambda folder: merge(Path(URL)),
        lambda folder: merge(f"org/one@{TOKEN}"),
        lambda folder: merge(write_checkpoint(folder)).push_to_hub(URL),
        lambda folder: DCMergeAdapter().fuse(URL, [write_checkpoint(folder)]),
        lambda folder: DCMergeAdapter().fuse("base", [write_checkpoint(folder)], push_to=URL),
        lambda folder: DCMergeAdapter(method=URL),
        lambda folder: DCMergeAdapter(smoothing=URL),
        lambda folder: merge(write_checkpoint(folder, peft_type=URL)),
        lambda folder: merge(write_checkpoint(folder)).save_pretrained(write_checkpoint(folder) / "x" / URL / ".." / "y\0"),
    ],
)  # fmt: skip
def test_urls_with_a_token(server: HubServer, tmp_path: Path, call: Callable[[Path], Any]) -> None:
    """A token that stands in an argument is not repeated by the error that refuses it."""
    with pytest.raises(MergeError) as caught:
        call(tmp_path / "task")
    assert TOKEN not in str(caught.value) and TOKEN not in repr(caught.value)


@pytest.mark.parametrize(
    "arguments",
    [["merge", URL, "-o", "out"], ["merge", "task", "--push-to", URL], ["merge", "--config", "run.yaml", "-o", "out"]],
    ids=["adapter", "repository", "configuration"],
)
def test_urls_on_the_command_line(
    server: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str]
) -> None:
    """Neither does the program."""
    monkeypatch.chdir(tmp_path)
    write_checkpoint(tmp_path / "task")
    Path("run.yaml").write_text(json.dumps({"adapters": [URL]}))
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 2 and TOKEN not in result.output and result.stderr.startswith("error: ")


def test_a_base_model_named_by_a_url(server: HubServer, tmp_path: Path) -> None:
    """A token in an adapter's config is not carried into configs, cards and records."""
    folders = [write_checkpoint(tmp_path / name, base_model_name_or_path=URL) for name in ("one", "two")]
    merged = merge(*folders)
    out = merged.save_pretrained(tmp_path / "out")
    merged.push_to_hub(MERGED, token=TOKEN)
    for files in (listing(out), server.files(MERGED)):
        assert not [name for name, data in files.items() if TOKEN.encode() in data]
    plan = CliRunner().invoke(app, ["merge", *map(str, folders), "--dry-run"])
    assert plan.exit_code == 0 and TOKEN not in plan.output


HIDDEN_TEXTS = {
    f"at https://jane:{TOKEN}@hub.co/x": f"at https://{HIDDEN}@hub.co/x",
    "at https://jane:p4ss@hub.co:8080/x?a=1&sig=2 now": f"at https://{HIDDEN}@hub.co:8080/x?{HIDDEN} now",
    "https://s3.co/b?X-Amz-Signature=abc'": f"https://s3.co/b?{HIDDEN}'",
    "Authorization: Bearer abc.def": f"Authorization: Bearer {HIDDEN}",
    f"it is {TOKEN}!": f"it is {HIDDEN}!",
    "api_org_" + "x" * 34: HIDDEN,
    "hf_oauth_eyJhbGciOi.abc-def_123456": HIDDEN,
    "org/hf_finetuned-model@main": "org/hf_finetuned-model@main",
    "me@example.org and a://b": "me@example.org and a://b",
    "what? see http://a.b/c#d?": "what? see http://a.b/c#d?",
}


@pytest.mark.parametrize(("text", "expected"), HIDDEN_TEXTS.items())
def test_what_counts_as_a_secret(text: str, expected: str) -> None:
    """Passwords and queries of URLs, headers and tokens; names and addresses stay."""
    assert without_secrets(text) == expected
    assert [str(kind(text)) for kind in (SourceError, OutputError, MergeWarning)] == [expected] * 3
    assert without_secrets(text + " s3cret", "s3cret", "") == f"{expected} {HIDDEN}"

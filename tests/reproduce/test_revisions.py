"""Revisions of what is from the Hub: asked for, kept for a whole run, recorded, and asked for again by the record."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from reproduce import command
from reproduce.mergebench import run as mergebench
from reproduce.mergebench.run import MergeBench
from reproduce.revisions import at_commit, commit_of, listed, parts, pinned
from reproduce.vision.backbones import load_clip, load_tokenizer
from reproduce.vision.checkpoints import kept_adapter

from tests.reproduce.test_vision_table import small_table
from tests.support.clip import write_adapter
from tests.support.hub_server import HubServer, hub_server, point_client_at
from tests.support.refused import listing
from tests.support.versions import needs_hub_client

CLIP, ADAPTER = "org/clip", "org/sst2"
OLD, NEW = "a" * 40, "b" * 40


@pytest.fixture
def hub(clip_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """A CLIP and an adapter of two commits; the first is tagged."""
    with hub_server() as server:
        point_client_at(monkeypatch, server, tmp_path / "client")
        server.add_repo(CLIP, listing(clip_folder))
        for seed in (1, 2):
            server.add_repo(ADAPTER, listing(write_adapter(tmp_path / f"made-{seed}", seed)))
            if seed == 1:
                server.add_tag(ADAPTER, "paper")
        yield server


def test_places(tmp_path: Path) -> None:
    """An id may have a revision, a folder has none, and what is listed counts where none is given."""
    (tmp_path / "a@b").mkdir()
    assert parts("org/a@v1") == ("org/a", "v1") and parts("org/a") == ("org/a", None) == parts("org/a@")
    assert parts(tmp_path / "a@b") == (str(tmp_path / "a@b"), None)
    assert pinned("org/a", {"org/a": "v1"}) == "org/a@v1" and pinned("org/b", {"org/a": "v1"}) == "org/b"
    assert pinned("org/a@v2", {"org/a": "v1"}) == "org/a@v2"
    assert pinned(str(tmp_path), {str(tmp_path): "v1"}) == str(tmp_path) == at_commit(str(tmp_path))


def test_lists(tmp_path: Path) -> None:
    """Text by text, or a refusal."""
    file = tmp_path / "revisions.json"
    assert listed(None) == {}
    for content, message in (
        ("{", "can't be read as JSON"),
        ("[]", "no revisions by Hub id"),
        ('{"a": 1}', "no revisions"),
    ):
        file.write_text(content)
        with pytest.raises(SystemExit, match=message):
            listed(file)


@needs_hub_client
def test_commits_of_models(hub: HubServer, tmp_path: Path) -> None:
    """A tag, the newest, and one that is not there; what is loaded is of that commit."""
    first, second = (commit.sha for commit in hub.commits(ADAPTER)[-2:])
    assert at_commit(ADAPTER) == f"{ADAPTER}@{second}" and at_commit(f"{ADAPTER}@paper") == f"{ADAPTER}@{first}"
    with pytest.raises(SystemExit, match="org/sst2: found neither here nor on the Hub at the revision 'none'"):
        at_commit(f"{ADAPTER}@none")
    kept = [kept_adapter(f"{ADAPTER}@{commit}", tmp_path / commit) for commit in (first, second)]
    made = [kept_adapter(str(tmp_path / f"made-{seed}"), tmp_path / f"kept-{seed}") for seed in (1, 2)]
    for ours, theirs in zip(kept, made, strict=True):
        assert (ours / "adapter_model.safetensors").read_bytes() == (theirs / "adapter_model.safetensors").read_bytes()
    assert load_tokenizer(at_commit(CLIP))("sad")["input_ids"]
    before = load_clip(at_commit(CLIP))
    assert all(torch.isfinite(value).all() for value in before.state_dict().values())


def test_commits_of_data_sets() -> None:
    """From the names of the package's files; another commit than the one that was asked for is refused."""
    data = SimpleNamespace(cache_files=[{"filename": f"/cache/org___data/default/0.0.0/{OLD}/data-test.arrow"}])
    assert commit_of(data, "org/data", None) == OLD == commit_of(data, "org/data", "main")
    assert commit_of(SimpleNamespace(), "folder", None) is None
    with pytest.raises(SystemExit, match=f"org/data, test: found the commit {OLD}: expected {NEW}"):
        commit_of(data, "org/data, test", NEW)


@needs_hub_client
def test_from_the_record_again(
    hub: HubServer, data: Path, adapters: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """A report names the commits; its list gives the same numbers when the repositories have changed."""
    small_table(monkeypatch, "table1", lora=("RenderedSST2", "EuroSAT"))
    line = [
        "table1", "--base", CLIP, "--data", str(data), "--checkpoint", f"sst2={ADAPTER}@paper", "--checkpoint",
        f"EuroSAT={adapters / 'eurosat'}", "--device", "cpu", "--batch", "64", "--tasks", "2", "--methods", "ta",
    ]  # fmt: skip
    assert command.main([*line, "--cache", str(tmp_path / "one")]) == 0
    report = Path(capsys.readouterr().out.strip())
    used = {CLIP: hub.commits(CLIP)[-1].sha, ADAPTER: hub.commits(ADAPTER)[-2].sha}
    assert json.loads((report.parent / "revisions.json").read_text()) == used
    results = json.loads((report.parent / "results.json").read_text())
    assert results["commits"] == used and f"{ADAPTER} on the Hub: commit {used[ADAPTER]}" in report.read_text()
    again = [
        *line[:5],
        "--checkpoint",
        f"sst2={ADAPTER}",
        *line[7:],
        "--revisions",
        str(report.parent / "revisions.json"),
    ]
    hub.add_repo(CLIP, {"config.json": b"{}"})
    assert command.main([*again, "--cache", str(tmp_path / "two")]) == 0
    second = Path(capsys.readouterr().out.strip())
    assert json.loads((second.parent / "results.json").read_text()) == results
    assert command.main([*line[:5], *line[7:], "--revisions", str(report.parent / "revisions.json"), "--dry-run"]) == 1
    assert f"--revisions has ids that this run does not use: {ADAPTER}" in capsys.readouterr().out


def test_answers_belong_to_commits(tmp_path: Path) -> None:
    """Another commit of the base model or of an adapter is another model."""
    file = tmp_path / "revisions.json"
    file.write_text(json.dumps({mergebench.BASE: OLD, "AuroraZengfh/LLaVA_7B_lora_r16_REC": NEW}))
    made = mergebench.mergebench_of(
        command.parser().parse_args(["mergebench", "--revisions", str(file), "--device", "cpu"])
    )
    assert made.base == f"{mergebench.BASE}@{OLD}" and made.adapters["REC"].endswith(f"_REC@{NEW}") and not made.remarks
    assert made.adapters["VQAv2"] == "AuroraZengfh/LLaVA_7B_lora_r16_VQAv2"


def test_the_next_run_stays_at_the_commits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that goes on after the Hub has moved is of the same models, or its answers would be asked again; a revision that is given
    counts."""
    newest, seen = [OLD], list[MergeBench]()

    def resolved(place: str) -> str:
        name, revision = parts(place)
        return f"{name}@{newest[0] if revision in (None, 'main') else revision}"

    def ended(self: MergeBench, out: Path | None) -> None:
        seen.append(self)
        raise KeyboardInterrupt

    monkeypatch.setattr(mergebench, "at_commit", resolved)
    monkeypatch.setattr(MergeBench, "plan", lambda self: SimpleNamespace(check=lambda: None))
    monkeypatch.setattr(MergeBench, "_measured", ended)
    for commit, base in ((OLD, "org/base"), (NEW, "org/base"), (NEW, "org/base@main"), (NEW, "org/base")):
        newest[0] = commit
        with pytest.raises(KeyboardInterrupt):
            MergeBench(base, tmp_path, tmp_path, {"VQAv2": "org/a"}, (), tmp_path).measure(None)
    assert [run.base.partition("@")[2] for run in seen] == [OLD, OLD, NEW, NEW]
    assert {run.adapters["VQAv2"] for run in seen} == {f"org/a@{OLD}"}

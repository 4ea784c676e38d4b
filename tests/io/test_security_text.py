"""Names from strangers in cards, reports and on the terminal: they stay text."""

from __future__ import annotations

import html
import io
import json
import logging
import re
import time
from pathlib import Path

import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from dc_merge_peft import DCMergeAdapter, MergeError
from dc_merge_peft.cli import app
from dc_merge_peft.outputs.markdown import code, fenced, text
from dc_merge_peft.sources.base_model import load_base
from tests.support import models
from tests.support.hub_adapters import merge
from tests.support.models import factors, write_checkpoint

HOSTILE = [
    "a|b", "`rm -rf`", "``` x", "[x](http:evil)", "![x](http:evil)", "<script>alert(1)</script>", "<!-- x", "<img src=x>",
    "&lt;b&gt;", "&#x3c;script&#x3e;", "**b**", "__b__", "~~s~~", "# h", "> q", "- l", "1. l", "---", "$$x$$", "\\(x\\)",
    "https://evil.example/x", "www.evil.example", "me@evil.example", "@someone", "{title}", "{0}", "%s", "\\", "\\|",
    "x: y", "- [x]", "[^1]", "[x]: http:evil", "a\u202eb", "a\u200bb", "a\x1b[31mb", "a\x1b]0;t\x07b", "a\x9b2Jb", "é 漢字",
]  # fmt: skip
TAGS = {"h1", "h2", "p", "strong", "a", "code", "pre", "table", "thead", "tbody", "tr", "th", "td", "blockquote"}


def rendered(markdown: str) -> str:
    """HTML by a CommonMark renderer with tables, raw HTML let through as the Hub might."""
    return MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"]).render(markdown)


def visible(page: str) -> str:
    """What a reader sees."""
    return html.unescape(re.sub(r"<[^>]*>", "", page))


@pytest.mark.parametrize("name", HOSTILE)
def test_text_is_what_is_seen(name: str) -> None:
    """In a table cell, in running text and in a quotation the reader sees the name, and no tag comes of it."""
    shown = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in name)
    row = rendered(f"| a | b |\n|---|---|\n| {text(name)} | x |")
    assert row.count("<td>") == 2 and visible(row.split("<td>")[1].split("</td>")[0]) == shown
    for frame in ("before {} after", "> {}", "- x {}"):
        page = rendered(frame.replace("{}", text(name)))
        assert shown in visible(page) and set(re.findall(r"<(\w+)", page)) <= {"p", "blockquote", "ul", "li"}
    # GitHub's dialect makes links of bare addresses and mentions; an escaped sign stops that.
    assert not re.search(r"(?<!\\)(?:://|@)|www\.", text(name))
    assert not re.search(r"[`\"|\\\n]", code(name)) and code(name).isprintable()
    block = rendered(fenced(name, "yaml"))
    assert block.count("<pre>") == 1 and visible(block).strip() == name.strip()


@pytest.mark.parametrize("name", HOSTILE)
def test_names_in_a_card(tmp_path: Path, name: str) -> None:
    """Adapter, module, base model and target names at once: the card has the tags that it has for plain names."""
    tensors = {f"{name}.q.lora_{f}.weight": value for f, value in zip("AB", factors(6, 5, 2), strict=True)}
    fields = {
        "base_model_name_or_path": name,
        "task_type": name,
        "target_modules": ["q", f"{name} lost"],
        "revision": name,
    }
    folders = [write_checkpoint(tmp_path / prefix / name.replace("/", "_"), tensors, **fields) for prefix in "xy"]
    with pytest.warns(UserWarning, match="lost"):
        out = merge(*folders).save_pretrained(tmp_path / "out")
    card = ModelCard.load(out / "README.md")
    assert set(card.data.to_dict()) == {"library_name", "tags"}
    page = rendered(card.text)
    assert set(re.findall(r"<(\w+)", page)) <= TAGS
    assert page.count("<td>") == 2 * 2 + 5 and page.count("<h2>") == 3 and page.count("<pre>") == 2
    assert all(
        link.startswith(("https://arxiv.org/", "https://github.com/")) for link in re.findall(r'href="([^"]*)"', page)
    )
    block = visible(page.split('<code class="language-yaml">')[1].split("</code>")[0])
    assert block.isascii() or all(line.isprintable() for line in block.splitlines())
    assert yaml.safe_load(block) == yaml.safe_load((out / "dc_merge.yaml").read_text(encoding="utf-8"))
    snippet = visible(page.split('<code class="language-python">')[1].split("</code>")[0])
    compile(snippet, "card", "exec")


@pytest.mark.parametrize("arguments", [[], ["--dry-run"], ["--json"], ["--dry-run", "--json"]], ids=" ".join)
@pytest.mark.parametrize("name", HOSTILE)
def test_names_on_the_terminal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, arguments: list[str]
) -> None:
    """Summary, notes, plan and JSON: no control character but line ends, no markup taken for styles."""
    monkeypatch.chdir(tmp_path)
    name = f"{name}[red]x[/red][link=file:x]"
    tensors = {f"{name}.lora_{f}.weight": value for f, value in zip("AB", factors(6, 5, 2), strict=True)}
    fields = {"base_model_name_or_path": name, "target_modules": [name, "lost"]}
    folders = [write_checkpoint(tmp_path / prefix / name.replace("/", "_"), tensors, **fields) for prefix in "xy"]
    result = CliRunner().invoke(app, ["merge", *map(str, folders), "-o", "out", "-m", "ta", *arguments])
    assert result.exit_code == 0, result.output
    output = result.output
    assert all(c.isprintable() or c == "\n" for c in output) and "[red]" in output
    if "--json" in arguments:
        rows = json.loads(output)["sources" if "--dry-run" in arguments else "modules"]
        assert name in (rows[0].get("base_model"), rows[0].get("module"))


@pytest.mark.filterwarnings("ignore:.*config does not target")
@pytest.mark.parametrize("name", ["a\x1b[31mb", "[red]x[/red]", "a\u202eb", "[link=file:x]"])
def test_names_in_an_inspection(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Tables, their titles and findings of ``dc-merge inspect``."""
    monkeypatch.chdir(tmp_path)
    tensors = {f"{name}.lora_{f}.weight": value for f, value in zip("AB", factors(6, 5, 2), strict=True)}
    name = name.replace("/", "_")
    fields = {"base_model_name_or_path": name, "target_modules": [name, "lost"]}
    folders = [write_checkpoint(tmp_path / prefix / name, tensors, **fields) for prefix in "xy"]
    with pytest.warns(UserWarning, match="lost"):
        merge(*folders).save_pretrained(tmp_path / f"out {name}")
    result = CliRunner().invoke(app, ["inspect", *map(str, folders), "--merged", str(tmp_path / f"out {name}")])
    assert result.exit_code == 0, result.output
    assert all(c.isprintable() or c == "\n" for c in result.output)
    assert "".join(c if c.isprintable() else ascii(c)[1:-1] for c in f"out {name}") in result.output


@pytest.mark.parametrize("name", ["a\x1b[31mb", "a\x1b]0;t\x07b", "a\x9b2Jb", "a\u202eb", "a\nb", "a\rb", "\ud800"])
def test_errors_on_the_terminal(tmp_path: Path, name: str) -> None:
    """In Python and in the program: one printable line."""
    folder = write_checkpoint(tmp_path / "task", peft_type=name)
    with pytest.raises(MergeError) as caught:
        DCMergeAdapter().merge([folder])
    assert str(caught.value).isprintable()
    result = CliRunner().invoke(app, ["merge", str(folder), "-o", str(tmp_path / "out")])
    assert result.exit_code == 2 and result.stderr.rstrip("\n").isprintable()


def test_long_errors_keep_their_end(tmp_path: Path) -> None:
    """The end of an error says what to do; a name of a megabyte must not push it away."""
    with pytest.raises(MergeError) as caught:
        DCMergeAdapter().merge([write_checkpoint(tmp_path / "task", peft_type="x" * 1_000_000)])
    found = str(caught.value)
    assert len(found) < 2100 and found.startswith("adapter 'task' has peft_type xxx") and found.endswith("into LoRA")


@pytest.mark.parametrize("part", ["a.", "a://b", "hf_jwt_.", "Bearer "])
def test_long_names_take_no_time(tmp_path: Path, part: str) -> None:
    """Looking for secrets in what a config says, which goes into errors and outputs, takes no longer than reading it."""
    start = time.perf_counter()
    merge(write_checkpoint(tmp_path / "one", base_model_name_or_path=part * 100_000))
    with pytest.raises(MergeError):
        merge(write_checkpoint(tmp_path / "two", peft_type=part * 100_000))
    assert time.perf_counter() - start < 10


def test_tensors_of_a_base_model_in_a_log(tmp_path: Path) -> None:
    """transformers says on the terminal which tensors it has no use for."""
    models.bert().save_pretrained(tmp_path)
    name = "a\x1b[31mb\x1b]0;t\x07\u202ec"
    tensors = {**load_file(tmp_path / "model.safetensors"), name: torch.zeros(2)}
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    stream, shown = io.StringIO(), logging.getLogger("transformers").handlers[0]
    before = shown.setStream(stream)  # type: ignore[attr-defined]
    try:
        load_base(tmp_path)
    finally:
        shown.setStream(before)  # type: ignore[attr-defined]
    assert "b\\x1b]0;t\\x07\\u202ec" in stream.getvalue()
    assert all(c.isprintable() or c == "\n" for c in stream.getvalue())

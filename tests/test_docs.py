"""Every example in the README and the docs runs, offline; every number there comes from the saved results."""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import sys
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

import dc_merge_peft
from dc_merge_peft.cli import app
from dc_merge_peft.methods import EVERY_METHOD
from dc_merge_peft.runconfig import RunConfig
from tests.support.llava import make_llava_workspace
from tests.support.program import run
from tests.support.versions import needs_safe_pickles, needs_v5
from tests.support.workspace import make_data_workspace, make_full_workspace, make_tune_workspace, make_workspace

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def blocks(page: Path, language: str) -> list[str]:
    """The fenced blocks of one language."""
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


# Pages whose examples assume other files.
WORKSPACES = {
    "llava.md": make_llava_workspace,
    "regmean.md": make_data_workspace,
    "merge-full.md": make_full_workspace,
    "tune.md": make_tune_workspace,
}
# Those whose examples older versions of the dependencies refuse.
NEEDS = {"llava.md": needs_safe_pickles, "merge-full.md": needs_v5}
SEARCH_SPACE = "# space.yaml\n"  # how a YAML block begins that is no configuration


@pytest.fixture
def workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Path:
    """The folder that the page's examples assume."""
    make = WORKSPACES.get(request.node.callspec.params["page"].name, make_workspace)
    monkeypatch.chdir(make(tmp_path))
    # An example's ``python`` is this one.
    monkeypatch.setenv("PATH", os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
    return tmp_path


def with_blocks(language: str) -> list[Any]:
    """The pages that have such blocks, so that no page counts as tested that has none. The page on the Hub has a test with
    a Hub: tests/io/test_hub_docs.py."""
    return [
        pytest.param(page, marks=NEEDS.get(page.name, ()))
        for page in PAGES
        if blocks(page, language) and page.name != "hub.md"
    ]


@pytest.mark.filterwarnings("ignore:kept outside B and A")  # where an example asks for it
@pytest.mark.parametrize("page", with_blocks("python"), ids=lambda page: page.name)
def test_python_blocks_run(page: Path, workspace: Path) -> None:
    """All Python blocks of a page, one after the other, in one namespace."""
    namespace: dict[str, object] = {}
    for block in blocks(page, "python"):
        exec(compile(block, str(page), "exec"), namespace)


@pytest.mark.parametrize("page", with_blocks("console"), ids=lambda page: page.name)
def test_shell_lines_run(page: Path, workspace: Path) -> None:
    """Every ``dc-merge`` line of a page but the demo, which has its own test; other programs are ``make`` targets."""
    targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    for block in blocks(page, "yaml"):
        if block.startswith(SEARCH_SPACE):
            Path("space.yaml").write_text(block)
    for line in filter(None, "\n".join(blocks(page, "console")).splitlines()):
        program, *arguments = shlex.split(line.removeprefix("$ "), comments=True)
        if program == "make":
            assert arguments[0] in targets
        else:
            assert program == "dc-merge"
            if arguments[0] != "demo":
                result = CliRunner().invoke(app, arguments, catch_exceptions=False)
                assert result.exit_code == 0, result.output


@pytest.mark.parametrize("page", with_blocks("yaml"), ids=lambda page: page.name)
def test_yaml_blocks_are_configurations(page: Path, workspace: Path) -> None:
    """Every YAML block is a configuration that merges, or a search space that can be searched."""
    for index, block in enumerate(blocks(page, "yaml")):
        assert yaml.safe_load(block)
        if block.startswith(SEARCH_SPACE):
            Path("space.yaml").write_text(block)
            planned = run("tune", "math-lora", "code-lora", "--space", "space.yaml", "--dry-run")
            assert planned.exit_code == 0, planned.output
            continue
        Path("run.yaml").write_text(block)
        assert RunConfig.read("run.yaml").adapters
        result = CliRunner().invoke(
            app, ["merge", "--config", "run.yaml", "-o", f"yaml-{index}"], catch_exceptions=False
        )
        assert result.exit_code == 0, result.output


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    """Relative links point at files of the repository."""
    for target in re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), target


def example(name: str) -> ModuleType:
    """A program of ``examples/`` as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / f"examples/{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_demo_numbers_are_the_saved_ones() -> None:
    """The tables in README and docs are what the program writes from the saved results."""
    module = example("readme_table")
    for page, picture in module.PAGES.items():
        text = page.read_text(encoding="utf-8")
        assert "| individual adapters |" in text
        assert module.rendered(page, picture) == text


@pytest.mark.parametrize("name", ["merge", "inspect", "report", "tune"])
def test_cli_page_names_every_flag(name: str) -> None:
    """The command's section of docs/cli.md has every flag."""
    import typer

    page = (
        (ROOT / "docs/cli.md").read_text(encoding="utf-8").partition(f"## `dc-merge {name}`")[2].partition("\n## ")[0]
    )
    command = typer.main.get_command(app).commands[name]  # type: ignore[attr-defined]
    for parameter in command.params:
        if parameter.param_type_name == "option" and parameter.name != "help":
            assert any(f"`{flag}`" in page or f"{flag}`" in page or f"`{flag} " in page for flag in parameter.opts), (
                parameter
            )


def test_every_method_has_its_page() -> None:
    """docs/methods has one page a method, with the options and their defaults as the code has them, and a list of all."""
    module = example("method_pages")
    for page, text in module.pages().items():
        assert page.read_text(encoding="utf-8") == text, "run python examples/method_pages.py"
    assert {page.stem for page in (ROOT / "docs/methods").glob("*.md")} == {*EVERY_METHOD, "index"}


def test_every_page_is_in_the_navigation() -> None:
    """No page of docs that a reader of the site can't find, and none twice."""

    def pages(entry: object) -> list[str]:
        if isinstance(entry, str):
            return [entry]
        entries = entry.values() if isinstance(entry, dict) else entry
        assert isinstance(entries, Iterable)
        return [page for part in entries for page in pages(part)]

    named = pages(yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"])
    assert sorted(named) == sorted(path.relative_to(ROOT / "docs").as_posix() for path in (ROOT / "docs").rglob("*.md"))


def undocumented(module: ModuleType, documented: set[str]) -> list[str]:
    """The public names of a module that are on no page: neither they nor, for classes and functions, the module they are from."""
    missing = []
    for name in module.__all__:
        thing = getattr(module, name)
        home = getattr(thing, "__module__", None)  # a value has none
        places = {f"{module.__name__}.{name}", f"{home}.{name}", home}
        if not places & documented:
            missing.append(name)
    return missing


def test_every_public_name_is_documented() -> None:
    """Whatever ``import dc_merge_peft`` offers has its reference on some page of the site, and so has every measure."""
    named = {
        path for page in PAGES for path in re.findall(r"^::: (\S+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    }
    assert undocumented(dc_merge_peft, named) == []
    assert undocumented(dc_merge_peft.metrics, named) == []
    assert undocumented(
        dc_merge_peft,
        named - {"dc_merge_peft.errors", "dc_merge_peft.tune", "dc_merge_peft.METHODS", "dc_merge_peft.DATA_METHODS"},
    ) == [
        name
        for name in dc_merge_peft.__all__
        if name in {"DATA_METHODS", "METHODS", "tune"} or name.endswith(("Error", "Warning"))
    ]


def test_every_answer_leads_on() -> None:
    """Each answer among the questions links to a page with more, and a thread that is cited is named as its link is."""
    text = (ROOT / "docs/faq.md").read_text(encoding="utf-8")
    answers = re.split(r"^### ", text, flags=re.MULTILINE)[1:]
    assert [answer.splitlines()[0] for answer in answers if not re.search(r"\]\([\w/-]+\.md", answer)] == []
    threads = re.findall(r"\[([^\]]+) (\d+)\]\(https://github\.com/[\w-]+/([\w.-]+)/(?:issues|pull)/(\d+)\)", text)
    assert len(threads) > 50 and text.count("https://github.com/") == len(threads)
    for name, number, repository, linked in threads:
        assert number == linked and name.lower().replace("-", "") == repository.lower().replace("-", "")


def test_oldest_versions_are_those_of_the_package() -> None:
    """The table of versions says what pyproject.toml asks for."""
    page = (ROOT / "docs/support.md").read_text(encoding="utf-8")
    rows = [row.split("|")[1:3] for row in page.partition("| | oldest |")[2].splitlines() if row.startswith("| ")]
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert len(rows) == 7
    for name, oldest in ((name.strip(), oldest.strip().split(";")[0]) for name, oldest in rows):
        asked = f'requires-python = ">={oldest}"' if name == "Python" else f'"{name}>={oldest}"'
        assert asked in project, asked

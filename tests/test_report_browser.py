"""The page in a real browser, where one is found: it loads nothing, says nothing, and fits phones and screens, light and dark."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from dc_merge_peft import DCMergeAdapter
from dc_merge_peft.report.page import page

from .support.browser import Browser, browser, find_browser
from .support.pages import HOSTILE, made_up
from .support.workspace import ADAPTERS, make_workspace

PROGRAM = find_browser()
needs_browser = pytest.mark.skipif(
    PROGRAM is None,
    reason="no Chromium is installed: apt install chromium-headless-shell, or name one in DC_MERGE_BROWSER",
)
# Widths of a small phone and of a screen, each on light and dark.
SCREENS = [(360, False), (360, True), (1280, False), (1280, True)]


@dataclass(frozen=True)
class Shown:
    """A page in a file, and the cells of its first heat map."""

    file: Path
    rows: int
    columns: int


@pytest.fixture(scope="module")
def tab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    """One browser for all pages."""
    assert PROGRAM is not None
    with browser(PROGRAM, tmp_path_factory.mktemp("profile")) as opened:
        yield opened


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Shown]:
    """A real merge, one adapter, very many, and names that want to be markup."""
    folder = tmp_path_factory.mktemp("pages")
    make_workspace(folder, base=False)
    merged = DCMergeAdapter().merge([folder / name for name in ADAPTERS], svd_rank=6, progress=False)
    many = [f"organisation/adapter-for-task-number-{index}" for index in range(64)]
    made = {
        "one": (made_up(["only"], 1), 1),
        "many": (made_up(many, 80, rank=64, findings=20), 80),
        "hostile": (made_up(HOSTILE, 3), 3),
    }
    found = {"real": Shown(merged.save_report(folder / "real.html", progress=False), 2, 2)}
    for name, (report, layers) in made.items():
        file = folder / f"{name}.html"
        file.write_text(page(report), encoding="utf-8")
        found[name] = Shown(file, layers, len(report.before.adapters))
    return found


@needs_browser
@pytest.mark.parametrize("name", ["real", "one", "many", "hostile"])
def test_page_is_quiet_and_fits(tab: Browser, pages: dict[str, Shown], name: str) -> None:
    """On every screen: no message on the console, no request but for the page, no sideways scrolling of it, every cell of the
    heat map there and visible, and the colours that the system asks for."""
    shown = pages[name]
    backgrounds = {}
    for width, dark in SCREENS:
        tab.open(shown.file, width=width, dark=dark)
        said = [
            e
            for e in tab.events
            if e["method"] in ("Log.entryAdded", "Runtime.consoleAPICalled", "Runtime.exceptionThrown")
        ]
        assert said == []
        asked = [e["params"]["request"]["url"] for e in tab.events if e["method"] == "Network.requestWillBeSent"]
        assert asked == [shown.file.as_uri()]
        assert tab.value("innerWidth") == width
        assert tab.value("document.documentElement.scrollWidth") <= width, f"{name} is too wide at {width}"
        assert tab.value(WIDER_THAN_THE_SCREEN) == []
        assert tab.value("document.querySelectorAll('#dirsim tbody td').length") == shown.rows * shown.columns
        assert tab.value("document.querySelectorAll('#dirsim tbody tr').length") == shown.rows
        assert tab.value(CELL_HEIGHT) > 15
        backgrounds[dark] = tab.value("getComputedStyle(document.body).backgroundColor")
    assert backgrounds == {False: "rgb(255, 255, 255)", True: "rgb(16, 21, 26)"}


# Elements whose right edge lies beyond the screen though no box around them scrolls.
WIDER_THAN_THE_SCREEN = """
[...document.querySelectorAll('body *')].filter(e => !e.closest('.scroll, pre, legend') &&
  e.getBoundingClientRect().right > innerWidth + 1).map(e => e.outerHTML.slice(0, 200))
"""
CELL_HEIGHT = "document.querySelector('#dirsim tbody td').getBoundingClientRect().height"


@needs_browser
def test_wide_maps_scroll_in_their_own_box(tab: Browser, pages: dict[str, Shown]) -> None:
    """64 columns are wider than a phone: the box scrolls, by the keyboard too, and the layers' names stay in sight."""
    tab.open(pages["many"].file, width=360)
    assert tab.value("document.querySelector('#dirsim .scroll').scrollWidth") > 1000
    left = "document.querySelector('#dirsim tbody th').getBoundingClientRect().left"
    before = tab.value(left)
    tab.value("document.querySelector('#dirsim .scroll').scrollLeft = 500")
    assert tab.value("document.querySelector('#dirsim .scroll').scrollLeft") == 500
    assert tab.value(left) == pytest.approx(before, abs=2)
    assert tab.value("document.querySelector('#dirsim .scroll').tabIndex") == 0


@needs_browser
def test_the_reader_chooses_the_colours(tab: Browser, pages: dict[str, Shown]) -> None:
    """Light and dark by the buttons, whatever the system wants, in the cells too; back to the system's by the first one."""
    background = "getComputedStyle(document.body).backgroundColor"
    cell = "getComputedStyle(document.querySelector('#dirsim tbody td')).backgroundColor"
    for dark in (False, True):
        tab.open(pages["real"].file, width=1280, dark=dark)
        found = {}
        for choice in ("light", "dark", "auto"):
            tab.value(f"document.getElementById('{choice}').click()")
            found[choice] = (tab.value(background), tab.value(cell))
        assert found["light"][0] == "rgb(255, 255, 255)" and found["dark"][0] == "rgb(16, 21, 26)"
        assert found["light"][1] != found["dark"][1] and found["auto"] == found["dark" if dark else "light"]


@needs_browser
def test_hostile_names_run_nothing(tab: Browser, pages: dict[str, Shown]) -> None:
    """A name that is a script is shown as it is, and is none."""
    tab.open(pages["hostile"].file, width=1280)
    assert tab.value("document.scripts.length + document.images.length") == 0
    assert "<script>alert(1)</script>" in tab.value("document.body.innerText")

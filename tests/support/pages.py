"""A page of HTML as a tree, refused where it is not well-formed; and reports of merges that nobody has to compute."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from html.parser import HTMLParser
from typing import Any

from dc_merge_peft.inspection.data import (
    AdapterReport,
    Finding,
    Kept,
    MergedSpectrum,
    ModuleSpectrum,
    PairNumbers,
    PairReport,
)
from dc_merge_peft.inspection.outcome import Inspection, MergeInspection
from dc_merge_peft.report.data import MergeReport
from dc_merge_peft.sources.base import AdapterInfo

VOID = {"meta", "input", "br", "img", "col", "link", "hr"}
KINDS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass
class Node:
    """An element."""

    name: str
    attributes: dict[str, str | None]
    children: list[Node | str] = field(default_factory=list)

    @property
    def text(self) -> str:
        """All of it, as a reader sees it."""
        return "".join(child if isinstance(child, str) else child.text for child in self.children)

    def walk(self) -> Iterator[Node]:
        """It and every element inside."""
        yield self
        for child in self.children:
            if isinstance(child, Node):
                yield from child.walk()

    def all(self, name: str, /, **attributes: str) -> list[Node]:
        """Elements of a name that have these attributes, with ``_`` for ``-``."""
        wanted = {key.rstrip("_").replace("_", "-"): value for key, value in attributes.items()}
        return [
            node
            for node in self.walk()
            if node.name == name and all(node.attributes.get(key) == value for key, value in wanted.items())
        ]

    def one(self, name: str, /, **attributes: str) -> Node:
        """The only one."""
        (found,) = self.all(name, **attributes)
        return found

    def cells(self) -> list[list[str]]:
        """The rows of a table's body, or of the table in this element."""
        return [[cell.text for cell in row.walk() if cell.name in ("td", "th")] for row in self.one("tbody").all("tr")]


class _Strict(HTMLParser):
    """Every element is closed where it has to be, no attribute stands twice, nothing is left over."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.root = Node("", {})
        self.open = [self.root]

    def handle_starttag(self, tag: str, attrs: Sequence[tuple[str, str | None]]) -> None:
        assert len(dict(attrs)) == len(attrs), f"an attribute of <{tag}> stands twice"
        node = Node(tag, dict(attrs))
        self.open[-1].children.append(node)
        if tag not in VOID:
            self.open.append(node)

    def handle_endtag(self, tag: str) -> None:
        assert tag not in VOID and self.open[-1].name == tag, f"</{tag}> closes <{self.open[-1].name}>"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        self.open[-1].children.append(data)

    def handle_comment(self, data: str) -> None:
        raise AssertionError(f"a comment: {data[:80]}")

    def unknown_decl(self, data: str) -> None:
        raise AssertionError(f"a declaration: {data[:80]}")


def parsed(text: str) -> Node:
    """The root element of a well-formed page."""
    assert text.startswith("<!DOCTYPE html>\n")
    parser = _Strict()
    parser.feed(text)
    parser.close()
    assert parser.open == [parser.root], f"<{parser.open[-1].name}> is not closed"
    (root,) = [child for child in parser.root.children if isinstance(child, Node)]
    return root


def made_up(names: Sequence[str], layers: int, *, rank: int = 4, kinds: int = 7, findings: int = 0) -> MergeReport:
    """A report whose numbers say which module and adapter they are of; made of values alone, in no time."""
    modules = [f"model.layers.{layer}.self_attn.{kind}" for layer in range(layers) for kind in KINDS[:kinds]]
    S = tuple(2.0 * 0.7**index for index in range(rank))
    common: dict[str, Any] = {"shape": (64, 48), "layer_type": "linear", "scaling": 1.0, "S": S, "effective_rank": 2.5}
    adapters = tuple(
        AdapterReport(
            info=AdapterInfo(name, f"runs/{name}"), peft_type="LORA", config_ranks=(rank,), rslora=False, patterns=(),
            target_modules=KINDS, dtype="float16", modules={m: ModuleSpectrum(rank=rank, **common) for m in modules},
        )
        for name in names
    )  # fmt: skip
    pairs = tuple(
        PairReport(
            first=i, second=j, modules={},
            overall=PairNumbers(
                cos_sim=(i - j) / 100, dir_sim=0.1, left_overlap=0.2, right_overlap=0.3, sign_conflict=(i + j) / 200
            ),
        )
        for i, j in itertools.combinations(range(len(names)), 2)
    )  # fmt: skip

    def kept(place: int, index: int) -> Kept:
        value = (place + 1) / (len(modules) + 1) * (index + 1) / len(names)
        return Kept(projected_dir_sim=value, projected_cos_sim=value, retained_energy=1.0, strength=0.5)

    rows = {
        module: {name: kept(place, index) for index, name in enumerate(names)} for place, module in enumerate(modules)
    }
    merged = MergedSpectrum(rank=rank, full_rank=2 * rank, truncation_error=0.25, **common)
    return MergeReport(
        before=Inspection(adapters=adapters, pairs=pairs, cover={}, findings=()),
        after=MergeInspection(
            merged="dc", adapters=tuple(names), overall={name: kept(0, i) for i, name in enumerate(names)}, modules=rows,
            findings=tuple(Finding("warning", (), f"trouble {index} " + "of some length " * 9) for index in range(findings)),
            spectra=dict.fromkeys(modules, merged),
        ),
        record={
            "adapters": [f"runs/{name}" for name in names], "method": "dc", "options": {"alpha": "auto"},
            "record": {"alpha": 1.25, "truncation_error": 0.25},
        },
        weights=(1.0,) * len(names),
    )  # fmt: skip


# The sections of a page, by id.
SECTIONS = {
    "findings": "Findings",
    "sources": "Sources",
    "kept": "What is kept of each adapter",
    "spectra": "Singular values before and after",
    "overlap": "How the adapters lie to each other",
    "truncation": "Truncation error",
    "configuration": "Configuration",
}

HOSTILE = (
    "<script>alert(1)</script>",
    "\"'><img src=x onerror=alert(1)>",
    "</style></title></table><b>&lt;",
    "\N{RIGHT-TO-LEFT OVERRIDE}txt.exe\x1b[31m\n\x00",
    "\udc80surrogate",
    "javascript:alert(1)",
    "org/" + "a-very-long-name-" * 300,
    "",
)


def checked(text: str) -> Node:
    """A report's page as a tree, with all that holds of every one: nothing from elsewhere, no script, names for those who hear it."""
    root = parsed(text)
    assert root.attributes["lang"] == "en"
    assert root.one("meta", name="viewport").attributes["content"] == "width=device-width, initial-scale=1"
    assert "default-src 'none'" in (root.one("meta", http_equiv="Content-Security-Policy").attributes["content"] or "")
    names = {node.name for node in root.walk()}
    assert not names & {
        "script",
        "link",
        "img",
        "iframe",
        "object",
        "embed",
        "base",
        "form",
        "image",
        "use",
        "foreignobject",
    }
    for node in root.walk():
        assert not [
            key for key in node.attributes if key.startswith("on") or key in ("src", "srcset", "style", "xlink:href")
        ]
        if node.name == "a":
            assert (node.attributes["href"] or "").startswith(("#", "https://"))
        if node.name == "th":
            assert node.attributes["scope"] in ("col", "row")
        if node.name in ("svg", "table", "pre"):
            assert node.attributes.get("aria-label") or node.attributes.get("aria-hidden") == "true"
    style = root.one("style").text
    assert not [word for word in ("url(", "@import", "@font-face", "http") if word in style]
    ids = [node.attributes["id"] for node in root.walk() if node.attributes.get("id")]
    assert len(ids) == len(set(ids))
    targets = [link.attributes["href"] for link in root.one("nav").all("a")]
    assert targets == [f"#{section.attributes['id']}" for section in root.all("section")]
    assert all(section.attributes["aria-labelledby"] in ids for section in root.all("section"))
    headings = [node.name for node in root.walk() if node.name in ("h1", "h2", "h3")]
    assert headings[0] == "h1" and set(headings[1:]) == {"h2"}
    return root

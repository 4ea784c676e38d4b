"""The parts of the page below its head: one function a section, values in, markup out."""

from __future__ import annotations

from collections.abc import Sequence

from dc_merge_peft.errors import message
from dc_merge_peft.inspection.data import AdapterReport
from dc_merge_peft.inspection.summary import by_kind, group_means
from dc_merge_peft.inspection.tables import kept_table
from dc_merge_peft.markup import Child, Html, element
from dc_merge_peft.outputs.card_facts import HUB, hub_page
from dc_merge_peft.outputs.public import is_hub_id
from dc_merge_peft.outputs.rows import from_to
from dc_merge_peft.report.data import MergeReport
from dc_merge_peft.report.heat import heat_map
from dc_merge_peft.report.numbers import largest, layers_by_adapter, pair_matrix
from dc_merge_peft.report.tables import clipped, data_table
from dc_merge_peft.runconfig import printable_yaml

# Of findings and of the configuration; more would bury the rest.
MOST_FINDINGS, MOST_TEXT = 100, 60_000
# Columns of heat maps that have room beside each other.
SIDE_BY_SIDE = 12

UNKNOWN = "\N{EN DASH}"
_LEVELS = {"refused": "overruled", "warning": "warning", "note": "note"}


def section(name: str, title: str, *content: Child) -> Html:
    """One part, which the navigation leads to."""
    return element(
        "section", element("h2", title, id=f"{name}-title"), content, id=name, aria_labelledby=f"{name}-title"
    )


def what(*content: Child) -> Html:
    """A line that says how to read what follows."""
    return element("p", content, class_="what")


def findings(report: MergeReport) -> Html:
    """Warnings in words."""
    found = report.findings
    if not found:
        return section("findings", "Findings", element("p", "No trouble found."))
    items = [
        element(
            "li",
            element("b", _LEVELS[finding.level]),
            element("span", message(finding.text)),
            class_=_LEVELS[finding.level],
        )
        for finding in found[:MOST_FINDINGS]
    ]
    rest = len(found) - len(items)
    overruled = any(finding.level == "refused" for finding in found)
    return section(
        "findings",
        "Findings",
        what("Overruled is what merging stops at, unless an option allows it.") if overruled else None,
        element("ul", items, class_="findings"),
        what(f"And {rest} more: dc-merge inspect has them all.") if rest else None,
    )


def sources(report: MergeReport) -> Html:
    """What was merged."""
    columns = ("adapter", "from", "revision", "weight", "rank", "scaling", "dtype", "modules")
    weights = report.weights or [None] * len(report.before.adapters)
    rows = [_source(adapter, weight) for adapter, weight in zip(report.before.adapters, weights, strict=True)]
    bases = dict.fromkeys(adapter.info.base_model for adapter in report.before.adapters)
    return section(
        "sources",
        "Sources",
        element("p", "Base model: ", [(", " if index else "", _base(base)) for index, base in enumerate(bases)]),
        data_table("Sources", columns, rows, right=("weight", "rank", "scaling", "modules"), wide=("from",)),
    )


def _base(name: str | None) -> Child:
    if name is None:
        return "not named by the adapters"
    return element("a", name, href=f"{HUB}/{name}", rel="noreferrer") if is_hub_id(name) else clipped(name)


def _source(adapter: AdapterReport, weight: float | None) -> tuple[Child, ...]:
    info = adapter.info
    page, location = hub_page(info), clipped(info.location)
    return (
        adapter.name,
        element("a", location, href=page, rel="noreferrer") if page else element("span", location),
        element("code", info.revision[:12]) if info.revision else UNKNOWN,
        UNKNOWN if weight is None else f"{weight:g}",
        from_to(adapter.ranks, UNKNOWN),
        from_to([f"{scaling:.3g}" for scaling in adapter.scalings], UNKNOWN),
        adapter.dtype or UNKNOWN,
        len(adapter.modules) or UNKNOWN,
    )


def kept(report: MergeReport) -> Html:
    """What the merge keeps of each adapter: over all, by layer, by kind of module."""
    merge = report.after
    layers, kinds = layers_by_adapter(merge), group_means(merge, by_kind(merge))
    table = kept_table("the merge", merge.overall)
    return section(
        "kept",
        "What is kept of each adapter",
        what(
            "Projected DirSim: how much of an adapter's directions the merge keeps, weak ones included; 1 is all. The adapter "
            "with the lowest is the first to lose accuracy. Retained energy: the share of its squared singular values inside "
            "the merged delta's spaces. Strength: the factor at which it acts."
        ),
        data_table("What is kept of each adapter", table.columns, table.rows, right=table.right),
        element(
            "div",
            heat_map(
                "Projected DirSim by layer",
                layers,
                merge.adapters,
                id_="dirsim",
                note="Means over the layer's modules.",
            ),
            heat_map(
                "Projected DirSim by kind of module",
                kinds,
                merge.adapters,
                id_="dirsim-kinds",
                note="Means over layers.",
            ),
            class_=_maps(merge.adapters),
        ),
    )


def _maps(columns: Sequence[str]) -> str:
    """Heat maps side by side, unless they are wide."""
    return "maps wide" if len(columns) > SIDE_BY_SIDE else "maps"


def overlap(report: MergeReport) -> Html | None:
    """How every pair lies to each other; None where no two can be compared."""
    if not any(pair.overall for pair in report.before.pairs):
        return None
    names, maps = report.before.names, []
    for measure, title, note in (
        ("left_overlap", "Overlap of outputs", "Mean squared cosine between the column spaces."),
        ("right_overlap", "Overlap of inputs", "The same of the row spaces."),
        ("cos_sim", "CosSim", "Cosine of the two deltas, all shared modules end to end."),
        ("sign_conflict", "Sign conflict", "Share of the magnitude that cancels in a sum."),
    ):
        matrix = pair_matrix(report.before, measure)
        percent = measure != "cos_sim"
        name = f"overlap-{measure.replace('_', '-')}"
        maps.append(heat_map(title, matrix, names, limit=largest(matrix), percent=percent, note=note, id_=name))
    return section(
        "overlap",
        "How the adapters lie to each other",
        what("Before merging, over the modules that both have. The strongest colour is the largest number of its map."),
        element("div", maps, class_=_maps(names)),
    )


def configuration(report: MergeReport) -> Html:
    """Settings, as the file that merges again."""
    if not report.record:
        return section("configuration", "Configuration", element("p", "Not recorded beside the merged adapter."))
    text = printable_yaml(report.record)
    cut = len(text) > MOST_TEXT
    lines = [line for text_line in text[:MOST_TEXT].split("\n") for line in (text_line, Html("\n"))][:-1]
    return section(
        "configuration",
        "Configuration",
        what(
            "Saved as dc_merge.yaml; ",
            element("code", "dc-merge merge --config dc_merge.yaml -o OUT"),
            " merges again.",
        ),
        element("pre", element("code", lines), tabindex="0", role="region", aria_label="Configuration"),
        what("Only the beginning is shown.") if cut else None,
    )

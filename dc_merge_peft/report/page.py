"""The whole page: one file that needs no other one, runs no script and asks for nothing."""

from __future__ import annotations

import statistics

from dc_merge_peft.inspection.data import fixed
from dc_merge_peft.markup import Child, Html, element
from dc_merge_peft.methods import EVERY_METHOD
from dc_merge_peft.outputs.card_facts import versions
from dc_merge_peft.report import sections, spectra
from dc_merge_peft.report.data import MergeReport
from dc_merge_peft.report.style import style_sheet
from dc_merge_peft.report.tables import clipped

# Says what a file is, to those who would overwrite it.
MARK = '<meta name="generator" content="dc_merge_peft report">'
# Even if something slipped through, a browser would load and run nothing.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'"

_TITLES = {
    "findings": "Findings",
    "sources": "Sources",
    "kept": "What is kept",
    "spectra": "Singular values",
    "overlap": "Overlap",
    "truncation": "Truncation",
    "configuration": "Configuration",
}


def page(report: MergeReport) -> str:
    """A page of HTML 5, at most some two megabytes whatever was merged."""
    parts = {
        "findings": sections.findings(report),
        "sources": sections.sources(report),
        "kept": sections.kept(report),
        "spectra": spectra.spectra(report),
        "overlap": sections.overlap(report),
        "truncation": spectra.truncation(report),
        "configuration": sections.configuration(report),
    }
    shown = {name: part for name, part in parts.items() if part is not None}
    title = _title(report)
    head = element(
        "head",
        element("meta", charset="utf-8"),
        Html(MARK),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("meta", http_equiv="Content-Security-Policy", content=_POLICY),
        element("title", title),
        element("style", Html(style_sheet())),
    )
    body = element("body", _head(report, title, list(shown)), element("main", list(shown.values())), _foot())
    return f"<!DOCTYPE html>\n{element('html', head, body, lang='en')}\n"


def _title(report: MergeReport) -> str:
    count = len(report.before.adapters)
    return f"Merge of {count} adapter{'s' * (count != 1)}"


def _head(report: MergeReport, title: str, shown: list[str]) -> Html:
    links = [element("li", element("a", _TITLES[name], href=f"#{name}")) for name in shown]
    return element(
        "header",
        element("div", element("h1", title), _theme(), class_="top"),
        element("p", _lead(report), class_="lead"),
        _facts(report),
        element("nav", element("ul", links), aria_label="Sections"),
    )


def _lead(report: MergeReport) -> list[Child]:
    method = EVERY_METHOD.get(report.method or "")
    if method is None:
        return [f"{clipped(report.after.merged)}, and the adapters that it is compared with."]
    paper: Child = method.reference
    if method.link:
        paper = element("a", method.reference, href=method.link, rel="noreferrer")
    return ["One LoRA adapter in place of several, by ", element("strong", method.title), " (", paper, ")."]


def _facts(report: MergeReport) -> Html:
    """The merge in six numbers."""
    after = report.after
    # Of an adapter that is all zero nothing is kept.
    changing = {name for row in after.modules.values() for name in row}
    similarities = {name: kept.projected_dir_sim for name, kept in after.overall.items() if name in changing}
    lowest = min(similarities, key=lambda name: similarities[name], default=None)
    mean = fixed(statistics.fmean(similarities.values()), 3) if similarities else sections.UNKNOWN
    ranks = [module.rank for module in after.spectra.values()]
    warnings = sum(finding.level == "warning" for finding in report.findings)
    alpha, error, unknown = report.alpha, report.truncation_error, sections.UNKNOWN
    options = report.record.get("options")
    fitted = isinstance(options, dict) and options.get("alpha") == "auto"
    facts: list[tuple[str, str, str]] = [
        ("method", clipped(report.method or unknown, 40), ""),
        ("alpha", unknown if alpha is None else f"{alpha:.4g}", "fitted without data" if fitted else ""),
        ("modules", str(len(after.modules)), f"rank {max(ranks)} at most" if ranks else ""),
        ("mean projected DirSim", mean, f"lowest: {clipped(lowest, 40)}" if lowest is not None else ""),
        ("truncation error", unknown if error is None else f"{error:.2%}", ""),
        ("warnings", str(warnings), "in words below" if warnings else ""),
    ]
    return element(
        "dl",
        [
            element("div", element("dt", name), element("dd", value, element("small", more) if more else None))
            for name, value, more in facts
        ],
        class_="facts",
    )


def _theme() -> Html:
    """The choice of light or dark; the system's to begin with."""
    choices = [
        element(
            "label", element("input", type="radio", name="theme", id=name, checked=name == "auto" or None), name.title()
        )
        for name in ("auto", "light", "dark")
    ]
    return element("fieldset", element("legend", "Colours"), choices)


def _foot() -> Html:
    made = ", ".join(f"{name} {number}" for name, number in versions().items())
    return element(
        "footer", f"Made with {made}. The numbers are those of dc-merge inspect, which has each module's as JSON."
    )

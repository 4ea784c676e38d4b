"""``docs/benchmarks.md`` from the saved results alone: the same text from the same files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from accuracy.report import RULE_NAMES
from accuracy.results import RULES
from common.marks import rewritten

from everything.charts import ACROSS, KEPT, METHODS
from everything.drawn import figures_text
from everything.found import Found
from everything.tables import all_methods, alphas, beyond, costs, defaults, glance, losses
from everything.texts import (
    ALPHA_STUDY_TEXT,
    COST_TEXT,
    CURVES_TEXT,
    DEFAULTS_TEXT,
    DOTS_TEXT,
    HEADINGS,
    METHODS_TEXT,
    STUDY_TABLES_TEXT,
    STUDY_TEXT,
    alike_text,
    alpha_text,
    beyond_text,
    glance_text,
    losses_text,
)


def with_section(page: str, text: str) -> str:
    """A page with what is between its two marks made anew.

    Raises:
        ValueError: the page has no such marks.
    """
    return rewritten(page, "everything", text)


def section(
    found: Sequence[Found],
    figures: Mapping[str, Path],
    studied: Sequence[str] = (),
    alphas_studied: str = "",
    similar: Mapping[tuple[str, int, str], float] | None = None,
) -> str:
    """All tables, then what the figures say.

    Args:
        found: The benchmarks' results.
        figures: Folders of the figures and their numbers by benchmark.
        studied: Tables of rules that are no methods: one of all, and one a benchmark.
        alphas_studied: The table of rules for alpha without data; empty where there is none.
        similar: DirSim by benchmark, number of tasks and method, as far as it was measured.
    """
    parts = ["## At a glance", CURVES_TEXT, KEPT.markdown, glance_text(found)]
    for rule in reversed(RULES):
        parts += [f"### {HEADINGS[rule]}", glance(found, rule)]
    if METHODS.lines(found):
        parts += [f"### Every method with {ACROSS} tasks", DOTS_TEXT, METHODS.markdown]
    for kind, title in (("adapter", "LoRA adapters (Table 1)"), ("model", "Models fine-tuned in full (Table 2)")):
        if these := [one for one in found if one.kind == kind]:
            parts += [f"## {title}", METHODS_TEXT, alike_text(these)]
            for one in these:
                for rule in RULES:
                    parts += [f"### {one.name}, {RULE_NAMES[rule]}", all_methods(one, rule)]
    parts += ["## Against each published method", losses_text(found), losses(found, similar or {})]
    parts += ["## Alpha without data", alpha_text(found), alphas(found)]
    if alphas_studied:
        parts += [ALPHA_STUDY_TEXT, alphas_studied]
    parts += ["## The defaults of DC-Merge", DEFAULTS_TEXT]
    for rule in RULES:
        parts += [f"### Options, {RULE_NAMES[rule]}", defaults(found, rule)]
    if studied:
        parts += ["## Beyond the paper", STUDY_TEXT, beyond_text(found), beyond(found), STUDY_TABLES_TEXT, *studied]
    if cost := costs(found):
        parts += ["## What it costs to make", COST_TEXT, cost]
    parts += ["## The tables of each benchmark", pages(found)]
    if figures:
        parts += ["## The paper's figures", figures_text(figures)]
    return "\n\n".join(part for part in parts if part)


def pages(found: Sequence[Found]) -> str:
    """Links."""
    return "\n".join(
        f"- [{one.name}]({one.name}.md): {len(one.data['tasks'])} tasks, {one.kind}s; energy smoothing (Tables 4 and 8), mask (5), smoothing by cover "
        f"space (6){', unseen tasks (11)' if one.data['unseen'] else ''}; numbers as [CSV]({one.name}/results.csv) and [JSON]({one.name}/results.json)"
        for one in found
    )

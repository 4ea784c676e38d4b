"""``docs/benchmarks.md`` from the saved results alone: the same text from the same files."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from accuracy.report import RULE_NAMES, against, bounds, percent
from accuracy.results import REFERENCE, RULES
from common.tables import markdown as table

from everything.drawn import dir_sims, figures_text
from everything.found import Found, ahead, value

GOAL = 0.005  # what alpha without data may lose
NEW = "rzf"  # what came out of the study of rules
OPTIONS = (
    ('`smoothing="linear"`, `density="auto"`, the mask: the default', "dc"),
    ('`smoothing="average"`', "dc, average"),
    ('`smoothing="none"`', "dc, none"),
    ("`density=0.001`, the paper's", "dc, density 0.001"),
    ("`mask=False`", "dc, no mask"),
)
DEFAULTS_TEXT = (
    "What other options give, and in brackets how far they are from the default, with the interval of the paired difference. With eight adapters of rank 16 and "
    'more `density="auto"` is the paper\'s 0.001.'
)
STUDY_TEXT = """LoRA merging keeps less than it could: with eight tasks a tenth of what they learned is lost, and more on harder tasks. Two families of rules
that need no TIES and no mask were compared with DC-Merge, on **validation** examples alone:

- `dW = U G_u^(-p/2) diag(tau S + (1 - tau) mean S) G_v^(-p/2) V^T` with G the Gram matrices of the stacked bases: p is how far directions that tasks
  share are taken apart. p = 0 is the sum, p = 1 orthogonal bases, which at tau = 1 is TSV-M, p = 2 the dual bases, in which no task answers
  for another; tau below 1 smooths.
- `dW = U (G_u + lambda_u)^-1 diag(S) (G_v + lambda_v)^-1 V^T` with linearly smoothed S: `Y = U (G_u + lambda_u)^-1` minimises
  `||Y^T U - I||^2 + lambda_u ||Y||^2`, so that each merged direction answers its own direction with 1 and all others with 0, at a small norm. It is what
  radio calls regularised zero-forcing; lambda = 1 has the slope of p = 1 at an eigenvalue 1 of G, lambda = 1/2 that of p = 4/3. "lambda 0.25" is one number for
  both sides, "load c" is lambda_u = c k / m and lambda_v = c k / n: k directions in m and n dimensions.

The second family is ahead on all of them, and became the method [`rzf`](methods/rzf.md). No one lambda is right everywhere: a small one keeps more of few tasks, a large one of
many. In radio the best one grows with the load, and so it does here: load 0.375 is nowhere more than a point
below the better of the two lambdas, and is what `rzf` has. The goal for a new default was two points over the best published method on all of them, by either way to alpha; on text with a picked
alpha the rule wins by less, so that `dc` stays the default.

"""
STUDY_TABLES_TEXT = """### On validation examples

In brackets the difference from `dc` with its interval. Alpha is picked on the examples that are measured, which favours all rules alike, or is the data-free
one."""
BEYOND_TEXT = """### On test examples

`rzf` as it was chosen on validation examples, measured on test examples as all methods are: how far it is ahead of `dc`, with the 95 % interval of the paired
difference, and of the best published method, which is picked on these very examples."""
ALPHA_STUDY_TEXT = """How the rule was chosen: what sizes in several norms lose on **validation** examples against the best alpha there, in points, mean over
four and eight tasks and nine methods and options, seed 0. `rzf`, which takes directions apart, stands by itself. On the mean of all, the library's rule loses least."""
MARKED = re.compile(r"(<!-- everything: written by [^\n]*-->\n).*?(<!-- /everything -->)", re.DOTALL)


def with_section(page: str, text: str) -> str:
    """A page with what is between its two marks made anew.

    Raises:
        ValueError: the page has no such marks.
    """
    if not MARKED.search(page):
        raise ValueError(
            "found no marks of 'everything' in the page: expected '<!-- everything: written by ... -->' and its end"
        )
    return MARKED.sub(lambda found: f"{found[1]}\n{text}\n\n{found[2]}", page)


def section(
    found: Sequence[Found], figures: Mapping[str, Path], studied: Sequence[str] = (), alphas_studied: str = ""
) -> str:
    """All tables, then what the figures say.

    Args:
        found: The benchmarks' results.
        figures: Folders of the figures and their numbers by benchmark.
        studied: Tables of rules that are no methods, one a benchmark.
        alphas_studied: The table of rules for alpha without data; empty where there is none.
    """
    parts = ["## At a glance", glance_text(found), glance(found)]
    for kind, title in (("adapter", "LoRA adapters (Table 1)"), ("model", "Models fine-tuned in full (Table 2)")):
        if these := [one for one in found if one.kind == kind]:
            for rule in RULES:
                parts += [f"## {title}, {RULE_NAMES[rule]}", all_methods(these, rule)]
    parts += ["## Where DC-Merge loses", losses_text(found), losses(found, dir_sims(figures))]
    parts += ["## Alpha without data", alpha_text(found), alphas(found)]
    if alphas_studied:
        parts += [ALPHA_STUDY_TEXT, alphas_studied]
    parts += ["## The defaults of DC-Merge", DEFAULTS_TEXT, defaults(found)]
    if studied:
        parts += ["## Beyond the paper", STUDY_TEXT.strip(), BEYOND_TEXT, beyond(found), STUDY_TABLES_TEXT, *studied]
    parts += ["## The tables of each benchmark", pages(found)]
    if figures:
        parts += ["## The paper's figures", figures_text(figures)]
    return "\n\n".join(part for part in parts if part)


def glance_text(found: Sequence[Found]) -> str:
    """How to read the first table."""
    seeds = ", ".join(f"{one.name}: {one.seeds}" for one in found)
    return (
        f"Average normalized accuracy in % (Eq. 29) of `{REFERENCE}` at its defaults, of the best of all other published methods, and how far `{REFERENCE}` is "
        "ahead of it, with the 95 % interval of the paired difference; positive is better. The best of many others is picked on the "
        f"same test examples, which favours it. `{NEW}` is our own method. Seeds of adapters or models: {seeds}."
    )


def glance(found: Sequence[Found]) -> str:
    """The reference against the best of the others."""
    head = [
        "benchmark",
        "tasks",
        "base model",
        *(f"{cell}, {rule}" for rule in RULES for cell in (f"`{REFERENCE}`", "best other", "ahead", f"`{NEW}`")),
    ]
    rows = []
    for one in found:
        for count in one.counts:
            row = [one.name, str(count), percent(value(one.lines[count, "base model", ""]))]
            for rule in RULES:
                best, line = max(one.rivals(count, rule).items(), key=lambda item: value(item[1]))
                mean, low, high = ahead(line)
                row += [percent(value(one.lines[count, REFERENCE, rule])), f"`{best}` {percent(value(line))}"]
                row.append(f"{-mean:+.1f} ({-high:+.1f} to {-low:+.1f})")
                ours = one.lines.get((count, NEW, rule))
                row.append("" if ours is None else percent(value(ours)))
            rows.append(row)
    return table(head, rows)


def all_methods(found: Sequence[Found], rule: str) -> str:
    """Every method on every benchmark, best first by the mean over all columns that it has."""
    columns = [(one, count) for one in found for count in one.counts]
    labels = dict.fromkeys(label for one, count in columns for label in one.methods(count, rule))

    def cells(label: str) -> list[Mapping[str, object] | None]:
        return [one.lines.get((count, label, rule)) for one, count in columns]

    def mean(label: str) -> tuple[int, float]:
        there = [line for line in cells(label) if line is not None]
        return len(there), sum(value(line) for line in there) / len(there)

    head = ["method", *(f"{one.name}, {count}" for one, count in columns)]
    rows = [["base model", *(percent(value(one.lines[count, "base model", ""])) for one, count in columns)]]
    rows += [
        [f"`{label}`", *("" if line is None else bounds(line["normalized"]) for line in cells(label))]  # type: ignore[arg-type]
        for label in sorted(labels, key=mean, reverse=True)
    ]
    return table(head, rows)


def losses_text(found: Sequence[Found]) -> str:
    """How often, and what the table shows."""
    contests = [
        (one, count, rule, line)
        for one in found
        for count in one.counts
        for rule in RULES
        for line in one.rivals(count, rule).values()
    ]
    behind = [ahead(line) for *_, line in contests]
    beyond = sum(low > 0 for _, low, _ in behind)
    ahead_ = sum(high < 0 for *_, high in behind)
    return (
        f"Of {len(contests)} comparisons with another published method, at the same number of tasks and by the same rule for alpha, `{REFERENCE}` is ahead by more than "
        f"the interval in {ahead_} and behind by more than the interval in {beyond}; the others are within it. All those in which it is behind by more than "
        f"the interval, with the mean directional similarity (Eq. 6) of both merges to the tasks where the figures measured it: where the other's is "
        "higher it keeps the tasks' directions better, and where it is not, the loss has another reason, as the strength of the merge."
    )


def losses(found: Sequence[Found], similar: Mapping[tuple[str, int, str], float]) -> str:
    """Every method that is ahead of the reference by more than its interval."""
    rows = []
    for one in found:
        for count in one.counts:
            for rule in RULES:
                for name, line in one.rivals(count, rule).items():
                    mean, low, high = ahead(line)
                    if low > 0:
                        pair = [similar.get((one.name, count, method)) for method in (name, REFERENCE)]
                        shown = "" if None in pair else " against ".join(f"{float(x or 0):.3f}" for x in pair)
                        rows.append(
                            [one.name, str(count), rule, f"`{name}`", f"{mean:+.1f} ({low:+.1f} to {high:+.1f})", shown]
                        )
    if not rows:
        return "There is none."
    return table(["benchmark", "tasks", "alpha", "method", "ahead by", "DirSim, its against ours"], rows)


def alpha_text(found: Sequence[Found]) -> str:
    """What was wanted, and how often it is so."""
    gaps = [gap for one in found for count in one.counts for gap in lost(one, count).values()]
    near = sum(gap >= -GOAL for gap in gaps)
    return (
        'What the data-free `alpha="auto"` ([how](concepts.md#alpha)) loses against the alpha that is best on validation examples, in points of '
        f"normalized accuracy on test examples: of {len(gaps)} merges, averaged over seeds and groups, {near} lose less than {100 * GOAL:g} points or gain. The norm for adapters, and that `rzf` is looked at inside the tasks' directions, were chosen on validation "
        "examples of text8, vision and language (first seed), by what nine methods lose there, and the fit for full models on those of text8-fft."
    )


def lost(one: Found, count: int) -> dict[str, float]:
    """By method: normalized accuracy at the alpha without data less that at the alpha by validation."""
    return {
        label: value(auto) - value(one.lines[count, label, "validation"])
        for label, auto in one.methods(count, "auto").items()
        if (count, label, "validation") in one.lines
    }


def alphas(found: Sequence[Found]) -> str:
    """For the reference and over all methods: alpha without data against alpha by validation."""
    head = ["benchmark", "tasks", f"`{REFERENCE}`, auto", "by validation", "auto less validation"]
    head += ["mean over methods", "largest loss", f"`{REFERENCE}`, auto, less `ta` by validation"]
    rows = []
    for one in found:
        for count in one.counts:
            gaps = {label: 100 * gap for label, gap in lost(one, count).items()}
            worst = min(gaps, key=lambda label: gaps[label])
            auto, picked = (value(one.lines[count, REFERENCE, rule]) for rule in ("auto", "validation"))
            ta = value(one.lines[count, "ta", "validation"])
            rows.append([
                one.name, str(count), percent(auto), percent(picked), f"{gaps[REFERENCE]:+.1f}", f"{sum(gaps.values()) / len(gaps):+.1f}",
                f"`{worst}` {gaps[worst]:+.1f}", f"{100 * (auto - ta):+.1f}",
            ])  # fmt: skip
    return table(head, rows)


def defaults(found: Sequence[Found]) -> str:
    """Each option's normalized accuracy with its difference from the default."""
    columns = [(one, count, rule) for one in found if one.kind == "adapter" for count in one.counts for rule in RULES]
    rows = []
    for name, label in OPTIONS:
        lines = [one.lines.get((count, label, rule)) for one, count, rule in columns]
        rows.append([name, *("" if line is None else against(line) for line in lines)])
    return table(["", *(f"{one.name}, {count}, {rule}" for one, count, rule in columns)], rows)


def beyond(found: Sequence[Found]) -> str:
    """Our method against the reference and the best published one, where it was measured."""
    head = ["benchmark", "tasks"]
    for rule in RULES:
        head += [f"`{NEW}`, {rule}", f"ahead of `{REFERENCE}`", "of the best published"]
    rows = []
    for one in found:
        for count in one.counts:
            if all((count, NEW, rule) in one.lines for rule in RULES):
                row = [one.name, str(count)]
                for rule in RULES:
                    line = one.lines[count, NEW, rule]
                    published = {**one.rivals(count, rule), REFERENCE: one.lines[count, REFERENCE, rule]}
                    best = max(published, key=lambda name: value(published[name]))
                    mean, low, high = ahead(line)
                    row += [percent(value(line)), f"{mean:+.1f} ({low:+.1f} to {high:+.1f})"]
                    row.append(f"{100 * (value(line) - value(published[best])):+.1f} (`{best}`)")
                rows.append(row)
    return table(head, rows) if rows else "It is not measured there yet."


def pages(found: Sequence[Found]) -> str:
    """Links."""
    return "\n".join(
        f"- [{one.name}]({one.name}.md): {len(one.data['tasks'])} tasks, {one.kind}s; energy smoothing (Tables 4 and 8), mask (5), smoothing by cover "
        f"space (6){', unseen tasks (11)' if one.data['unseen'] else ''}; numbers as [CSV]({one.name}/results.csv) and [JSON]({one.name}/results.json)"
        for one in found
    )

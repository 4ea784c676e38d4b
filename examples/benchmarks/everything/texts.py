"""What stands around the tables of all benchmarks."""

from __future__ import annotations

from collections.abc import Sequence

from accuracy.report import seeds_text
from accuracy.results import REFERENCE, RULES

from everything.found import Found, ahead, value
from everything.tables import GOAL, NEW, lead, lost

DEFAULT_GOAL = 2.0  # points over the best published method, which a new default must have
DEFAULT_COUNTS = (4, 8)  # at so many tasks

DEFAULTS_TEXT = (
    "Results with other options; in brackets the difference from the default, with the interval of the paired difference. With eight or more adapters of rank 16, "
    '`density="auto"` is the paper\'s 0.001.'
)
METHODS_TEXT = "In brackets the 95 % interval. Only Fisher merging and RegMean use training examples."
CURVES_TEXT = (
    'What merging keeps as tasks are added, at the data-free `alpha="auto"`. Panels have scales of their own. Intervals are in the tables, those of '
    "differences too, which are narrower: every method is measured on the same examples."
)
DOTS_TEXT = (
    "Filled dots: the data-free alpha; rings: alpha picked on validation examples; lines: 95 % intervals. A star marks the methods that use "
    "training examples. From the best on, by the mean over the benchmarks at the data-free alpha."
)
HEADINGS = {"auto": 'Without data: `alpha="auto"`', "validation": "Alpha picked on validation examples"}
STUDY_TEXT = """With most methods merging keeps less of LoRA adapters than of fully fine-tuned models, and mostly less the more tasks there are. We
compared two families of rules, which need no TIES and no mask, with DC-Merge, on **validation** examples only:

- `dW = U G_u^(-p/2) diag(tau S + (1 - tau) mean S) G_v^(-p/2) V^T` with G the Gram matrices of the stacked bases: p says how far
  directions that tasks share are separated. p = 0 is the sum, p = 1 orthogonal bases, which at tau = 1 is TSV-M, p = 2 the dual bases, in
  which no task responds to another; tau below 1 smooths.
- `dW = U (G_u + lambda_u)^-1 diag(S) (G_v + lambda_v)^-1 V^T` with linearly smoothed S: `Y = U (G_u + lambda_u)^-1` minimises
  `||Y^T U - I||^2 + lambda_u ||Y||^2`, so each merged direction responds to its own direction with 1 and to all others with 0, at a small norm. In radio
  this is called regularised zero-forcing; lambda = 1 has the slope of p = 1 at an eigenvalue 1 of G, lambda = 1/2 that of p = 4/3. "lambda 0.25" means one number for
  both sides, "load c" means lambda_u = c k / m and lambda_v = c k / n: k directions in m and n dimensions.

The second family became the method [`rzf`](methods/rzf.md). No single lambda is right everywhere. With four and eight tasks of
images and of the language model, 0.1 keeps more than 0.25; with sixteen text tasks, which have the largest load, 0.25 keeps more; with four and eight
text tasks, both keep about as much. In radio the best lambda grows with the load; these are few points to show the same for `rzf`, which has load 0.375."""
STUDY_TABLES_TEXT = """### On validation examples

In brackets the difference from `dc` with its interval. Alpha is picked on the measured examples themselves, which favours all rules alike, or is the
data-free one."""
IDEAS_TEXT = """### Ideas around `rzf`

Each changes one thing about `rzf`, again on validation examples. In brackets the difference from `rzf` with its interval. a and b are the eigenvalues of
the Gram matrices, l_u = k / m and l_v = k / n the loads, and c is the ridge.

- own response 1: `rzf` lets a direction answer itself less, the more others are near it; here each answers itself with exactly 1.
- energy: strong directions are to be disturbed less than weak ones, `Y = (U D U^T + lambda)^-1 U` with `D = diag(S / mean S)`, own responses 1.
- one ridge: one problem instead of one a side, `min ||U^T M V - diag(S)||^2 + lambda ||M||^2`, whose factor is `1 / (a b + lambda)`.
- agreement: what tasks agree in is kept, where `rzf` turns it down: `min sum_i ||(M - W_i) V_i||^2 + ||U_i^T (M - W_i)||^2 + lambda ||M||^2`,
  which is W if every task is W; its factor is `2 / (a + b + lambda)`.
- equal tasks: the tasks are brought halfway to the same sum of singular values in each module.
- module alpha: each module has an alpha of its own, with which it is nearest to every task inside the task's directions.
- then DC-Merge: the separated tasks are merged by election and mask instead of added."""
COST_TEXT = """Hours of one processor of the machine on which this was made, while a second one was busy too; the work is spread over all processors. Study, figures and
pages take additional time. Stored results are not made again: after a change of the library merges are made again, but measured only if they differ."""
ALPHA_STUDY_TEXT = """How the rule was chosen: what rules by size in several norms lose on **validation** examples compared with the best alpha there, in points, averaged
over four and eight tasks and nine methods and options, seed 0. `rzf`, which separates directions, is listed on its own. The library's rule was chosen
for its mean loss over the three."""


def glance_text(found: Sequence[Found]) -> str:
    """How to read the first tables."""
    seeds = ", ".join(f"{one.name} {seeds_text(one.data)}" for one in found)
    return (
        f"Average normalized accuracy in % (Eq. 29) of `{REFERENCE}` at its defaults, of the best of all other published methods that use no training examples, and how far `{REFERENCE}` is "
        "ahead of it, with the 95 % interval of the paired difference; positive is better. The best other method is picked on the "
        f"same test examples, which favours it. `{NEW}` is our own method. Measured: {seeds}."
    )


def alike_text(found: Sequence[Found]) -> str:
    """How far two names of the same merge of adapters are apart, which no interval covers; empty if they were not measured."""
    apart = {
        rule: [
            (abs(value(lines["ta"]) - value(lines["average"])), f"{one.name} with {count}")
            for one in found
            for count in one.counts
            if one.kind == "adapter" and {"ta", "average"} <= (lines := one.methods(count, rule)).keys()
        ]
        for rule in RULES
    }
    if not all(apart.values()):
        return ""
    most = {rule: f"{100 * gap:.1f} points ({where})" for rule, (gap, where) in ((r, max(apart[r])) for r in RULES)}
    return (
        "`ta` and `average` are the same merge at two scales of alpha, so the difference between them shows noise that no interval covers. At the data-free "
        f"alpha only rounding differs, and they are {most['auto']} apart at most. By validation the alphas differ too, since the grid's steps of a tenth are "
        f"coarse for a sum of many adapters and validation examples are few: there they are {most['validation']} apart at most."
    )


def losses_text(found: Sequence[Found]) -> str:
    """How often the reference is ahead, and what the table shows where there is one."""
    contests = [
        ahead(line)
        for one in found
        for count in one.counts
        for rule in RULES
        for line in one.rivals(count, rule).values()
    ]
    won, lost_ = sum(high < 0 for *_, high in contests), sum(low > 0 for _, low, _ in contests)
    text = (
        f"In {len(contests)} comparisons with a published method that uses no training examples, at the same number of tasks and with the same rule for alpha, `{REFERENCE}` is ahead by more than "
        f"the interval in {won} and behind by more than the interval in {lost_}; the others are within it. Our own `{NEW}` is "
        "[compared below](#beyond-the-paper)."
    )
    behind, rows = sum(1 for one in found for _ in one.behind()), sum(len(one.counts) * len(RULES) for one in found)
    if not behind:
        return text
    return (
        f"{text}\n\nThe best other method is ahead on the mean in {behind} of {rows} rows. They are listed below, with the mean directional "
        "similarity (Eq. 6) of both merges to the tasks, first seed (for full models, to as many of each task's leading directions as a merge takes). If "
        "the other method's is higher, it keeps the tasks' directions better; if not, the loss has another reason, such as how strong the directions "
        "are in the merge and how they disturb each other, which DirSim does not see."
    )


def own_text(found: Sequence[Found]) -> str:
    """How far our method is ahead of the reference at the alpha without data, from the least to the most."""
    parts = []
    for one in found:
        lines = {count: one.lines.get((count, NEW, "auto")) for count in one.counts}
        gains = sorted((ahead(line)[0], count) for count, line in lines.items() if line is not None)
        if gains:
            ends = [f"{gain:+.1f} ({count} {one.kind}s)" for gain, count in dict.fromkeys((gains[0], gains[-1]))]
            parts.append(f"{one.name} {' to '.join(ends)}")
    return (
        f"A method of our own, [`{NEW}`](docs/methods/{NEW}.md), is ahead of `{REFERENCE}` by these points in the table above, from least to most: "
        f"{', '.join(parts)}; [compared with all others](docs/benchmarks.md#beyond-the-paper)."
    )


def default_text(found: Sequence[Found]) -> str:
    """Whether our method has reached what was asked of a new default, and where it has not."""
    ours = {
        (one.name, count): min(lead(one, count, rule) for rule in RULES)
        for one in found
        for count in DEFAULT_COUNTS
        if all((count, NEW, rule) in one.lines for rule in RULES)
    }
    missed = [f"{name} with {count} ({gain:+.1f})" for (name, count), gain in ours.items() if gain < DEFAULT_GOAL]
    goal = (
        f"The goal for a new default was {DEFAULT_GOAL:g} points over the best published method on every benchmark at "
        f"{' and '.join(map(str, DEFAULT_COUNTS))} tasks, with both ways to set alpha."
    )
    if not missed:
        return f"{goal} `{NEW}` reaches it."
    return f"{goal} With the worse of the two, `{NEW}` misses it on {', '.join(missed)}, so that `{REFERENCE}` stays the default."


def beyond_text(found: Sequence[Found]) -> str:
    """What the next table shows, and how often our method is ahead and behind."""
    lines = [one.lines.get((count, NEW, rule)) for one in found for count in one.counts for rule in RULES]
    gains = [ahead(line) for line in lines if line is not None]
    won, lost_ = sum(low > 0 for _, low, _ in gains), sum(high < 0 for *_, high in gains)
    return (
        f"### On test examples\n\n`{NEW}`, chosen on validation examples, measured on test examples like all methods: how far it is ahead of "
        f"`{REFERENCE}`, with the 95 % interval of the paired difference, and of the best published method, which is picked on these same examples. In "
        f"{len(gains)} comparisons with `{REFERENCE}` it is ahead by more than the interval in {won}, and behind in {lost_}. {default_text(found)}"
    )


def alpha_text(found: Sequence[Found]) -> str:
    """What was wanted, and how often it is so."""
    gaps = [gap for one in found for count in one.counts for gap in lost(one, count).values()]
    near = sum(gap >= -GOAL for gap in gaps)
    return (
        'What the data-free `alpha="auto"` ([how](concepts.md#alpha)) loses compared with the alpha that is best on validation examples, in points of '
        f"normalized accuracy on test examples. Of {len(gaps)} merges, averaged over seeds and groups, {near} lose less than {100 * GOAL:g} points or gain. "
        f"Averaged over all rows the difference is {_mean_gain(found, REFERENCE)} points for `{REFERENCE}` and {_mean_gain(found, NEW)} for `{NEW}`, positive being better. The norm for adapters, and the choice to measure `rzf` inside the tasks' directions, were made on validation "
        "examples of text8, vision and language (first seed), by what nine methods lose there; the fit for full models was chosen on those of text8-fft."
    )


def _mean_gain(found: Sequence[Found], method: str) -> str:
    """Of the alpha without data, in points, over benchmarks and numbers of tasks that have the method."""
    gaps = [lost(one, count).get(method) for one in found for count in one.counts]
    there = [gap for gap in gaps if gap is not None]
    return f"{100 * sum(there) / len(there):+.1f}" if there else "no"

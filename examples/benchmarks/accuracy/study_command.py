"""The command line of a study: families of rules on the validation examples of a benchmark whose adapters are trained."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from common.tables import markdown

from accuracy.carrier import PRECISIONS
from accuracy.ideas import IDEAS, C
from accuracy.merging import Rule
from accuracy.rules import by_default, by_load, gram_power, regularised
from accuracy.study import study, table
from accuracy.suite import Suite

REGULARISED = ("lambda", "load")  # with which the labels of that family begin


@dataclass(frozen=True)
class Studied:
    """What is measured of a suite where the command line does not say."""

    seeds: Sequence[int]  # of adapters
    counts: Sequence[int] = (4, 8)  # numbers of tasks
    examples: int = 100  # of each task


def run(
    doc: str,
    suites: Mapping[str, Studied],
    maker: Callable[[str], Callable[[Path, tuple[int, ...]], Suite]],
    arguments: Sequence[str] | None,
) -> int:
    """Measure, print the table, and write the lines where they are wanted.

    Args:
        doc: What the program says of itself.
        suites: What is measured where the command line does not say, by the suites' names.
        maker: From a name to the function that makes a suite from its cache folder and the adapters' seeds.
        arguments: Of the command line; None for this process's own.
    """
    options = parse(doc, suites, arguments)
    usual = suites[options.suite]
    suite = maker(options.suite)(options.cache, tuple(options.seeds or usual.seeds))
    chosen = ideas() if options.ideas else rules(options.p, options.tau, options.ridge, options.load)
    lines = study(
        suite, chosen, options.counts or usual.counts, examples=options.examples or usual.examples, precision=options.precision, workers=options.workers,
        apart=[label for label in chosen if options.ideas or label.startswith(REGULARISED)],
    )  # fmt: skip
    if options.out:
        options.out.write_text(json.dumps(lines, indent=1) + "\n", encoding="utf-8")
    print(markdown(*table(lines)))
    return 0


def parse(doc: str, suites: Mapping[str, Studied], arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line's options."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("suite", choices=list(suites), help=f"one of {', '.join(suites)}")
    parser.add_argument("--cache", type=Path, required=True, metavar="DIR", help="with the adapters of the benchmark")
    parser.add_argument("--p", type=float, nargs="*", default=[1.0, 1.3], help="of gram_power (default: 1 1.3)")
    parser.add_argument("--tau", type=float, nargs="*", default=[0.7], help="of gram_power (default: 0.7)")
    parser.add_argument(
        "--ridge", type=_ridge, nargs="*", default=[(0.25, 0.25), (0.1, 0.1)], metavar="LAMBDA",
        help="of regularised: one number for both sides, or two as in 0.25,1: of the outputs and of the inputs (default: 0.25 0.1)",
    )  # fmt: skip
    parser.add_argument(
        "--load", type=float, nargs="*", default=[0.2, 0.375, 0.75], metavar="C",
        help="of regularised: lambda = C times the load k / m of each side (default: 0.2 0.375 0.75)",
    )  # fmt: skip
    parser.add_argument(
        "--ideas", action="store_true", help="instead of the families what is in accuracy/ideas.py, compared with rzf"
    )
    parser.add_argument(
        "--counts", type=int, nargs="+", metavar="T", help="numbers of tasks (default: those that the pages have)"
    )
    parser.add_argument("--seeds", type=int, nargs="+", help="of adapters (default: those that the pages have)")
    parser.add_argument(
        "--examples", type=int, help="validation examples of a task, 200 at most (default: as many as the pages have)"
    )
    parser.add_argument("--precision", choices=list(PRECISIONS), default="bfloat16")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--out", type=Path, metavar="FILE", help="the lines as JSON")
    return parser.parse_args(arguments)


def _ridge(text: str) -> tuple[float, float]:
    """lambda_u and lambda_v."""
    first, *others = map(float, text.split(","))
    if len(others) > 1:
        raise ValueError(text)
    return first, *(others or [first])


def rules(
    powers: Sequence[float], taus: Sequence[float], ridges: Sequence[tuple[float, float]], loads: Sequence[float] = ()
) -> Mapping[str, Rule]:
    """DC-Merge, with which the others are compared, and the members of both families that are asked for."""
    found: dict[str, Rule] = {"dc": partial(by_default, method="dc")}
    for p in powers:
        for tau in taus:
            found[f"p {p:g}, tau {tau:g}"] = partial(gram_power, p=p, tau=tau)
    for outputs, inputs in ridges:
        label = f"{outputs:g}" if outputs == inputs else f"{outputs:g}, {inputs:g}"
        found[f"lambda {label}"] = partial(regularised, ridge=outputs, ridge_in=inputs)
    return found | {f"load {c:g}": partial(by_load, c=c) for c in loads}


def ideas() -> Mapping[str, Rule]:
    """The library's ``rzf``, with which they are compared, and the ideas around it."""
    return {"rzf": partial(by_load, c=C), **IDEAS}

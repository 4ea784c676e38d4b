"""Study a family of rules on the validation texts: ``python -m examples.benchmarks.text8.study --p 0 1 2 --tau 0 0.5 1``.

The rules are ``dW = U G_u^(-p/2) diag(tau S + (1 - tau) mean S) G_v^(-p/2) V^T`` of ``accuracy/rules.py``; p = 1, tau = 1 is TSV-M
and comes first. Other rules: call ``accuracy.study.study`` with functions of your own, as this program does.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from functools import partial
from pathlib import Path

BENCHMARKS = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(BENCHMARKS), str(BENCHMARKS.parent), str(BENCHMARKS.parent.parent)]


def main() -> int:
    """Measure, print the table, and write the lines where they are wanted."""
    from accuracy.rules import gram_power
    from accuracy.study import study, table
    from common.tables import markdown

    from text8.suite import TextSuite
    from text8.tasks import TASKS

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", type=Path, required=True, metavar="DIR", help="with the adapters of the benchmark")
    parser.add_argument("--p", type=float, nargs="+", default=[1.0])
    parser.add_argument("--tau", type=float, nargs="+", default=[1.0])
    parser.add_argument("--counts", type=int, nargs="+", default=[2, 4, 8])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument(
        "--examples", type=int, default=100, help="validation texts of a task (%(default)s, 200 at most)"
    )
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--out", type=Path, metavar="FILE", help="the lines as JSON")
    options = parser.parse_args()
    rules = {"p 1, tau 1 (TSV-M)": partial(gram_power, p=1.0, tau=1.0)}
    for p in options.p:
        for tau in options.tau:
            if (p, tau) != (1.0, 1.0):
                rules[f"p {p:g}, tau {tau:g}"] = partial(gram_power, p=p, tau=tau)
    suite = TextSuite(options.cache, tuple(TASKS), tuple(options.seeds))
    lines = study(suite, rules, options.counts, examples=options.examples, workers=options.workers)
    if options.out:
        options.out.write_text(json.dumps(lines, indent=1) + "\n", encoding="utf-8")
    print(markdown(*table(lines)))
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Run the benchmarks, keep what they print in docs/performance/*.json, and write the tables of docs/performance.md from there.

python examples/benchmarks/report.py --run --mergekit-python mk/bin/python   # all of them, an hour on two cores
python examples/benchmarks/report.py --run fuse growth                       # these alone
python examples/benchmarks/report.py                                         # the page again from the saved results
"""

from __future__ import annotations

import argparse
import importlib
import json
import subprocess
import sys
from pathlib import Path

from common.command import Outcome
from common.machine import busy, in_words
from common.marks import all_rewritten

ROOT = Path(__file__).parent.parent.parent
PAGE = ROOT / "docs/performance.md"
RESULTS = ROOT / "docs/performance"
BENCHMARKS = ("factor_space", "merge_process", "fuse", "others", "full_models", "growth")


def saved(name: str) -> Outcome:
    """The outcome of a benchmark as it was measured last."""
    outcome: Outcome = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    return outcome


def block(name: str) -> str:
    """Markdown of a benchmark's outcome, under the machine it was measured on."""
    outcome = saved(name)
    picture = "\n\n![time along every sweep](performance/growth.png)" if name == "growth" else ""
    settings = " ".join(f"{key}={value}" for key, value in outcome["settings"].items() if value)
    table = importlib.import_module(name).table(outcome)
    warning = ""
    if busy(outcome["machine"]):
        warning = " **The machine was busy with other work: times and ratios are not to be relied on.**"
    return f"{in_words(outcome['machine'])}. Settings: `{settings}`.{warning}\n\n{table}{picture}"


def rendered(page: str) -> str:
    """The page with all its blocks made anew."""
    return all_rewritten(page, block)


def run(name: str, mergekit_python: str | None) -> None:
    """Measure and save. What the benchmark says on its way is seen."""
    command = [sys.executable, str(Path(__file__).with_name(f"{name}.py")), "--json"]
    if name in ("others", "full_models") and mergekit_python:
        command += ["--mergekit-python", mergekit_python]
    outcome = json.loads(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout)
    outcome["settings"].pop("mergekit_python", None)  # a place of this machine
    (RESULTS / f"{name}.json").write_text(json.dumps(outcome, indent=1) + "\n", encoding="utf-8")


def main() -> None:
    """Measure what is asked for, and write the page and the figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--run", nargs="*", choices=BENCHMARKS, metavar="NAME", help="measure these; all if none is named"
    )
    parser.add_argument("--mergekit-python", metavar="PATH", help="for others.py and full_models.py")
    args = parser.parse_args()
    if args.run is not None:
        for name in args.run or BENCHMARKS:
            print(name, file=sys.stderr, flush=True)
            run(name, args.mergekit_python)
    PAGE.write_text(rendered(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    growth = importlib.import_module("growth")
    growth.figure(saved("growth")).savefig(RESULTS / "growth.png", dpi=90, metadata={"Software": None})


if __name__ == "__main__":
    main()

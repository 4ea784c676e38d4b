"""Run the cases and count how they end: ``python -m tests.fuzz [--count 2000] [--processes 50] [--seed 0] [--only N]``."""

from __future__ import annotations

import argparse
import faulthandler
import os
import shutil
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path


def main() -> int:
    """The number of cases that ended in any other way than they may."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    from tests.fuzz.cases import GIVE_UP, Case, make_pristine, run_inside, run_outside

    parser = argparse.ArgumentParser(prog="python -m tests.fuzz")
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--processes", type=int, default=50, help="so many of them as real processes, too")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, help="this case alone")
    given = parser.parse_args()
    start, ends, bad = time.perf_counter(), Counter[str](), 0
    with tempfile.TemporaryDirectory() as place:
        pristine = make_pristine(Path(place) / "pristine")
        numbers = range(given.count) if given.only is None else [given.only]
        cases = [(number, run_inside) for number in numbers]
        cases += [
            (number, run_outside) for number in list(numbers)[:: max(len(numbers) // max(given.processes, 1), 1)]
        ][: given.processes]
        for number, run in cases:
            faulthandler.dump_traceback_later(3 * GIVE_UP, exit=True)  # should Python itself hang
            case, folder = Case.of(number, given.seed), Path(place) / "case"
            outcome = run(case, pristine, folder)
            shutil.rmtree(folder)
            ends[f"{outcome.kind} ({'as a process' if run is run_outside else 'inside'})"] += 1
            if outcome.wrong is not None or given.only is not None:
                bad += outcome.wrong is not None
                print(f"{case}: {outcome.wrong}\n    {outcome.said[:500]}", flush=True)
        faulthandler.cancel_dump_traceback_later()
    for kind, count in sorted(ends.items()):
        print(f"{count:5d} {kind}")
    print(f"{len(cases)} cases in {time.perf_counter() - start:.0f} s, {bad} of them wrong")
    return bad


if __name__ == "__main__":
    sys.exit(min(main(), 1))

"""How the cost of a merge grows: with the number of adapters T, their rank r, the shape m x n, and the number of modules.

Every point is ``DCMergeAdapter().merge(...).save_pretrained(...)``, from files in the page cache to a file, in a process of its
own. Its time is the shortest of a few, after one small merge that does the imports; its memory is what the first of them takes
beyond what the process had before. The exponents are slopes of straight lines through the logarithms, over the upper part of
each range, where fixed costs matter least. They are taken over what the theory names: k = T r, m + n, the number of modules.

    python examples/benchmarks/growth.py
    python examples/benchmarks/growth.py --sweeps modules --largest 64
"""

from __future__ import annotations

import argparse
import math
import shutil
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from common.command import Outcome, conclude, parsed, parser_of, say, scratch
from common.inputs import equal_shapes, write_adapters
from common.process import helper, peak_beyond
from common.tables import Goal, goals, markdown, megabytes, seconds

from dc_merge_peft import DCMergeAdapter

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Point:
    """One merge."""

    tasks: int
    rank: int
    m: int
    n: int
    modules: int


@dataclass(frozen=True)
class Sweep:
    """Points along one line: the fields in ``vary`` take all values, the others stay."""

    start: Point
    vary: tuple[str, ...]
    values: tuple[int, ...]
    over: str  # what the exponent is taken over
    most: int  # the claim: cost grows with this power at most

    def points(self, largest: int | None) -> list[Point]:
        """All of them, up to a largest value."""
        chosen = [value for value in self.values if largest is None or value <= largest]
        return [replace(self.start, **dict.fromkeys(self.vary, value)) for value in chosen]


def powers(first: int, last: int) -> tuple[int, ...]:
    """Powers of two from one to another."""
    return tuple(1 << bit for bit in range(first.bit_length() - 1, last.bit_length()))


SWEEPS = {
    "T": Sweep(Point(0, 16, 4096, 4096, 4), ("tasks",), powers(2, 64), "k", 2),
    "r": Sweep(Point(4, 0, 4096, 4096, 4), ("rank",), powers(4, 256), "k", 2),
    "m": Sweep(Point(8, 16, 0, 1024, 8), ("m",), powers(512, 16384), "m + n", 1),
    "n": Sweep(Point(8, 16, 1024, 0, 8), ("n",), powers(512, 16384), "m + n", 1),
    "m = n": Sweep(Point(8, 16, 0, 0, 8), ("m", "n"), powers(512, 16384), "m + n", 1),
    "modules": Sweep(Point(4, 16, 1024, 1024, 0), ("modules",), powers(4, 256), "modules", 1),
}
QUICK = {"largest": 16, "sweeps": ["T", "modules"], "repeat": 1, "shrink": 16}
UPPER = 4  # points of the upper part: a factor of eight
TOLERANCE = 0.15  # of an exponent, for noise


def size(point: dict[str, Any], over: str) -> int:
    """What an exponent is taken over."""
    return {"k": point["tasks"] * point["rank"], "m + n": point["m"] + point["n"], "modules": point["modules"]}[over]


def exponent(x: list[float], y: list[float]) -> float:
    """The slope of the least-squares line through (log x, log y); NaN where there is none."""
    if len(x) < 2 or min(y) <= 0:
        return math.nan
    a, b = [math.log(value) for value in x], [math.log(value) for value in y]
    mean_a, mean_b = sum(a) / len(a), sum(b) / len(b)
    return sum((p - mean_a) * (q - mean_b) for p, q in zip(a, b)) / sum((p - mean_a) ** 2 for p in a)


def merge_point(folder: Path, adapters: list[Path], repeat: int) -> tuple[float, int]:
    """Shortest time, and memory of the first merge, of adapters on disk; for a fresh process."""
    shapes = equal_shapes(1, 16, 16)
    with tempfile.TemporaryDirectory(dir=folder) as name:  # imports, and files that are read once
        small = write_adapters(Path(name), shapes, 2, 2, torch.float32)
        DCMergeAdapter().merge(small, progress=False).save_pretrained(Path(name) / "out")
    took: list[float] = []

    def once() -> None:
        start = time.perf_counter()
        DCMergeAdapter().merge(adapters, progress=False).save_pretrained(folder / "out", overwrite=True)
        took.append(time.perf_counter() - start)

    memory = peak_beyond(once)
    for _ in range(repeat - 1):
        once()
    return min(took), memory


def measure_point(point: Point, repeat: int, args: argparse.Namespace) -> dict[str, Any]:
    """A point's time and memory. Making the adapters is the work of another process than merging them."""
    with scratch(args) as folder, helper(fresh=True) as beside:
        shapes = equal_shapes(point.modules, point.m, point.n)
        adapters = beside.apply(write_adapters, (folder, shapes, point.tasks, point.rank, torch.float32))
        took, memory = beside.apply(merge_point, (folder, adapters, repeat))
        shutil.rmtree(folder / "out")
    say(f"{point}: {took:.3f} s, {memory / 1e6:.0f} MB")
    return {**asdict(point), "seconds": took, "memory_bytes": memory}


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """All sweeps with their exponents."""
    found = {}
    for name in args.sweeps:
        sweep = SWEEPS[name]
        points = [
            replace(point, m=max(point.m // args.shrink, 1), n=max(point.n // args.shrink, 1))
            for point in sweep.points(args.largest)
        ]
        measured = [measure_point(point, args.repeat, args) for point in points]
        upper = measured[-UPPER:]
        x = [float(size(point, sweep.over)) for point in upper]
        found[name] = {
            "over": sweep.over,
            "points": measured,
            "fitted": {
                "from": size(upper[0], sweep.over),
                "to": size(upper[-1], sweep.over),
                "time_exponent": exponent(x, [point["seconds"] for point in upper]),
                "memory_exponent": exponent(x, [point["memory_bytes"] for point in upper]),
            },
        }
    return found


def fixed(points: list[dict[str, Any]], vary: tuple[str, ...]) -> str:
    """What stays along a sweep, in words."""
    point = points[0]
    words = {"tasks": f"T {point['tasks']}", "rank": f"r {point['rank']}"}
    words |= {"m": f"m {point['m']}", "n": f"n {point['n']}", "modules": f"{point['modules']} modules"}
    return ", ".join(text for field, text in words.items() if field not in vary)


def table(outcome: Outcome) -> str:
    """Ends of every sweep and its exponents, as Markdown."""
    rows, wanted = [], []
    for name, found in outcome["results"].items():
        sweep, points, fitted = SWEEPS[name], found["points"], found["fitted"]
        first, last = points[0], points[-1]
        rows.append(
            [
                f"{name} from {first[sweep.vary[0]]} to {last[sweep.vary[0]]}; {fixed(points, sweep.vary)}",
                f"{seconds(first['seconds'])} to {seconds(last['seconds'])}",
                f"{megabytes(first['memory_bytes'])} to {megabytes(last['memory_bytes'])}",
                f"{sweep.over} from {fitted['from']} to {fitted['to']}",
                f"{fitted['time_exponent']:.2f}",
                f"{fitted['memory_exponent']:.2f}",
            ]
        )
        text = f"along {name}, time grows at most with power {sweep.most} of {sweep.over}, {TOLERANCE} given for noise (found {fitted['time_exponent']:.2f})"
        wanted.append(Goal(text, fitted["time_exponent"] <= sweep.most + TOLERANCE))
    head = ["along", "time", "memory beyond the process", "fitted over", "exponent of time", "of memory"]
    return f"{markdown(head, rows)}{goals(wanted, outcome)}"


def figure(outcome: Outcome) -> Figure:
    """Time along every sweep on logarithmic axes, with the claim as a dashed line through the last point."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    found = outcome["results"]
    drawn = Figure(figsize=(9, 2.6 * math.ceil(len(found) / 3)), layout="constrained", facecolor="white")
    for index, (name, sweep) in enumerate(found.items(), 1):
        axes = drawn.add_subplot(math.ceil(len(found) / 3), min(len(found), 3), index)
        x = [size(point, sweep["over"]) for point in sweep["points"]]
        y = [point["seconds"] for point in sweep["points"]]
        most = SWEEPS[name].most
        axes.loglog(
            x, y, "o-", color="#0072B2", markersize=4, label=f"measured, {sweep['fitted']['time_exponent']:.2f}"
        )
        claim = [y[-1] * (value / x[-1]) ** most for value in x]
        axes.loglog(x, claim, "--", color="#D55E00", linewidth=1, label=f"power {most}")
        axes.set_ylim(bottom=min(y) / 2)
        axes.set_xscale("log", base=2)  # as the points are
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if max(y) < 20 * min(y) else (1,)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.set_title(f"along {name}", fontsize=9)
        axes.set_xlabel(sweep["over"], fontsize=8)
        axes.set_ylabel("seconds", fontsize=8)
        axes.tick_params(labelsize=7)
        axes.legend(fontsize=7, frameon=False)
    return drawn


if __name__ == "__main__":
    parser = parser_of(__doc__)
    parser.add_argument("--sweeps", nargs="+", choices=SWEEPS, default=list(SWEEPS))
    parser.add_argument("--largest", type=int, help="leave out values beyond")
    parser.add_argument("--shrink", type=int, default=1, help="divide m and n by this")
    parser.add_argument("--repeat", type=int, default=3, help="the shortest counts")
    conclude(parsed(parser, QUICK), "growth", measure, table)

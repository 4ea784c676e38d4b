"""``dc-merge merge`` as a whole process against the least that any program must do, in one run, on the same files.

By default 8 adapters of rank 16 in bfloat16 on the 224 linear layers of LLaVA-7B's language model: 640 MB in, 640 MB out. The
least is to read these bytes, to write as many as come out, and two products a side of each module: the k x k Gram matrix of
its (m, k) columns (k the ranks together) and one (m, k) x (k, k) product, in float32 and in float64, on all cores in the better
of two arrangements. Files are in the page cache, for both. Also printed: the largest resident memory of the process against
the size of its output and 1 GB.

    python examples/benchmarks/merge_process.py
    python examples/benchmarks/merge_process.py --method ta
"""

from __future__ import annotations

import argparse
import shutil
import statistics
from pathlib import Path
from typing import Any

import torch
from common.command import Outcome, conclude, parsed, parser_of, say, scratch
from common.floor import read, side_products, size_of, write
from common.inputs import Shapes, llama_shapes, write_adapters
from common.process import DC_MERGE, Run, helper, measured
from common.tables import Goal, beyond, goals, markdown, megabytes, seconds, times

QUICK = {"layers": 2, "hidden": 256, "intermediate": 688, "repeat": 1}
ROOM = 1e9  # beyond the output
MOST = 2  # times the least


def floor(files: list[Path], folder: Path, written: int, shapes: Shapes, k: int) -> dict[str, float]:
    """Seconds of each part of the least."""
    folder.mkdir()
    took, content = 0.0, bytearray()
    for file in files:
        one, content = read(file)
        took += one
    least = {"read": took, "write": write(folder / "all", content, written)}
    shutil.rmtree(folder)
    return least | {
        "products_float32": side_products(shapes, k, torch.float32),
        "products_float64": side_products(shapes, k, torch.float64),
    }


def merge(adapters: list[Path], out: Path, method: str) -> tuple[Run, int]:
    """The whole process, and the size of what it wrote."""
    run = measured([*DC_MERGE, "merge", *adapters, "-o", out, "--method", method])
    written = size_of(out.glob("*.safetensors"))
    shutil.rmtree(out)
    return run, written


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Both, in turn, as often as asked."""
    shapes = llama_shapes(args.layers, args.hidden, args.intermediate)
    runs: list[tuple[Run, dict[str, float]]] = []
    with scratch(args) as folder, helper() as beside:
        say(f"making {args.tasks} adapters on {len(shapes)} layers")
        adapters = beside.apply(write_adapters, (folder, shapes, args.tasks, args.rank, torch.bfloat16))
        files = [place / "adapter_model.safetensors" for place in adapters]
        for number in range(args.repeat):
            run, written = merge(adapters, folder / "out", args.method)
            say(f"run {number + 1} of {args.repeat}: dc-merge merge {run.seconds:.1f} s")
            least = beside.apply(floor, (files, folder / "floor", written, shapes, args.tasks * args.rank))
            say(f"the least: {', '.join(f'{part} {value:.2f} s' for part, value in least.items())}")
            runs.append((run, least))
        read_bytes = size_of(files)
    ratios = {
        products: statistics.median(
            run.seconds / (least["read"] + least["write"] + least[f"products_{products}"]) for run, least in runs
        )
        for products in ("float32", "float64")
    }
    return {
        "method": args.method,
        "modules": len(shapes),
        "read_bytes": read_bytes,
        "written_bytes": written,
        "seconds": statistics.median(run.seconds for run, _ in runs),
        "processor_seconds": statistics.median(run.processor_seconds for run, _ in runs),
        "floor_seconds": {part: statistics.median(least[part] for _, least in runs) for part in runs[0][1]},
        "ratios": ratios,
        "peak_bytes": max(run.peak_bytes for run, _ in runs),
    }


def table(outcome: Outcome) -> str:
    """Times, their ratios, and memory, as Markdown."""
    found, settings = outcome["results"], outcome["settings"]
    least, ratios = found["floor_seconds"], found["ratios"]
    extra = found["peak_bytes"] - found["written_bytes"]
    rows = [["the whole process", seconds(found["seconds"]), ""]]
    for dtype in ("float32", "float64"):
        whole = least["read"] + least["write"] + least[f"products_{dtype}"]
        rows.append([f"the least, products in {dtype}", seconds(whole), f"{times(ratios[dtype])} times"])
    rows += [[f"of it: {part.replace('_', ' in ')}", seconds(value), ""] for part, value in least.items()]
    return (
        f"`dc-merge merge --method {found['method']}` of {settings['tasks']} adapters of rank {settings['rank']} on "
        f"{found['modules']} layers, bfloat16, {megabytes(found['read_bytes'])} in, {megabytes(found['written_bytes'])} out "
        f"(median of {settings['repeat']} runs):\n\n{markdown(['what', 'time', 'process against it'], rows)}\n\n"
        f"The process used {seconds(found['processor_seconds'])} of processor time and {megabytes(found['peak_bytes'])} of "
        f"memory, {beyond(extra, 'the size of its output')}."
        + goals(
            [
                *(
                    Goal(f"at most {MOST} times the least with products in {dtype}", ratios[dtype] <= MOST)
                    for dtype in ("float32", "float64")
                ),
                Goal("memory of at most the output and 1 GB", extra <= ROOM, timed=False),
            ],
            outcome,
        )
    )


if __name__ == "__main__":
    parser = parser_of(__doc__)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--intermediate", type=int, default=11008)
    parser.add_argument("--tasks", type=int, default=8)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--method", default="dc")
    parser.add_argument("--repeat", type=int, default=3, help="the median counts")
    conclude(parsed(parser, QUICK), "merge_process", measure, table)

"""``dc-merge fuse`` as a whole process against the least that any program must do, in one run, on the same files.

By default a base model of TinyLlama's shape (1.1 billion random numbers in bfloat16, shards of 600 MB) and four adapters of rank
16 on all linear layers. The least is to read the base model, to form and add one m x n x k product for every module (k the
ranks together), and to write as many bytes; each is timed by itself with everything in the page cache. Also printed: the
largest resident memory of the process, against one shard and 1 GB. Everything is made in a temporary folder of some 5 GB and
deleted.

    python examples/benchmarks/fuse.py
    python examples/benchmarks/fuse.py --layers 4 --hidden 512   # smaller
"""

from __future__ import annotations

import argparse
import shutil
import statistics
from pathlib import Path
from typing import Any

import torch
from common.command import Outcome, conclude, parsed, parser_of, say, scratch
from common.floor import added_products, read, write
from common.inputs import Shapes, write_adapters, write_base
from common.process import DC_MERGE, Run, helper, measured
from common.tables import Goal, beyond, goals, markdown, megabytes, seconds, times

QUICK = {"layers": 2, "hidden": 256, "repeat": 1, "shard": "10MB"}
ROOM = 1e9  # beyond one shard
MOST = 2  # times the least


def floor(base: Path, folder: Path, shapes: Shapes, k: int) -> dict[str, float]:
    """Seconds to read the files, to form and add the products, and to write as many bytes, all of which stay until the end."""
    folder.mkdir()
    seconds = {"read": 0.0, "products": 0.0, "write": 0.0}
    for file in sorted(base.glob("*.safetensors")):
        took, content = read(file)
        seconds["read"] += took
        seconds["write"] += write(folder / file.name, content, len(content))
    seconds["products"] = added_products(shapes, k)
    shutil.rmtree(folder)
    return seconds


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Both, in turn, as often as asked."""
    runs: list[tuple[Run, dict[str, float]]] = []
    with scratch(args) as folder, helper() as beside:
        base, out = folder / "base", folder / "out"
        say("making the base model and the adapters")
        shapes, parameters = beside.apply(write_base, (base, args.layers, args.hidden, args.shard))
        adapters = beside.apply(write_adapters, (folder, shapes, args.tasks, args.rank, torch.bfloat16))
        largest = max(file.stat().st_size for file in base.glob("*.safetensors"))
        for number in range(args.repeat):
            least = beside.apply(floor, (base, folder / "floor", shapes, args.tasks * args.rank))
            say(f"run {number + 1} of {args.repeat}: the least {sum(least.values()):.1f} s")
            words = ["fuse", base, *adapters, "-o", out, "--method", args.method, "--max-shard-size", args.shard]
            run = measured([*DC_MERGE, *words])
            say(f"dc-merge fuse {run.seconds:.1f} s")
            shutil.rmtree(out)
            runs.append((run, least))
    return {
        "method": args.method,
        "parameters": parameters,
        "seconds": statistics.median(run.seconds for run, _ in runs),
        "floor_seconds": {part: statistics.median(least[part] for _, least in runs) for part in runs[0][1]},
        "ratio": statistics.median(run.seconds / sum(least.values()) for run, least in runs),
        "peak_bytes": max(run.peak_bytes for run, _ in runs),
        "largest_shard_bytes": largest,
    }


def table(outcome: Outcome) -> str:
    """Times, their ratio, and memory, as Markdown."""
    found, settings = outcome["results"], outcome["settings"]
    least = found["floor_seconds"]
    extra = found["peak_bytes"] - found["largest_shard_bytes"]
    rows = [
        ["the whole process", seconds(found["seconds"]), ""],
        ["the least", seconds(sum(least.values())), f"{times(found['ratio'])} times"],
        *([f"of it: {part}", seconds(value), ""] for part, value in least.items()),
    ]
    return (
        f"`dc-merge fuse --method {found['method']}` of {settings['tasks']} adapters of rank {settings['rank']} into "
        f"{found['parameters'] / 1e9:.2f} billion parameters in bfloat16 (median of {settings['repeat']} runs):\n\n"
        f"{markdown(['what', 'time', 'process against it'], rows)}\n\nMemory: {megabytes(found['peak_bytes'])}, "
        f"{beyond(extra, 'the largest file')} ({megabytes(found['largest_shard_bytes'])})."
        + goals(
            [
                Goal(f"at most {MOST} times the least", found["ratio"] <= MOST),
                Goal("memory of at most one file and 1 GB", extra <= ROOM, timed=False),
            ],
            outcome,
        )
    )


if __name__ == "__main__":
    parser = parser_of(__doc__)
    parser.add_argument("--layers", type=int, default=22)
    parser.add_argument("--hidden", type=int, default=2048, help="a multiple of 64")
    parser.add_argument("--tasks", type=int, default=4)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--shard", default="600MB", help="largest weight file, in and out")
    parser.add_argument("--method", default="dc")
    parser.add_argument("--repeat", type=int, default=3, help="the median counts")
    conclude(parsed(parser, QUICK), "fuse", measure, table)

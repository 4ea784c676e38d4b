"""``dc-merge fuse`` against mergekit and PEFT: the same sum of adapters into the same base model, each as a whole process.

By default a base model of TinyLlama's shape (1.1 billion random numbers in bfloat16, shards of 600 MB) and four adapters of rank
16 on all linear layers, and a smaller one of 9 layers. The method is task arithmetic, which all three have: base + sum of deltas.

- this library: ``dc-merge fuse --method ta``;
- PEFT: load, ``add_weighted_adapter`` with ``cat``, ``merge_and_unload``, ``save_pretrained`` (common/peft_fuse.py);
- mergekit: ``task_arithmetic`` over ``base+adapter`` references, at the largest size, from an environment of its own:
  ``python -m venv mk; mk/bin/pip install mergekit==0.1.5``, and then ``--mergekit-python mk/bin/python``.

Results are compared tensor by tensor with the exact sum. Memory at the size of a 7B model is a straight line through the sizes
measured. It takes some 15 GB of disk for a while.

    python examples/benchmarks/others.py --mergekit-python mk/bin/python
"""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from common.command import Outcome, conclude, parsed, parser_of, say, scratch
from common.inputs import Shapes, write_adapters, write_base
from common.mergekit import mergekit
from common.process import DC_MERGE, Run, helper, measured, middle
from common.stored import tensor, tensors
from common.tables import Goal, goals, markdown, megabytes, seconds, times

QUICK = {"layers": [1, 2], "hidden": 128, "shard": "10MB", "repeat": 1}
LARGE = 6_738_415_616  # parameters of Llama-2-7B
PEFT_FUSE = Path(__file__).parent / "common/peft_fuse.py"


def commands(base: Path, adapters: list[Path], out: Path, args: argparse.Namespace) -> dict[str, list[str | Path]]:
    """The command line of each program that writes the fused model to ``out``."""
    words: dict[str, list[str | Path]] = {
        "dc-merge": [*DC_MERGE, "fuse", base, *adapters, "-o", out, "--method", "ta", "--max-shard-size", args.shard],
        "PEFT": [sys.executable, PEFT_FUSE, base, out, args.shard, *adapters],
    }
    if args.mergekit_python:
        models = [{"model": f"{base}+{adapter}", "parameters": {"weight": 1.0}} for adapter in adapters]
        flags = ["--lora-merge-cache", base.parent / "cache", "--out-shard-size", "300M"]
        words["mergekit"] = [*mergekit(args.mergekit_python, "task_arithmetic", base, models, out), *flags]
    return words


def equality(base: Path, adapters: list[Path], first: Path, other: Path, modules: list[str]) -> dict[str, float]:
    """How far both results are from the exact sum, relative to the change of the weights, and the share of equal numbers."""
    places = {folder: tensors(folder) for folder in (base, first, other, *adapters)}
    wrong = {first: 0.0, other: 0.0}
    changed, equal, count = 0.0, 0, 0
    for module in modules:
        name = f"{module}.weight"
        before = tensor(places[base], name).double()
        delta = torch.zeros_like(before)
        for adapter in adapters:
            key = f"base_model.model.{module}.lora_{{}}.weight"
            B, A = (tensor(places[adapter], key.format(x)).double() for x in "BA")
            delta += B @ A
        results = {folder: tensor(places[folder], name) for folder in (first, other)}
        changed += float(delta.square().sum())
        for folder, result in results.items():
            wrong[folder] += float((result.double() - before - delta).square().sum())
        equal += int((results[first] == results[other]).sum())
        count += delta.numel()
    return {
        "error_of_dc_merge": (wrong[first] / changed) ** 0.5,
        "error": (wrong[other] / changed) ** 0.5,
        "equal_share": equal / count,
    }


def one_size(layers: int, largest: bool, args: argparse.Namespace) -> dict[str, Any]:
    """All programs on one base model; mergekit on the largest one only."""
    runs: dict[str, list[Run]] = {}
    same: dict[str, dict[str, float]] = {}
    with scratch(args) as folder, helper() as beside:
        base = folder / "base"
        say(f"making a base model of {layers} layers and the adapters")
        shapes, parameters = beside.apply(write_base, (base, layers, args.hidden, args.shard))
        adapters = beside.apply(write_adapters, (folder, shapes, args.tasks, args.rank, torch.bfloat16))
        compared = spread(shapes, args.compared)
        for number in range(args.repeat):
            kept = folder / "dc-merge"
            for name, words in commands(base, adapters, folder / "out", args).items():
                if name == "mergekit" and not (largest and number == 0):
                    continue
                run = measured(words)
                say(f"{name}: {run.seconds:.1f} s, {run.peak_bytes / 1e6:.0f} MB")
                runs.setdefault(name, []).append(run)
                if name == "dc-merge":
                    shutil.rmtree(kept, ignore_errors=True)
                    (folder / "out").rename(kept)
                    continue
                if name not in same:
                    same[name] = beside.apply(equality, (base, adapters, kept, folder / "out", compared))
                shutil.rmtree(folder / "out")
                shutil.rmtree(folder / "cache", ignore_errors=True)
    programs = {name: {**middle(took), "same": same.get(name)} for name, took in runs.items()}
    return {"layers": layers, "parameters": parameters, "programs": programs}


def spread(shapes: Shapes, count: int) -> list[str]:
    """So many modules from all over the model, of every kind."""
    names = list(shapes)
    step = max(len(names) // count, 1)
    return names[:: step + (step % 7 == 0)][:count]  # seven kinds a layer


def line(found: list[dict[str, Any]], program: str) -> dict[str, float]:
    """Memory over parameters through the smallest and the largest size, and its value for a 7B model."""
    (x0, y0), (x1, y1) = (
        (size["parameters"], size["programs"][program]["peak_bytes"]) for size in (found[0], found[-1])
    )
    slope = (y1 - y0) / (x1 - x0)
    return {"bytes_per_parameter": slope, "bytes_at_zero": y0 - slope * x0, "bytes_at_7b": y0 + slope * (LARGE - x0)}


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Every size, and memory of a 7B model."""
    if not args.mergekit_python:
        say("without --mergekit-python: mergekit is left out")
    found = [one_size(layers, layers == max(args.layers), args) for layers in sorted(args.layers)]
    fits = {name: line(found, name) for name in ("dc-merge", "PEFT")} if len(found) > 1 else {}
    return {"sizes": found, "memory": fits}


def table(outcome: Outcome) -> str:
    """Times and memory of each size, the fit, and the goals, as Markdown."""
    found, settings = outcome["results"], outcome["settings"]
    rows = []
    for size in found["sizes"]:
        ours = size["programs"]["dc-merge"]
        for name, program in size["programs"].items():
            same = program["same"]
            rows.append(
                [
                    f"{name}, {size['parameters'] / 1e9:.2f} billion parameters",
                    seconds(program["seconds"]),
                    f"{times(program['seconds'] / ours['seconds'])}",
                    megabytes(program["peak_bytes"]),
                    f"{(same['error'] if same else size['programs']['PEFT']['same']['error_of_dc_merge']):.1e}",
                    f"{same['equal_share']:.1%}" if same else "",
                ]
            )
    head = ["program", "time", "of dc-merge's", "memory", "error", "equal to dc-merge's"]
    text = (
        f"Task arithmetic of {settings['tasks']} adapters of rank {settings['rank']} into a bfloat16 model. Error: of the change "
        f"of the weights, against the exact sum; equal: the share of numbers that are the same in both results. Both on "
        f"{settings['compared']} layers or all of them if fewer.\n\n{markdown(head, rows)}"
    )
    last = found["sizes"][-1]["programs"]
    ours, theirs = last["dc-merge"], last["PEFT"]
    wanted = [Goal("no slower than PEFT", ours["seconds"] <= theirs["seconds"])]
    if "mergekit" in last:
        wanted.append(Goal("at least 5 times as fast as mergekit", last["mergekit"]["seconds"] >= 5 * ours["seconds"]))
    else:
        text += "\n\nmergekit was not measured."
    if found["memory"]:
        rows = [
            [
                name,
                f"{fit['bytes_per_parameter']:.2f} bytes a parameter",
                megabytes(fit["bytes_at_zero"]),
                megabytes(fit["bytes_at_7b"]),
            ]
            for name, fit in found["memory"].items()
        ]
        text += f"\n\nMemory at a 7B model, by the straight line through {len(found['sizes'])} sizes:\n\n" + markdown(
            ["program", "slope", "at none", "at 6.7 billion"], rows
        )
        third = found["memory"]["PEFT"]["bytes_at_7b"] / 3
        wanted.append(
            Goal(
                "at most a third of PEFT's memory at 7B",
                found["memory"]["dc-merge"]["bytes_at_7b"] <= third,
                timed=False,
            )
        )
    return text + goals(wanted, outcome)


if __name__ == "__main__":
    parser = parser_of(__doc__)
    parser.add_argument("--layers", type=int, nargs="+", default=[9, 22], help="sizes of the base model")
    parser.add_argument("--hidden", type=int, default=2048, help="a multiple of 64")
    parser.add_argument("--tasks", type=int, default=4)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--shard", default="600MB", help="largest weight file, in and out")
    parser.add_argument("--compared", type=int, default=28, help="layers whose numbers are compared")
    parser.add_argument("--repeat", type=int, default=3, help="the median counts; mergekit runs once")
    parser.add_argument("--mergekit-python", metavar="PATH", help="python of an environment with mergekit 0.1.5")
    conclude(parsed(parser, QUICK), "others", measure, table)

"""DC-Merge in factor space against the dense route of the paper, and against PEFT's own ``svd``, in one run, on the same adapters.

Random adapters with long-tailed spectra: by default 8 of rank 16 on 96 modules of 1024 x 1024 (ViT-L/14's attention) and on
32 of 4096 x 4096 (a 7B model's).

The time in factor space is that of ``DCMergeAdapter().merge`` from files in the page cache until all merged factors are in
memory, over all modules, divided by their number: reading, checking and everything else is in it. The dense route takes seconds
to minutes a module, so it runs on a few of them, spread evenly, and starts from factors in memory. Of all the shortest time counts. PEFT's ``svd`` and this
library's types go through the same ``add_weighted_adapter`` on a model in memory. Results are compared too: a ratio of different
answers means nothing.

    python examples/benchmarks/factor_space.py
    python examples/benchmarks/factor_space.py --size 1024 1024
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from common.command import Outcome, conclude, parsed, parser_of, say, scratch
from common.inputs import Factors, equal_shapes, long_tailed, write_adapters
from common.live import peft_against_ours
from common.process import helper
from common.tables import Goal, goals, markdown, seconds, times
from safetensors import safe_open
from torch import Tensor

from dc_merge_peft import DCMergeAdapter, DCMergeConfig, LowRank

DENSITY = 1e-3
RHO = 5.0
# Modules in factor space, modules in the dense route, modules of the model for PEFT's svd.
CASES = {(1024, 1024): (96, 4, 4), (4096, 4096): (32, 1, 1)}
GOALS = {(1024, 1024): (100, None), (4096, 4096): (1000, 500)}  # times as fast as dense, as PEFT's svd
QUICK = {"size": (256, 256), "modules": 4, "dense_modules": 2, "peft_modules": 1}


def dense_dc_merge(tasks: Sequence[Factors], rank: int) -> Tensor:
    """Algorithm 1 on m x n matrices, as published: a full SVD of every task vector, linear smoothing, whitening by SVD,
    TIES on k x k entries, block mask. Float32 throughout."""
    k = rank * len(tasks)
    bases_U, bases_V, smoothed = [], [], []
    for task in tasks:
        U, S, Vh = torch.linalg.svd(task.B @ task.A, full_matrices=False)
        U, S, Vh = U[:, :rank], S[:rank], Vh[:rank]
        line = torch.linspace(min(float(S[0] / S[-1]), RHO), 1.0, rank)
        S = S.sum() * line / line.sum()
        bases_U.append(U)
        bases_V.append(Vh.mT)
        smoothed.append((U * S) @ Vh)
    P, _, Qh = torch.linalg.svd(torch.cat(bases_U, dim=1), full_matrices=False)
    U_cover = P @ Qh
    P, _, Qh = torch.linalg.svd(torch.cat(bases_V, dim=1), full_matrices=False)
    V_cover = P @ Qh
    cores = torch.stack([U_cover.mT @ delta @ V_cover for delta in smoothed])
    magnitudes = cores.abs().flatten(1)
    threshold = magnitudes.topk(max(int(DENSITY * k * k), 1)).values[:, -1]
    trimmed = cores * (cores.abs() >= threshold[:, None, None])
    agreeing = trimmed * (trimmed.sign() == trimmed.sum(0).sign())
    merged = agreeing.sum(0) / (agreeing != 0).sum(0).clamp(min=1)
    mask = torch.block_diag(*[torch.ones(rank, rank)] * len(tasks))
    return U_cover @ (merged * mask) @ V_cover.mT


def in_factor_space(adapters: list[Path], repeat: int) -> tuple[float, dict[str, LowRank]]:
    """Shortest time for all modules, and their merged factors; the first time counts for nothing, as it imports."""
    # The published code keeps int(1e-3 k^2) entries; "auto" would keep more only below the paper's settings.
    merger = DCMergeAdapter(DCMergeConfig(smoothing="linear", rho=RHO, density="auto", alpha=1.0))
    took: list[float] = []
    factors: dict[str, LowRank] = {}
    for _ in range(repeat + 1):
        factors.clear()
        start = time.perf_counter()
        merged = merger.merge(adapters, progress=False)
        factors = {name: merged.lowrank(name) for name in merged.modules}
        took.append(time.perf_counter() - start)
    return min(took[1:]), factors


def stored(adapters: list[Path], module: str) -> list[Factors]:
    """The factors of every adapter in one module, from its file."""
    found = []
    for adapter in adapters:
        with safe_open(adapter / "adapter_model.safetensors", framework="pt") as file:
            found.append(Factors(*(file.get_tensor(f"base_model.model.{module}.lora_{x}.weight") for x in "BA")))
    return found


def one_case(args: argparse.Namespace, size: tuple[int, int], folder: Path) -> dict[str, Any]:
    """One shape by all routes."""
    m, n = size
    usual = CASES.get(size, (32, 2, 1))
    given = (args.modules, args.dense_modules, args.peft_modules)
    modules, dense_modules, peft_modules = (one if one is not None else default for one, default in zip(given, usual))
    say(f"{m} x {n}: making {args.tasks} adapters on {modules} modules")
    shapes = equal_shapes(modules, m, n)
    with helper() as beside:
        adapters = beside.apply(write_adapters, (folder, shapes, args.tasks, args.rank, torch.float32, long_tailed))
    whole, merged = in_factor_space(adapters, args.repeat)
    say(f"in factor space: {whole:.2f} s, {whole / modules * 1e3:.1f} ms a module")
    dense_times, differences = [], []
    for name in list(merged)[:: max(modules // max(dense_modules, 1), 1)][:dense_modules]:
        tasks = stored(adapters, name)
        start = time.perf_counter()
        expected = dense_dc_merge(tasks, args.rank)
        dense_times.append(time.perf_counter() - start)
        differences.append(float(torch.linalg.norm(merged[name].dense() - expected) / torch.linalg.norm(expected)))
        say(f"dense: {dense_times[-1]:.1f} s for a module, difference {differences[-1]:.1e}")
    dense = min(dense_times)
    del merged
    # Before and after the dense route, so that a quiet moment counts for one side no more than for the other.
    whole = min(whole, in_factor_space(adapters, args.repeat)[0])
    say(f"in factor space, with a second try: {whole:.2f} s")
    tasks = stored(adapters, next(iter(shapes)))
    return {
        "shape": [m, n],
        "modules": modules,
        "seconds_all_modules": whole,
        "seconds_per_module": whole / modules,
        "dense_modules": len(dense_times),
        "dense_seconds_per_module": dense,
        "ratio": dense * modules / whole,
        "largest_relative_difference": max(differences),
        "peft": peft_against_ours(tasks, modules, peft_modules, args.repeat) if peft_modules else None,
    }


def measure(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Every shape."""
    if args.threads:
        torch.set_num_threads(args.threads)
    found = []
    for size in [tuple(args.size)] if args.size else CASES:
        with scratch(args) as folder:
            found.append(one_case(args, size, folder))
    return found


def table(outcome: Outcome) -> str:
    """Times a module and their ratios, as Markdown."""
    settings = outcome["settings"]
    rows, against_peft, wanted = [], [], []
    for case in outcome["results"]:
        m, n = case["shape"]
        dense_goal, peft_goal = GOALS.get((m, n), (None, None))
        rows.append(
            [
                f"{m} x {n}, {case['modules']} modules",
                seconds(case["seconds_per_module"]),
                seconds(case["dense_seconds_per_module"]),
                f"{times(case['ratio'])} times",
                f"{case['largest_relative_difference']:.0e}",
            ]
        )
        if dense_goal:
            text = f"at {m} x {n} at least {dense_goal} times as fast as the dense route, with the same result to 1e-4"
            met = case["ratio"] >= dense_goal and case["largest_relative_difference"] < 1e-4
            wanted.append(Goal(text, met))
        if case["peft"]:
            ours = case["peft"]["ours"]
            against_peft.append(
                [
                    f"{m} x {n}",
                    seconds(case["peft"]["svd_seconds_per_module"]),
                    *(
                        f"{seconds(ours[kind]['seconds_per_module'])} ({times(ours[kind]['ratio'])} times)"
                        for kind in ("ta", "dc")
                    ),
                    f"{case['peft']['relative_difference']:.0e}",
                ]
            )
            if peft_goal:
                met = min(ours[kind]["ratio"] for kind in ours) >= peft_goal
                wanted.append(Goal(f"at {m} x {n} at least {peft_goal} times as fast as PEFT's `svd`", met))
    head = ["shape", "factor space", "dense route", "ratio", "difference"]
    text = (
        f"DC-Merge of {settings['tasks']} adapters of rank {settings['rank']}, time a module:\n\n{markdown(head, rows)}"
    )
    if against_peft:
        head = ["shape", "PEFT, `svd`", "here, `ta`", "here, `dc`", "`ta` against `svd`"]
        text += (
            f"\n\n`add_weighted_adapter`, time a module; `svd` and `ta` cut the sum to rank {settings['rank']}, and the last "
            f"column is the difference of their results:\n\n{markdown(head, against_peft)}"
        )
    return text + goals(wanted, outcome)


if __name__ == "__main__":
    parser = parser_of(__doc__)
    parser.add_argument("--size", type=int, nargs=2, metavar=("M", "N"), help="one shape alone")
    parser.add_argument("--modules", type=int, help="merged in factor space")
    parser.add_argument("--dense-modules", type=int, help="merged by the dense route, spread evenly")
    parser.add_argument("--peft-modules", type=int, help="merged by PEFT's svd; 0 for none")
    parser.add_argument("--tasks", type=int, default=8)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--threads", type=int, help="torch threads, for all routes; torch's choice by default")
    parser.add_argument(
        "--repeat",
        type=int,
        default=3,
        help="in factor space, before and after the dense route; the shortest counts, as it does of the dense route",
    )
    conclude(parsed(parser, QUICK), "factor_space", measure, table)

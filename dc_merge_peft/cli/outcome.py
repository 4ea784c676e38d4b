"""What ``dc-merge merge`` says when it is done, or would do: for people, or as one JSON object."""

from __future__ import annotations

import json
from pathlib import Path

import typer

from dc_merge_peft.cli.show import bytes_in_words, console, say, table
from dc_merge_peft.merged import MergedAdapter
from dc_merge_peft.outputs.rows import GROUP_COLUMNS, grouped_modules
from dc_merge_peft.plan import MergePlan
from dc_merge_peft.runconfig import RunConfig, run_record


def print_plan(plan: MergePlan, run: RunConfig, *, as_json: bool) -> None:
    """What would be merged, from configs and headers alone."""
    summary = plan.summary()
    if as_json:
        adapters = [
            {"name": info.name, "location": info.location, "base_model": info.base_model} for info in plan.adapters
        ]
        typer.echo(
            json.dumps({"dry_run": True, **run.to_dict(), **summary, "sources": adapters, "remarks": plan.remarks})
        )
        return
    out = console()
    counts = [sum(index in module.tasks for module in plan.modules) for index in range(len(plan.adapters))]
    ranks = [
        sorted({module.ranks[module.tasks.index(i)] for module in plan.modules if i in module.tasks})
        for i in range(len(plan.adapters))
    ]
    rows = [
        (
            info.name,
            info.base_model or "?",
            count,
            "-".join(str(r) for r in dict.fromkeys((rank[0], rank[-1]))),
            f"{weight:g}",
        )
        for info, count, rank, weight in zip(plan.adapters, counts, ranks, plan.weights, strict=True)
    ]
    columns = ("adapter", "base model", "modules", "rank", "weight")
    out.print(table("Adapters", columns, rows, right=("modules", "rank", "weight")))
    out.print(
        f"\n{summary['modules']} modules, {summary['shared_by_all']} of them in every adapter; merged rank at most "
        f"{summary['largest_rank']}, at most {bytes_in_words(summary['largest_bytes'])} in {summary['dtype']}"
    )
    for remark in plan.remarks:
        say(out, f"note: {remark}")
    out.print("dry run: nothing was merged or written")


def print_outcome(merged: MergedAdapter, output: str | None, url: str | None, seconds: float, *, as_json: bool) -> None:
    """The summary: modules by kind, ranks, truncation error, time, and how to go on."""
    if as_json:
        outcome = {
            **run_record(merged),
            "output": output,
            "url": url,
            "remarks": merged.remarks,
            "seconds": {"merge": merged.seconds, "total": seconds},
            "modules": merged.report(),
        }
        typer.echo(json.dumps(outcome))
        return
    out = console()
    out.print(table("Merged modules", GROUP_COLUMNS, grouped_modules(merged), right=GROUP_COLUMNS[1:]))
    out.print(
        f"\n{len(merged.adapters)} adapters, method {merged.method}, alpha {merged.alpha:.4g}"
        f"{' (auto)' if merged.options.get('alpha') == 'auto' else ''}, "
        f"truncation error {merged.truncation_error:.2%}, {merged.seconds:.2f} s to read and merge, {seconds:.2f} s in all",
        markup=False,
    )
    for remark in merged.remarks:
        say(out, f"note: {remark}")
    if output is not None:
        size = sum(file.stat().st_size for file in Path(output).expanduser().iterdir() if file.is_file())
        say(out, f"written to {output} ({bytes_in_words(size)}): PeftModel.from_pretrained(base, '{output}')")
    if url is not None:
        say(out, f"uploaded: {url}")

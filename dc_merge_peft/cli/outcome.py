"""What ``dc-merge merge``, ``fuse`` and ``merge-full`` say when they are done, or would do: for people, or as one JSON object."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import typer
from rich.console import Console

from dc_merge_peft.cli.show import bytes_in_words, console, drawn, say, table
from dc_merge_peft.full_plan import FullPlan
from dc_merge_peft.fusing import FusePlan
from dc_merge_peft.outputs.rows import from_to, in_a_line, merged_table
from dc_merge_peft.paths import is_file
from dc_merge_peft.plan import MergePlan
from dc_merge_peft.result import MergeResult
from dc_merge_peft.runconfig import RunConfig, run_record


def print_plan(plan: MergePlan, run: RunConfig, *, as_json: bool) -> None:
    """What would be merged, from configs and headers alone."""
    summary = plan.summary()
    if as_json:
        typer.echo(json.dumps({**_planned(plan, run), **summary, "remarks": plan.remarks}))
        return
    out = console()
    _print_adapters(out, plan)
    out.print(
        f"\n{_modules(summary['modules'])}, {summary['shared_by_all']} of them in every adapter; merged rank at most "
        f"{summary['largest_rank']}, at most {bytes_in_words(summary['largest_bytes'])} in {summary['dtype']}"
    )
    print_remarks(out, plan.remarks)
    out.print("dry run: nothing was merged or written")


def print_fuse_plan(plan: FusePlan, run: RunConfig, *, as_json: bool) -> None:
    """What would be fused, and how large it would be."""
    summary = plan.summary()
    if as_json:
        typer.echo(json.dumps({**_planned(plan.merge, run), **summary, "remarks": plan.remarks}))
        return
    out = console()
    _print_adapters(out, plan.merge)
    if plan.tensors:
        files = "1 file" if plan.shards == 1 else f"{plan.shards} files"
        out.print()
        say(
            out,
            f"{_modules(summary['modules'])}; {plan.changed} of {plan.tensors} tensors of {plan.base} would change "
            f"({bytes_in_words(plan.changed_bytes)} of {bytes_in_words(plan.total_bytes)}), written to {files}",
        )
    print_remarks(out, plan.remarks)
    out.print("dry run: nothing was merged or written")


def print_full_plan(plan: FullPlan, run: RunConfig, *, as_json: bool) -> None:
    """What would become of each tensor."""
    summary = plan.summary()
    if as_json:
        sources = [{"name": info.name, "location": info.location} for info in plan.merge.adapters]
        typer.echo(
            json.dumps({"dry_run": True, **run.to_dict(), "sources": sources, **summary, "remarks": plan.remarks})
        )
        return
    out = console()
    rows = [(info.name, f"{weight:g}") for info, weight in zip(plan.merge.adapters, plan.merge.weights, strict=True)]
    out.print(table("Models", ("model", "weight"), rows, right=("weight",)))
    out.print()
    say(
        out,
        f"{len(plan.base.files.tensors)} tensors of {summary['base']} ({bytes_in_words(summary['total_bytes'])}): {summary['merged']} "
        f"merged, {summary['averaged']} averaged, {summary['copied']} copied",
    )
    print_remarks(out, plan.remarks)
    out.print("dry run: nothing was merged or written")


def print_outcome(
    merged: MergeResult,
    output: str | None,
    url: str | None,
    remarks: Sequence[str],
    seconds: float,
    *,
    full_model: bool,
    as_json: bool,
) -> None:
    """The summary: modules by kind, ranks, truncation error, what became of full models' other tensors, time, and how to go on."""
    if as_json:
        typer.echo(json.dumps(_record(merged, output, url, remarks, seconds)))
        return
    out = console()
    _print_merged(out, merged, seconds)
    if (full := merged.full) is not None:
        others = "" if full.lora else f", {full.averaged} averaged, {full.copied} as in the base model"
        say(out, f"{full.merged} tensors merged{others}")
    print_remarks(out, remarks)
    if output is not None:
        how = f"PeftModel.from_pretrained(base, '{output}')"
        if full_model:
            how = "a full model, which transformers loads by its path"
        say(out, f"written to {output} ({_size_of(output)}): {how}")
    if url is not None:
        say(out, f"uploaded: {url}")


def _modules(count: int) -> str:
    return f"{count} module{'s' * (count != 1)}"


def _planned(plan: MergePlan, run: RunConfig) -> dict[str, Any]:
    adapters = [{"name": info.name, "location": info.location, "base_model": info.base_model} for info in plan.adapters]
    return {"dry_run": True, **run.to_dict(), "sources": adapters}


def _record(
    merged: MergeResult, output: str | None, url: str | None, remarks: Sequence[str], seconds: float
) -> dict[str, Any]:
    """Plain values of a finished merge."""
    return {
        **run_record(merged),
        "output": output,
        "url": url,
        "remarks": remarks,
        "seconds": {"merge": merged.seconds, "total": seconds},
        "modules": merged.report(),
    }


def _print_adapters(out: Console, plan: MergePlan) -> None:
    ranks = [
        sorted(module.ranks[module.tasks.index(i)] for module in plan.modules if i in module.tasks)
        for i in range(len(plan.adapters))
    ]
    rows = [
        (info.name, info.base_model or "?", len(own), from_to(own), f"{weight:g}")
        for info, own, weight in zip(plan.adapters, ranks, plan.weights, strict=True)
    ]
    columns = ("adapter", "base model", "modules", "rank", "weight")
    out.print(table("Adapters", columns, rows, right=("modules", "rank", "weight")))


def _print_merged(out: Console, merged: MergeResult, seconds: float) -> None:
    """The table of modules, and the merge in a line."""
    out.print(drawn(merged_table(merged)))
    out.print(f"\n{in_a_line(merged)}, {seconds:.2f} s in all", markup=False)


def print_remarks(out: Console, remarks: Sequence[str]) -> None:
    """A line each."""
    for remark in remarks:
        say(out, f"note: {remark}")


def _size_of(folder: str) -> str:
    """Of its files, in words."""
    files = Path(folder).expanduser().rglob("*")
    return bytes_in_words(sum(file.stat().st_size for file in files if is_file(file)))

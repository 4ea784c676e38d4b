"""All accuracy benchmarks, one after the other: from packages to adapters to measurements to the pages of the docs, offline, on a CPU.

python -m examples.benchmarks.everything                        # all stages of all; what is done already is kept
python -m examples.benchmarks.everything evaluate study figures report directions pages    # from cached adapters
python -m examples.benchmarks.everything --brief    # all tables and the figures of adapters at a smaller scale, into pages in the cache
python -m examples.benchmarks.everything pages      # from what is saved in the docs
python -m examples.benchmarks.everything check      # a part of what is published, made again and compared with it

data, train, evaluate, report: as each benchmark by itself has them. study: rules that may become methods, and rules for alpha, on
validation examples. figures: the paper's figures. directions: DirSim where the best method is another than DC-Merge. pages: docs/benchmarks.md, its first table in the README, the guide of
docs/methods/index.md, and docs/figures. check: every method on eight tasks with the first seed, measured again, with adapters trained where there
are none; it writes nothing but into the cache and is no part of "all stages". A run may be stopped at any time and goes on where it was.

--brief: one seed of adapters, one group of each number of tasks, few examples. It has measurements of its own, shares adapters with the full
scale, and leaves the repository's docs alone.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import study
import study_alpha
from accuracy.command import BRIEF, STAGES, results_folder
from accuracy.evaluate import Rows
from accuracy.workers import ending_together, say

from everything import brief
from everything.charts import FOLDER, KEPT, write_charts
from everything.check import Checked, check, checked_tasks, table
from everything.directions import saved_dir_sims, write_dir_sims
from everything.drawn import figures_page
from everything.found import Found, saved
from everything.guide import caution, short, with_guide
from everything.page import section, with_section
from everything.studied import ALPHA_STUDY, IDEAS, STUDY, alphas_studied, studies
from everything.tables import glance
from everything.texts import glance_text, own_text

ROOT = Path(__file__).resolve().parent.parent.parent.parent
# Folder of the docs by package, in the order in which they are made; full models come from the texts of the first.
BENCHMARKS = {"text8": "text8", "vision": "vision", "language": "language", "text8_fft": "text8-fft"}
DRAWN = ("text8", "vision", "text8_fft")  # of which figures are drawn
DIRECTIONS = "rows-directions.jsonl"  # in the results of each benchmark's cache
CHECK, CHECKED = "check", "rows-check.jsonl"  # a stage that is run where it is named, and its rows in each cache
EVERY_STAGE = (*STAGES[:-1], "study", "figures", STAGES[-1], "directions", "pages")


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line's options."""
    parser = argparse.ArgumentParser(
        prog="everything", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "stages", nargs="*", metavar="STAGE", help=f"of {', '.join(EVERY_STAGE)}; default: all of them; or {CHECK}"
    )
    parser.add_argument(
        "--cache",
        type=Path,
        default=Path.home() / ".cache" / "dc-merge-peft",
        metavar="DIR",
        help="a folder for each benchmark lies in it",
    )
    parser.add_argument(
        "--docs",
        type=Path,
        metavar="DIR",
        help="pages to write into (default: those of the repository, with --brief CACHE/brief/docs)",
    )
    parser.add_argument("--brief", action="store_true", help="everything at a smaller scale")
    parser.add_argument(
        "--only",
        nargs="+",
        choices=list(BENCHMARKS),
        default=list(BENCHMARKS),
        metavar="NAME",
        help=f"of {', '.join(BENCHMARKS)}",
    )
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes (default: one a processor)")
    options = parser.parse_args(arguments)
    stages = (*EVERY_STAGE, CHECK)
    if unknown := sorted(set(options.stages) - set(stages)):
        parser.error(f"found the stage {unknown[0]!r}: expected some of {', '.join(stages)}")
    if options.brief and CHECK in options.stages:
        parser.error(f"found {CHECK} with --brief: expected one of the two; {CHECK} compares with the full scale")
    options.stages = options.stages or list(EVERY_STAGE)
    options.docs = options.docs or (options.cache / BRIEF / "docs" if options.brief else ROOT / "docs")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the stages that are asked for, and say how long each benchmark took."""
    options = parse(arguments)
    if options.brief:
        brief.make_pages(options.docs, ROOT, list(BENCHMARKS.values()))
    for name in options.only:
        if stages := [stage for stage in STAGES if stage in options.stages]:
            start = time.perf_counter()
            _run(name, stages, options)
            say(f"{name}: {', '.join(stages)}, in {time.perf_counter() - start:.0f} s")
    for name in options.only:
        if "study" in options.stages and name in (brief.STUDIED if options.brief else study.SUITES):
            _study(name, options)
    if "figures" in options.stages:
        for name in brief.DRAWN if options.brief else DRAWN:
            if name in options.only:
                _draw(name, options)
    for name in options.only:
        if "directions" in options.stages:
            _measure_directions(name, options)
    if "pages" in options.stages:
        write_pages(options.docs)
    if CHECK in options.stages:
        print(table({BENCHMARKS[name]: _check(name, options) for name in options.only}))
    say("all that was asked for is done")
    return 0


def write_pages(docs: Path) -> None:
    """The page of all benchmarks with its pictures, its first table in the README, the guide, and pages of figures, from what is saved in the docs."""
    write_charts(saved(docs, list(BENCHMARKS.values())), docs)
    for page, text in pages(docs).items():
        page.write_text(text, encoding="utf-8")


def pages(docs: Path) -> dict[Path, str]:
    """What is to be written, by its place."""
    found = saved(docs, list(BENCHMARKS.values()))
    page, guide, readme = docs / "benchmarks.md", docs / "methods/index.md", docs.parent / "README.md"
    text = {place: place.read_text(encoding="utf-8") for place in (page, guide, readme)}
    drawn, folders = _drawn(docs), {name: docs / name for name in BENCHMARKS.values()}
    return {
        page: with_section(
            text[page],
            section(
                found,
                drawn,
                studies(folders),
                alphas_studied(folders),
                saved_dir_sims(docs, [one.name for one in found]),
            ),
        ),
        guide: with_guide(text[guide], found),
        readme: with_section(text[readme], "\n\n".join(in_readme(found))),
        **{folder.with_suffix(".md"): figures_page(name, folder) for name, folder in drawn.items()},
    }


def in_readme(found: Sequence[Found]) -> list[str]:
    """The paragraphs of the README: the first picture and table, our own method, and what to take."""
    take = f"**What to take**, by the number of adapters ([how they rank](docs/methods/index.md#what-to-take)). {short(found)} {caution(found)}"
    picture = f"![{KEPT.alt}](docs/{FOLDER}/{KEPT.name}.svg)"
    return [picture, glance_text(found), glance(found, "auto"), own_text(found), take]


def _drawn(docs: Path) -> dict[str, Path]:
    """Folders of figures by benchmark, as far as they were drawn."""
    from figures.page import ABOUT

    folders = {BENCHMARKS[name]: docs / "figures" / BENCHMARKS[name] for name in DRAWN}
    return {name: folder for name, folder in folders.items() if (folder / ABOUT).is_file()}


def _draw(name: str, options: argparse.Namespace) -> None:
    """The figures of one benchmark."""
    from figures.command import main

    cache, work = options.cache / name, options.cache / "figures" / (BRIEF if options.brief else "") / name
    out = options.docs / "figures" / BENCHMARKS[name]
    arguments = ["--suite", name, "--cache", str(cache), "--work", str(work), "--out", str(out)]
    main([*arguments, *(brief.FIGURES if options.brief else ()), "--workers", str(options.workers)])


def _study(name: str, options: argparse.Namespace) -> None:
    """The default families of one benchmark, ideas around the one that was chosen (not at the smaller scale), and what decides alpha; made where
    they have not been made."""
    programs: list[tuple[Callable[[Sequence[str]], object], str, Sequence[str], Sequence[str]]] = [
        (study.main, STUDY, (), brief.STUDY),
        (study.main, IDEAS, ("--ideas", "--counts", "4", "8"), ()),
        (study_alpha.main, ALPHA_STUDY, (), brief.ALPHA_STUDY),
    ]
    for main, file, full, smaller in programs:
        out = options.docs / BENCHMARKS[name] / file
        if out.is_file():
            say(f"{name}: studied already; delete {out} to do it again")
            continue
        scale = smaller if options.brief else full
        if options.brief and not scale:
            continue
        out.parent.mkdir(parents=True, exist_ok=True)
        cache, workers = str(options.cache / name), str(options.workers)
        main([name, "--cache", cache, *scale, "--workers", workers, "--out", str(out)])


def _measure_directions(name: str, options: argparse.Namespace) -> None:
    """How well directions are kept where one benchmark's best method is another than DC-Merge."""
    (found,) = saved(options.docs, [BENCHMARKS[name]])
    cache = options.cache / name
    suite = importlib.import_module(f"{name}.command").suite(cache, tuple(found.data["seeds"]))
    rows = Rows(results_folder(cache, options.brief) / DIRECTIONS)
    with ending_together():
        write_dir_sims(suite, found, options.docs / found.name, rows, options.workers)


def _check(name: str, options: argparse.Namespace) -> list[Checked]:
    """What of one benchmark comes out as it is published."""
    (published,) = saved(options.docs, [BENCHMARKS[name]])
    start = time.perf_counter()
    _run(name, STAGES[:1], options)  # the data
    suite = importlib.import_module(f"{name}.command").suite(options.cache / name, (published.data["seeds"][0],))
    suite = dataclasses.replace(suite, tasks=suite.tasks[: checked_tasks(published)])
    with ending_together():
        found = check(suite, published, Rows(options.cache / name / "results" / CHECKED), options.workers)
    say(f"{name}: checked, in {time.perf_counter() - start:.0f} s")
    return found


def _run(name: str, stages: Sequence[str], options: argparse.Namespace) -> None:
    """One benchmark, by its own command."""
    docs = options.docs / BENCHMARKS[name]
    arguments = [*stages, "--cache", str(options.cache / name), "--workers", str(options.workers)]
    arguments += ["--page", f"{docs}.md", "--out", str(docs), *(["--brief"] if options.brief else [])]
    status = importlib.import_module(f"{name}.command").main(arguments)
    if status:
        raise SystemExit(status)

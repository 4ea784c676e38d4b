"""``dc-merge merge-full`` against mergekit: full fine-tuned models of one base model, each program as a whole process.

By default four models of 0.4 billion numbers in bfloat16, of TinyLlama's width and six layers. Two methods that both programs have:

- task arithmetic, base + sum of differences: ``--method ta --alpha 1`` and mergekit's ``task_arithmetic``, whose results are compared with
  the exact sum, on matrices (``merge-full`` averages embeddings, norms and heads, mergekit adds them up);
- TIES at density 0.2: ``--method ties`` and mergekit's ``ties``. Their results differ by design: thresholds over a whole model here, as in the
  authors' code, and tensor by tensor there.

Beside them ``dc``, which mergekit does not have. The least is to read all models, to add them up, and to write one; it is timed with
everything in the page cache. mergekit runs from an environment of its own, see others.py. It takes some 5 GB of disk for a while.

    python examples/benchmarks/full_models.py --mergekit-python mk/bin/python
"""

from __future__ import annotations

import argparse
import shutil
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from common.command import Outcome, conclude, parsed, parser_of, say, scratch
from common.floor import added_models, read, write
from common.inputs import Shapes, write_base, write_models
from common.mergekit import mergekit
from common.process import DC_MERGE, Run, helper, measured, middle
from common.stored import tensor, tensors
from common.tables import Goal, goals, markdown, megabytes, seconds, times

QUICK = {"layers": 1, "hidden": 128, "tasks": 2, "shard": "10MB", "repeat": 1}
DENSITY = 0.2
HEAD = ["method, program", "time", "of dc-merge's", "processor time", "memory", "error"]
# By method here: what mergekit calls it, if it has it.
METHODS = {"ta": "task_arithmetic", "ties": "ties", "dc": None}


def commands(
    base: Path, models: list[Path], out: Path, args: argparse.Namespace
) -> Iterator[tuple[str, str, list[str | Path]]]:
    """Method, program, and its command line, which writes the merged model to ``out``."""
    for method, theirs in METHODS.items():
        options = {"ta": ["--alpha", "1"], "ties": ["--density", str(DENSITY)]}.get(method, [])
        words = ["merge-full", base, *models, "-o", out, "--method", method, *options]
        yield method, "dc-merge", [*DC_MERGE, *words, "--max-shard-size", args.shard]
        if args.mergekit_python and theirs:
            parameters = {"weight": 1.0} | ({"density": DENSITY} if method == "ties" else {})
            merged = [{"model": str(model), "parameters": parameters} for model in models]
            yield method, "mergekit", mergekit(args.mergekit_python, theirs, base, merged, out)


def floor(base: Path, models: list[Path], folder: Path, shapes: Shapes) -> dict[str, float]:
    """Seconds to read all models, to add them up, and to write as many bytes as one has."""
    folder.mkdir()
    found = {"read": 0.0, "sums": 0.0, "write": 0.0}
    for model in (base, *models):
        for file in sorted(model.glob("*.safetensors")):
            took, content = read(file)
            found["read"] += took
            if model == base:
                found["write"] += write(folder / file.name, content, len(content))
    found["sums"] = added_models(shapes, len(models))
    shutil.rmtree(folder)
    return found


def error(base: Path, models: list[Path], result: Path, modules: list[str]) -> float:
    """How far a result is from the exact sum on these matrices, relative to the change of the weights."""
    places = {folder: tensors(folder) for folder in (base, result, *models)}
    wrong = changed = 0.0
    for name in (f"{module}.weight" for module in modules):
        before = tensor(places[base], name).double()
        delta = sum(tensor(places[model], name).double() - before for model in models)
        wrong += float((tensor(places[result], name).double() - before - delta).square().sum())
        changed += float(delta.square().sum())  # type: ignore[union-attr]
    return (wrong / changed) ** 0.5


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Every method by every program, the least beside each round."""
    if not args.mergekit_python:
        say("without --mergekit-python: mergekit is left out")
    runs: dict[tuple[str, str], list[Run]] = {}
    errors: dict[str, float] = {}
    least: list[dict[str, float]] = []
    with scratch(args) as folder, helper() as beside:
        base, out = folder / "base", folder / "out"
        say("making the base model and the models")
        shapes, parameters = beside.apply(write_base, (base, args.layers, args.hidden, args.shard))
        models = beside.apply(write_models, (folder, base, args.tasks))
        for number in range(args.repeat):
            least.append(beside.apply(floor, (base, models, folder / "floor", shapes)))
            say(f"round {number + 1} of {args.repeat}: the least {sum(least[-1].values()):.1f} s")
            for method, program, words in commands(base, models, out, args):
                if method != "ta" and number:
                    continue  # these take long, and are far apart
                run = measured(words)
                say(f"{program}, {method}: {run.seconds:.1f} s, {run.peak_bytes / 1e6:.0f} MB")
                runs.setdefault((method, program), []).append(run)
                if method == "ta" and program not in errors:
                    errors[program] = beside.apply(error, (base, models, out, list(shapes)[: args.compared]))
                shutil.rmtree(out)
    return {
        "parameters": parameters,
        "floor_seconds": {part: statistics.median(took[part] for took in least) for part in least[0]},
        "runs": [{"method": method, "program": program, **middle(took)} for (method, program), took in runs.items()],
        "errors": errors,
    }


def table(outcome: Outcome) -> str:
    """Times and memory, and the goals, as Markdown."""
    found, settings = outcome["results"], outcome["settings"]
    ours = {run["method"]: run for run in found["runs"] if run["program"] == "dc-merge"}
    theirs = {run["method"]: run for run in found["runs"] if run["program"] == "mergekit"}
    least = sum(found["floor_seconds"].values())
    rows = [
        [
            f"{run['method']}, {run['program']}",
            seconds(run["seconds"]),
            f"{times(run['seconds'] / ours[run['method']]['seconds'])}",
            seconds(run["processor_seconds"]),
            megabytes(run["peak_bytes"]),
            f"{found['errors'][run['program']]:.1e}" if run["method"] == "ta" else "",
        ]
        for run in found["runs"]
    ]
    parts = ", ".join(f"{part} {seconds(value)}" for part, value in found["floor_seconds"].items())
    text = (
        f"{settings['tasks']} models of {found['parameters'] / 1e9:.2f} billion numbers in bfloat16; task arithmetic the median of {settings['repeat']} "
        f"runs, the others one. Error: of the change of the weights, against the exact sum. The least any program needs for `ta` is "
        f"{seconds(least)} ({parts}); `dc-merge` takes {times(ours['ta']['seconds'] / least)} times that, its start "
        f"included.\n\n{markdown(HEAD, rows)}"
    )
    if not theirs:
        return f"{text}\n\nmergekit was not measured."
    wanted = [
        Goal(f"`{method}` no slower than mergekit", ours[method]["seconds"] <= theirs[method]["seconds"])
        for method in theirs
    ]
    wanted += [
        Goal(f"`{method}` in less memory", ours[method]["peak_bytes"] < theirs[method]["peak_bytes"], timed=False)
        for method in theirs
    ]
    return text + goals(wanted, outcome)


if __name__ == "__main__":
    parser = parser_of(__doc__)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--hidden", type=int, default=2048, help="a multiple of 64")
    parser.add_argument("--tasks", type=int, default=4, help="models")
    parser.add_argument("--shard", default="600MB", help="largest weight file, in and out")
    parser.add_argument("--compared", type=int, default=14, help="matrices whose numbers are compared")
    parser.add_argument("--repeat", type=int, default=3, help="of task arithmetic, whose median counts")
    parser.add_argument("--mergekit-python", metavar="PATH", help="python of an environment with mergekit 0.1.5")
    conclude(parsed(parser, QUICK), "full_models", measure, table)

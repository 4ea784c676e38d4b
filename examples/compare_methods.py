"""Compare all methods on the demo's real adapters, and write the table into docs/methods/index.md: nothing is typed.

python examples/compare_methods.py measure   # about half an hour on two cores; writes docs/methods/comparison.json
python examples/compare_methods.py write     # the table, from that file
"""

from __future__ import annotations

import argparse
import json
import warnings
from pathlib import Path
from typing import Any

from dc_merge_peft import MergeWarning
from dc_merge_peft.methods import METHODS

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "docs/methods/comparison.json"
GUIDE = ROOT / "docs/methods/index.md"

# Beside every method at its defaults: DC-Merge's other kinds of smoothing.
EXTRA: dict[str, tuple[str, dict[str, Any]]] = {
    "dc, average": ("dc", {"smoothing": "average"}),
    "dc, none": ("dc", {"smoothing": "none"}),
}
COUNTS = (2, 4, 8)


def measure(validation: int, test: int) -> dict[str, Any]:
    """Average normalized accuracy of every method at 2, 4 and 8 tasks, alpha by its data-free rule and by validation."""
    from dc_merge_peft.demo.run import load_demo, run_demo

    contenders = {name: (name, {}) for name in METHODS} | EXTRA
    tasks, model = load_demo(validation, test)
    outcomes: dict[str, Any] = {"texts": [validation, test], "tasks": [task.name for task in tasks], "counts": {}}
    for count in COUNTS:
        outcome = run_demo(tasks[:count], model, contenders=contenders).to_dict()
        outcomes["counts"][str(count)] = [
            {key: row[key] for key in ("label", "rule", "alpha", "mean_normalized")} for row in outcome["rows"]
        ]
    return outcomes


def comparison_block(results: dict[str, Any]) -> str:
    """The table in Markdown: one row a method, best first by the last column."""
    cells: dict[str, dict[tuple[str, str], str]] = {}
    order: dict[str, float] = {}
    for count, rows in results["counts"].items():
        for row in rows:
            if row["label"] == "individual adapters":
                continue
            value = f"{100 * row['mean_normalized']:.1f}"
            if row["rule"]:
                value += f" ({row['alpha']:.2g})"
                cells.setdefault(row["label"], {})[count, row["rule"]] = value
            else:
                cells.setdefault(row["label"], {})[count, "auto"] = value
                cells[row["label"]][count, "validation"] = value
            order[row["label"]] = row["mean_normalized"]
    columns = [(count, rule) for count in results["counts"] for rule in ("auto", "validation")]
    header = ["method", *(f"{count} tasks, {rule}" for count, rule in columns)]
    lines = [header, ["---", *("---:" for _ in columns)]]
    for label in sorted(cells, key=lambda label: -order[label]):
        lines.append([f"`{label}`" if label.split(",")[0] in METHODS else label, *(cells[label][c] for c in columns)])
    table = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    validation, test = results["texts"]
    return (
        f"\nThe demo's adapters of MiniLM (tasks in this order: {', '.join(results['tasks'])}), {test} test texts a task: average "
        f"normalized accuracy in %, in brackets alpha, found without data or picked on {validation} validation texts a task. One "
        f"seed, so that differences of 2 or 3 points are noise. Element-wise methods and `wudi` with their whole result.\n\n{table}\n\n"
    )


def rendered(page: Path, results: dict[str, Any]) -> str:
    """The guide with its table made anew."""
    head, marker, rest = page.read_text(encoding="utf-8").partition(
        "<!-- comparison: written by examples/compare_methods.py -->\n"
    )
    return (
        head + marker + comparison_block(results) + "<!-- /comparison -->" + rest.partition("<!-- /comparison -->")[2]
    )


def main() -> None:
    """Measure or write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("step", choices=("measure", "write"))
    parser.add_argument("--texts", type=int, nargs=2, default=(50, 150), metavar=("V", "T"), help="texts a task")
    arguments = parser.parse_args()
    if arguments.step == "measure":
        warnings.simplefilter("ignore", MergeWarning)
        results = measure(*arguments.texts)
        RESULTS.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    GUIDE.write_text(rendered(GUIDE, json.loads(RESULTS.read_text(encoding="utf-8"))), encoding="utf-8")


if __name__ == "__main__":
    main()

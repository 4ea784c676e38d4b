"""Write the demo's table and picture into README.md, docs/index.md and docs/demo.md from the saved results, so that no number is typed.

dc-merge demo --full -o dc-merge-demo && cp dc-merge-demo/results.* docs/demo/ && python examples/readme_table.py
"""

from __future__ import annotations

import json
import re
from pathlib import Path

from dc_merge_peft.demo.report import markdown_table, verdict

ROOT = Path(__file__).parent.parent
_BLOCK = re.compile(r"(<!-- demo:[^\n]*-->\n).*?(<!-- /demo -->)", re.DOTALL)


def demo_block(picture: str, *, tasks: bool) -> str:
    """Markdown of the demo's outcome.

    Args:
        picture: Path of the chart from the page.
        tasks: Whether the accuracy on each task is in it.
    """
    results = json.loads((ROOT / "docs/demo/results.json").read_text(encoding="utf-8"))
    chart = f"![average normalized accuracy of each method]({picture})"
    text = (
        f"\nReal adapters of a real model (all-MiniLM-L6-v2, LoRA of rank 16 on {len(results['tasks'])} text tasks): accuracy "
        "on test texts in %, averaged over tasks, and the average relative to each task's own adapter."
    )
    text += f"\n\n{markdown_table(results, tasks=tasks)}\n\n{chart}\n\n"
    if tasks:
        names = "; ".join(f"*{name}*: {title}" for name, title in results["tasks"].items())
        text += f"{verdict(results)}\n\nThe tasks: {names}.\n\n"
    return text


def rendered(page: Path, picture: str) -> str:
    """The page with its demo block made anew; each task is on the demo's own page alone."""
    block = demo_block(picture, tasks=page.stem == "demo")
    return _BLOCK.sub(lambda match: match[1] + block + match[2], page.read_text(encoding="utf-8"))


PAGES = {
    ROOT / "README.md": "docs/demo/results.png",
    ROOT / "docs/index.md": "demo/results.png",
    ROOT / "docs/demo.md": "demo/results.png",
}


def main() -> None:
    """Rewrite the pages."""
    for page, picture in PAGES.items():
        page.write_text(rendered(page, picture), encoding="utf-8")


if __name__ == "__main__":
    main()

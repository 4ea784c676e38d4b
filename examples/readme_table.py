"""Write the demo's table and picture into README.md and docs/index.md from the saved results, so that no number is typed.

dc-merge demo -o dc-merge-demo && cp dc-merge-demo/results.* docs/demo/ && python examples/readme_table.py
"""

from __future__ import annotations

import json
import re
from pathlib import Path

from dc_merge_peft.demo.report import markdown_table, verdict

ROOT = Path(__file__).parent.parent
_BLOCK = re.compile(r"(<!-- demo:[^\n]*-->\n).*?(<!-- /demo -->)", re.DOTALL)


def demo_block(picture: str) -> str:
    """Markdown of the demo's outcome; ``picture`` is the path of the chart from the page."""
    results = json.loads((ROOT / "docs/demo/results.json").read_text(encoding="utf-8"))
    tasks = "; ".join(f"*{name}*: {title}" for name, title in results["tasks"].items())
    return (
        f"\nReal adapters of a real model (all-MiniLM-L6-v2, LoRA of rank 16 on {len(results['tasks'])} text tasks): accuracy "
        f"on test texts in %, and the average relative to each task's own adapter.\n\n{markdown_table(results)}\n\n"
        f"![average normalized accuracy of each method]({picture})\n\n{verdict(results)}\n\nThe tasks: {tasks}.\n\n"
    )


def rendered(page: Path, picture: str) -> str:
    """The page with its demo block made anew."""
    return _BLOCK.sub(lambda match: match[1] + demo_block(picture) + match[2], page.read_text(encoding="utf-8"))


PAGES = {ROOT / "README.md": "docs/demo/results.png", ROOT / "docs/index.md": "demo/results.png"}


def main() -> None:
    """Rewrite the pages."""
    for page, picture in PAGES.items():
        page.write_text(rendered(page, picture), encoding="utf-8")


if __name__ == "__main__":
    main()

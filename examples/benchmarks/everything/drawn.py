"""What the figures of the benchmarks say together, and a page for those of each, from what is saved in the docs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from common.tables import markdown as table
from figures.page import claims, is_of_models
from figures.page import section as of_figures


def figures_text(figures: Mapping[str, Path]) -> str:
    """What the paper says of adapters and of full models, and whether it is so on each benchmark."""
    parts = [
        "Whether a figure agrees with the paper is decided by a rule on its numbers, never by eye; they are of **validation** examples."
    ]
    for models, title in ((False, "LoRA adapters"), (True, "Models fine-tuned in full")):
        if these := {name: folder for name, folder in figures.items() if is_of_models(folder) == models}:
            head, rows = claims(these, models=models)
            links = [f"[{name}](figures/{name}.md)" for name in these]
            parts += [f"### {title}", table([*head, *links], rows).replace("---:", "---")]
    return "\n\n".join(parts)


def figures_page(name: str, folder: Path) -> str:
    """The page of one benchmark's figures, in the folder above theirs."""
    return (
        f"# The paper's figures: {name}\n\n<!-- written by python -m examples.benchmarks.everything figures pages -->\n\n{of_figures(folder)}\n\n"
        f"[What the benchmark measures](../{name}.md), and [what all of them say](../benchmarks.md).\n"
    )

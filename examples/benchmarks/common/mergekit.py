"""mergekit's command line, from an environment of its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml


def mergekit(python: str, method: str, base: Path, models: Sequence[Mapping[str, Any]], out: Path) -> list[str | Path]:
    """The command that merges in bfloat16; its recipe is written beside the base model.

    Args:
        python: That of the environment.
        method: As mergekit calls it.
        base: The base model.
        models: Each with its parameters, as a recipe has them.
        out: Where the merged model goes.
    """
    recipe = base.parent / f"{method}.yaml"
    settings = {"merge_method": method, "base_model": str(base), "models": list(models), "dtype": "bfloat16"}
    recipe.write_text(yaml.safe_dump(settings))
    return [Path(python).with_name("mergekit-yaml"), recipe, out, "--no-copy-tokenizer", "--quiet"]

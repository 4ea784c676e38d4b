"""Files that a person names."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def read_json(file: Path, expected: str) -> Any:
    """What a JSON file holds.

    Args:
        file: To be read.
        expected: In words, for the error.

    Raises:
        SystemExit: it can't be read.
    """
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SystemExit(f"{file}: can't be read as JSON ({error}): expected {expected}") from error

"""``python -m examples.reproduce``, from the root of the repository."""

from __future__ import annotations

import sys
from pathlib import Path

EXAMPLES = Path(__file__).resolve().parent.parent
# Before anything of them is imported; worker processes get the path from this one.
sys.path[:0] = [str(EXAMPLES / "benchmarks"), str(EXAMPLES), str(EXAMPLES.parent)]

if __name__ == "__main__":
    from reproduce.command import main

    sys.exit(main())

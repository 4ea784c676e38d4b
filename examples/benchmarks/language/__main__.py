"""``python -m examples.benchmarks.language``, from the root of the repository."""

from __future__ import annotations

import sys
from pathlib import Path

BENCHMARKS = Path(__file__).resolve().parent.parent
# Before anything of them is imported; worker processes get the path from this one.
sys.path[:0] = [str(BENCHMARKS), str(BENCHMARKS.parent), str(BENCHMARKS.parent.parent)]

if __name__ == "__main__":
    from language.command import main

    sys.exit(main())

"""The benchmarks are programs, not a package: their folders go on the path."""

from __future__ import annotations

import sys
from pathlib import Path

EXAMPLES = Path(__file__).parent.parent.parent / "examples"
sys.path[:0] = [str(EXAMPLES / "benchmarks"), str(EXAMPLES)]

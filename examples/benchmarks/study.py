"""Study rules that may become methods, on the validation examples of a benchmark: ``python -m examples.benchmarks.study text8 --cache DIR``.

``--p`` and ``--tau`` make ``dW = U G_u^(-p/2) diag(tau S + (1 - tau) mean S) G_v^(-p/2) V^T``, of which p = 1, tau = 1 is TSV-M; ``--ridge`` makes
``dW = U (G_u + lambda_u)^-1 diag(S) (G_v + lambda_v)^-1 V^T`` with smoothed S, ``--load`` the same with lambda_u = c k / m and lambda_v = c k / n, which
is the library's ``rzf``; all are in ``accuracy/rules.py``. DC-Merge comes first, and the others are compared with it. ``--ideas`` measures those of
``accuracy/ideas.py`` instead, compared with ``rzf``. Other rules: call ``accuracy.study.study`` with functions of
your own, as this program does.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from pathlib import Path

BENCHMARKS = Path(__file__).resolve().parent
# Before anything of them is imported; worker processes get the path from this one.
sys.path[:0] = [str(BENCHMARKS), str(BENCHMARKS.parent), str(BENCHMARKS.parent.parent)]

SUITES = {"text8": ((0, 1, 2), (4, 8, 16)), "vision": ((0, 1, 2), (4, 8)), "language": ((0,), (4, 8), 50)}
"""What can be studied, with which seeds of adapters, numbers of tasks and of examples where none are named."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print the table, and write the lines where they are wanted."""
    from accuracy.study_command import Studied, run

    usual = {name: Studied(*what) for name, what in SUITES.items()}
    return run(__doc__, usual, lambda name: importlib.import_module(f"{name}.command").suite, arguments)


if __name__ == "__main__":
    sys.exit(main())

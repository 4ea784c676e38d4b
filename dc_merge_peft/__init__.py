"""Merge LoRA adapters with DC-Merge: inside PEFT, from Python, and on the command line.

Importing this package adds its methods to PEFT as combination types of ``add_weighted_adapter``;
:func:`unregister` takes them out again.
"""

from __future__ import annotations

from dc_merge_peft.startup import uncollected as _uncollected

with _uncollected():
    from dc_merge_peft import metrics, statistics
    from dc_merge_peft._version import __version__
    from dc_merge_peft.adapter import DCMergeAdapter
    from dc_merge_peft.errors import (
        EvaluationError,
        IncompatibleAdaptersError,
        MergeError,
        MergeWarning,
        OptionError,
        OutputError,
        SourceError,
        UnsupportedAdapterError,
    )
    from dc_merge_peft.inspection import inspect_adapters, inspect_merge
    from dc_merge_peft.lowrank import LowRank
    from dc_merge_peft.merged import MergedAdapter
    from dc_merge_peft.methods import DATA_METHODS, METHODS, DCMergeConfig
    from dc_merge_peft.registration import register, unregister
    from dc_merge_peft.report import report_merge
    from dc_merge_peft.tuning import TuneResult, tune

register()

__all__ = [
    "DATA_METHODS",
    "METHODS",
    "DCMergeAdapter",
    "DCMergeConfig",
    "EvaluationError",
    "IncompatibleAdaptersError",
    "LowRank",
    "MergeError",
    "MergeWarning",
    "MergedAdapter",
    "OptionError",
    "OutputError",
    "SourceError",
    "TuneResult",
    "UnsupportedAdapterError",
    "__version__",
    "inspect_adapters",
    "inspect_merge",
    "metrics",
    "register",
    "report_merge",
    "statistics",
    "tune",
    "unregister",
]

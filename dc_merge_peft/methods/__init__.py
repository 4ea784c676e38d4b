"""The merging methods. A new one is one file here and one row in :data:`METHODS`, or, where it needs statistics of the tasks'
data, in :data:`DATA_METHODS`."""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Mapping
from typing import Any

from dc_merge_peft.errors import OptionError, unknown_name
from dc_merge_peft.methods.arithmetic import TaskArithmetic, WeightAveraging
from dc_merge_peft.methods.base import Method, MethodConfig
from dc_merge_peft.methods.consensus import ConsensusTA
from dc_merge_peft.methods.dare import DareTA, DareTIES
from dc_merge_peft.methods.data import DataMethod
from dc_merge_peft.methods.dc import DCMerge, DCMergeConfig
from dc_merge_peft.methods.fisher import FisherMerging
from dc_merge_peft.methods.iso import IsoC, IsoCTS
from dc_merge_peft.methods.knots import KnotsDareTIES, KnotsTIES
from dc_merge_peft.methods.pcb import PCBMerging
from dc_merge_peft.methods.pruning import MagnitudePrune
from dc_merge_peft.methods.regmean import RegMean
from dc_merge_peft.methods.robust import RobustMerge
from dc_merge_peft.methods.rzf import RegularisedZeroForcing
from dc_merge_peft.methods.ties import TIES
from dc_merge_peft.methods.tsvm import TSVM
from dc_merge_peft.methods.wudi import WUDI, WUDIClosed

METHODS: dict[str, type[Method]] = {
    "dc": DCMerge,
    "ta": TaskArithmetic,
    "average": WeightAveraging,
    "ties": TIES,
    "dare_ta": DareTA,
    "dare_ties": DareTIES,
    "magnitude_prune": MagnitudePrune,
    "consensus": ConsensusTA,
    "pcb": PCBMerging,
    "knots_ties": KnotsTIES,
    "knots_dare_ties": KnotsDareTIES,
    "tsvm": TSVM,
    "iso_c": IsoC,
    "iso_cts": IsoCTS,
    "wudi": WUDI,
    "wudi_closed": WUDIClosed,
    "rzf": RegularisedZeroForcing,
    "robust": RobustMerge,
}
"""Every method's class that needs adapters alone by its name, which ``method=``, ``--method`` and YAML files take."""

DATA_METHODS: dict[str, type[DataMethod]] = {"fisher": FisherMerging, "regmean": RegMean}
"""The methods that need statistics of each task's own data, too, by their names, which are used in the same way."""

EVERY_METHOD: Mapping[str, type[Method]] = ChainMap(DATA_METHODS, METHODS)  # type: ignore[arg-type]
"""Both together, as they are at the moment."""


def method_named(name: str, options: Mapping[str, Any] | None = None) -> Method:
    """The method of that name with these options.

    Raises:
        OptionError: an unknown method or option, or a value of the wrong type or range.
    """
    if name not in EVERY_METHOD:
        raise OptionError(unknown_name("method", name, EVERY_METHOD))
    return EVERY_METHOD[name].from_options(options or {})


def method_for(config: MethodConfig) -> Method:
    """The method that a config instance belongs to.

    Raises:
        OptionError: the config class belongs to no method.
    """
    for method in EVERY_METHOD.values():
        if type(config) is method.Config:
            return method(config)
    names = ", ".join(method.Config.__name__ for method in EVERY_METHOD.values())
    raise OptionError(f"found a {type(config).__name__} where a method's config was expected: one of {names}")


__all__ = [
    "DATA_METHODS",
    "EVERY_METHOD",
    "METHODS",
    "DCMerge",
    "DCMergeConfig",
    "Method",
    "MethodConfig",
    "method_for",
    "method_named",
]

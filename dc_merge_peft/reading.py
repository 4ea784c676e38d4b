"""The factors of every task in one module, read and checked: what the engine feeds to a method."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

import torch

from dc_merge_peft.dense import Delta, Dense
from dc_merge_peft.errors import OptionError, SourceError, first_line
from dc_merge_peft.linalg import compute_device
from dc_merge_peft.lowrank import LowRank, are_ordinary, is_ordinary
from dc_merge_peft.methods.base import ModuleTasks
from dc_merge_peft.plan import MergePlan, PlannedModule
from dc_merge_peft.sources.base import Source

# How users name where to compute: "cuda:0", "cuda:0,cuda:1", "auto", a list of devices, or None.
Devices: TypeAlias = torch.device | str | Sequence[torch.device | str] | None


@dataclass(frozen=True, eq=False)
class Reader:
    """Reads modules for any thread, one at a time: sources are read by one thread, and looked through by many."""

    plan: MergePlan
    sources: Sequence[Source]
    device: torch.device | None = None  # where to compute; None is where each module's first factors are
    allow_zero: bool = False
    dealt: Mapping[str, torch.device] = field(default_factory=dict)  # where to compute single modules, before all else
    _reading: threading.Lock = field(default_factory=threading.Lock)

    def tasks(self, module: PlannedModule) -> ModuleTasks:
        """One module for a method.

        Raises:
            SourceError: a factor can't be read, or holds NaN, Inf or, unless allowed, only zeros.
        """
        return self.placed(module, self.read(module))

    def read(self, module: PlannedModule) -> list[Delta]:
        """The deltas of one module where they are stored, checked.

        Raises:
            SourceError: as for :meth:`tasks`.
        """
        deltas = self._read(module)
        factors = [factor for delta in deltas if isinstance(delta, LowRank) for factor in (delta.A, delta.B)]
        if factors and are_ordinary(factors):
            return deltas
        with self._reading:  # of a zero factor the others are looked at that share its stored pair
            for task, delta in zip(module.tasks, deltas, strict=True):
                check_factors(delta, self.sources[task], module.name, self.allow_zero)
        return deltas

    def placed(self, module: PlannedModule, deltas: Sequence[Delta]) -> ModuleTasks:
        """What was read of a module for a method, where it is computed."""
        weights = [self.plan.weights[task] for task in module.tasks]
        return ModuleTasks(module.name, self._placed(deltas, module), weights, module.tasks)

    def rereading(self, module: PlannedModule) -> Callable[[], Sequence[LowRank]]:
        """Reads the same factors once more, after they have been checked."""
        return lambda: [delta for delta in self._placed(self._read(module), module) if isinstance(delta, LowRank)]

    def device_of(self, module: PlannedModule) -> torch.device:
        """Where this module is computed; the CPU where that is up to the sources, which are then expected to be files."""
        return compute_device(self._device(module) or torch.device("cpu"))

    def on_cpu(self, module: PlannedModule) -> bool:
        """Whether the CPU computes this module."""
        device = self._device(module)
        if device is not None:
            return compute_device(device).type == "cpu"
        return self.sources[module.tasks[0]].on_cpu(module.name)

    def cheap(self, module: PlannedModule) -> bool:
        """Whether reading the module again costs next to nothing."""
        return all(self.sources[task].cheap for task in module.tasks)

    def _read(self, module: PlannedModule) -> list[Delta]:
        with self._reading:
            return [self.sources[task].factors(module.name) for task in module.tasks]

    def _device(self, module: PlannedModule) -> torch.device | None:
        return self.dealt.get(module.name, self.device)

    def _placed(self, deltas: Sequence[Delta], module: PlannedModule) -> list[Delta]:
        where = compute_device(self._device(module) or deltas[0].device)
        return [delta.to(where) for delta in deltas]


def checked_device(device: torch.device | str | None) -> torch.device | None:
    """A device that exists on this machine, or None as it is.

    Raises:
        OptionError: an unknown name, or a device that this machine or this build of torch does not have.
    """
    if device is None:
        return None
    if not isinstance(device, (str, torch.device)):
        raise OptionError(f"device is {device!r}: expected a name, as in 'cuda:0', or a torch.device")
    try:
        found_device = torch.empty(0, device=device.strip().lower() if isinstance(device, str) else device).device
        if found_device.type == "meta":
            raise RuntimeError("it holds no numbers")
        return found_device
    except (RuntimeError, AssertionError) as error:
        found = ["cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]
        raise OptionError(
            f"device '{device}' can't be used ({_few(first_line(error))}): expected one of {', '.join(found)}, or no device at all, to "
            "compute where the factors are"
        ) from error


def _few(words: str) -> str:
    """The beginning of a text: torch lists all of its devices, and what each of them lacks."""
    return words if len(words) <= 100 else f"{words[:100]}..."


def checked_devices(devices: Devices) -> tuple[torch.device, ...]:
    """The devices that several modules are computed on side by side; none to compute where the factors are.

    Args:
        devices: One, several (``"cuda:0,cuda:1"``, or a list), ``"auto"`` for all GPUs of this machine, or the CPU where it has
            none, or None.

    Raises:
        OptionError: see :func:`checked_device`.
    """
    if devices is None:
        return ()
    if isinstance(devices, str) and devices.strip().lower() == "auto":
        devices = [f"cuda:{index}" for index in range(torch.cuda.device_count())] or ["cpu"]
    named = devices.split(",") if isinstance(devices, str) else devices
    several = list(named) if isinstance(named, Iterable) else [named]
    if not several:
        raise OptionError("found an empty list of devices: expected one at least, as in cuda:0, or none")
    found = list(map(checked_device, several))
    return tuple(device for device in found if device is not None)


def checked_factors(source: Source, module: str, allow_zero: bool) -> LowRank:
    """One task's factors of one module.

    Raises:
        SourceError: a factor can't be read, or holds NaN, Inf or, unless allowed, only zeros.
    """
    delta = source.factors(module)
    assert isinstance(delta, LowRank), "a full model has no factors"
    check_factors(delta, source, module, allow_zero)
    return delta


def check_factors(delta: Delta, source: Source, module: str, allow_zero: bool) -> None:
    """Refuse factors that hold NaN, Inf or, unless allowed, only zeros. Dense deltas their source has checked.

    Raises:
        SourceError: they do.
    """
    if isinstance(delta, Dense):
        return
    for name, factor in zip(source.modules[module].layout.factor_names, (delta.A, delta.B), strict=True):
        if is_ordinary(factor):
            continue
        _check_scaling(source, module, allow_zero)
        where = f"{name} of '{module}' in adapter '{source.info.name}'"
        if not bool(torch.isfinite(factor).all()):
            raise SourceError(
                f"{where} holds NaN or Inf: expected finite numbers; the training diverged, use an earlier checkpoint"
            )
        if factor.dtype == torch.float64 and bool(factor.abs().amax() > torch.finfo(torch.float32).max):
            raise SourceError(f"{where} holds numbers beyond float32: expected trained weights; the factor is damaged")
        if not allow_zero and not bool(factor.any()) and _all_zero(source, module, name):
            raise SourceError(
                f"{where} is all zero: expected a trained factor, this is how an untrained or badly loaded adapter looks; "
                "check the adapter, or allow it (allow_zero=True, --allow-zero)"
            )


def _check_scaling(source: Source, module: str, allow_zero: bool) -> None:
    """Factors come with their scaling, whose faults must not be taken for theirs."""
    scaling = source.scaling(module)
    if abs(scaling) <= torch.finfo(torch.float32).max and (scaling or allow_zero):  # NaN is not
        return
    meant = "numbers in lora_alpha, alpha_pattern or set by set_scale that float32 holds"
    if scaling == 0:
        meant = "another lora_alpha than 0, or allow it (allow_zero=True, --allow-zero)"
    raise SourceError(
        f"adapter '{source.info.name}' has a scaling of {scaling:g} for '{module}', from its lora_alpha, an alpha_pattern or set_scale: "
        f"expected {meant}"
    )


def _all_zero(source: Source, module: str, name: str) -> bool:
    """Whether a factor is zero in all experts that share its stored pair: an expert that training never reached is, and is
    no sign of a failed load. A module that shares its pair with none is asked about itself."""
    layout = source.modules[module].layout
    shared = (source.factors(other) for other in layout.modules(layout.layer(module)) if layout.kind == "expert")
    index = layout.factor_names.index(name)
    return not any(bool((delta.A, delta.B)[index].any()) for delta in shared if isinstance(delta, LowRank))

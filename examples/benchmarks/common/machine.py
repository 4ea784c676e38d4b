"""The machine that a ratio was measured on, in words and numbers."""

from __future__ import annotations

import datetime
import os
import platform
import time
from pathlib import Path
from typing import Any

import torch

IDLE = 0.1  # share of the processors at most; a system has its own small things to do


def machine() -> dict[str, Any]:
    """Processor, cores, memory, versions, and how busy others keep it."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.exists() else []
    facts = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    return {
        "processor": facts.get("model name") or platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "virtual": "hypervisor" in facts.get("flags", "").split(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "system": platform.system(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "others": others(),
        "date": datetime.date.today().isoformat(),
    }


def busy(found: dict[str, Any]) -> bool:
    """Whether other programs were working when a run began or ended: its times say little then."""
    return bool(found["others"] > IDLE)


def others() -> float:
    """Share of the processors that other programs use at the moment. The load average would count what ran before, which may be
    another benchmark."""
    (used, whole), _, (used_later, whole_later) = _ticks(), time.sleep(0.5), _ticks()
    return round((used_later - used) / max(whole_later - whole, 1), 2)


def _ticks() -> tuple[int, int]:
    """Processor time in use, by anyone, and altogether; nothing where /proc is missing."""
    stat = Path("/proc/stat")
    numbers = [int(word) for word in stat.read_text().splitlines()[0].split()[1:9]] if stat.exists() else [0] * 8
    return sum(numbers) - numbers[3] - numbers[4], sum(numbers)  # all but idle and waiting for the disk


def in_words(found: dict[str, Any]) -> str:
    """One line for a table's head."""
    kind = " (virtual machine)" if found["virtual"] else ""
    return (
        f"{found['processor']}{kind}, {found['cores']} cores, {found['threads']} threads used, "
        f"{found['memory_bytes'] / 1e9:.0f} GB, {found['gpu'] or 'no GPU'}; {found['system']}, Python {found['python']}, "
        f"torch {found['torch']}; {found['date']}, others used {found['others']:.0%} of the processors"
    )

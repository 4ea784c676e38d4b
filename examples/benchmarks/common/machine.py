"""The machine that a ratio was measured on, in words and numbers."""

from __future__ import annotations

import datetime
import os
import platform
from pathlib import Path
from typing import Any

import torch


def machine() -> dict[str, Any]:
    """Processor, cores, memory, versions, and how busy the machine was just before."""
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
        "load_before": round(os.getloadavg()[0], 2),
        "date": datetime.date.today().isoformat(),
    }


def in_words(found: dict[str, Any]) -> str:
    """One line for a table's head."""
    kind = " (virtual machine)" if found["virtual"] else ""
    return (
        f"{found['processor']}{kind}, {found['cores']} cores, {found['threads']} threads used, "
        f"{found['memory_bytes'] / 1e9:.0f} GB, {found['gpu'] or 'no GPU'}; {found['system']}, Python {found['python']}, "
        f"torch {found['torch']}; {found['date']}, load {found['load_before']} when it began"
    )

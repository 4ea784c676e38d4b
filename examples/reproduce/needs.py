"""What a run needs, and what of it is missing: the same list for a dry run and before a real one."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from common.tables import markdown
from huggingface_hub.constants import HF_HOME

HUB = "from the Hub or its cache"
ON_HUB = " on the Hub"  # ends the places of data sets


@dataclass(frozen=True)
class Need:
    """One thing."""

    what: str
    where: str
    gigabytes: float | None = None  # an estimate, of what is read or fetched
    missing: str = ""  # what to do, where it is not there

    @property
    def lack(self) -> str:
        """What to do, where it is not there; a path that leads nowhere is no id of the Hub."""
        path = self.where.startswith(("/", ".", "~")) and not self.where.endswith(ON_HUB)
        return self.missing or ("there is no such file or folder" if path and not Path(self.where).exists() else "")

    @property
    def state(self) -> str:
        """In a word or a sentence."""
        return f"MISSING: {self.lack}" if self.lack else "there" if Path(self.where).exists() else HUB


@dataclass(frozen=True)
class Plan:
    """All that is known of a run before it starts."""

    title: str
    needs: Sequence[Need]
    disk: float  # GB that it writes, estimated
    memory: float  # GB of main memory, estimated
    gpu: float  # GB of GPU memory, estimated
    hours: float  # on one GPU of the paper's kind, estimated
    cache: Path
    remarks: Sequence[str] = ()

    def missing(self) -> list[Need]:
        """What is not there."""
        return [need for need in self.needs if need.lack]

    def text(self) -> str:
        """For people."""
        rows = [[n.what, n.where, "" if n.gigabytes is None else f"{n.gigabytes:.1f} GB", n.state] for n in self.needs]
        fetched = sum(n.gigabytes or 0 for n in self.needs if n.state == HUB)
        parts = [
            f"# {self.title}", markdown(["needed", "where", "size, estimated", "state"], rows),
            "Estimates, not measurements:",
            f"- fetched into {HF_HOME}, unless it is there: {fetched:.0f} GB, of {_free(Path(HF_HOME)):.0f} GB that are free there\n- written to {self.cache}: {self.disk:.0f} GB, of "
            f"{_free(self.cache):.0f} GB that are free there\n- main memory: {self.memory:.0f} GB\n- GPU memory: {self.gpu:.0f} GB\n"
            f"- time on one GPU: {self.hours:.1f} hours",
        ]  # fmt: skip
        if self.disk > _free(self.cache):
            parts.append("**There may be too little room in the cache's place: give another with --cache.**")
        if fetched > _free(Path(HF_HOME)):
            parts.append("**There may be too little room for what is fetched: give another place with HF_HOME.**")
        missing = self.missing()
        verdict = (
            f"{len(missing)} of {len(self.needs)} things are missing." if missing else "Nothing is known to be missing."
        )
        return "\n\n".join([*parts, *self.remarks, verdict]) + "\n"

    def check(self) -> None:
        """Refuse to start without what is missing.

        Raises:
            SystemExit: with the list.
        """
        if missing := self.missing():
            lines = "\n".join(
                f"- {need.what}: {need.lack}" + ("" if need.missing else f": {need.where}") for need in missing
            )
            raise SystemExit(
                f"found {len(missing)} things missing: expected them before the start\n{lines}\nsee --dry-run"
            )


def _free(folder: Path) -> float:
    place = folder.absolute()
    while not place.exists():
        place = place.parent
    return shutil.disk_usage(place).free / 1e9


def device_named(name: str) -> str:
    """A device that is there; ``auto`` is the GPU, where there is one.

    Raises:
        SystemExit: it is not there.
    """
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(1, device=name)
    except (RuntimeError, AssertionError) as error:
        raise SystemExit(
            f"found no device {name!r} ({str(error).splitlines()[0]}): expected one such as cpu or cuda:0"
        ) from error
    return name

"""``dc-merge`` in several processes by accelerate, on this machine or on several that are made up.

A machine is a set of namespaces of Linux: its own network, name, table of processes and mounts. The machines are joined by a wire
and see the files of this one. Their names are in no table of addresses, as it is on many clusters.
"""

from __future__ import annotations

import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.support.many import started

OPTIONS = (
    "--multi_gpu",
    "--mixed_precision",
    "no",
    "--dynamo_backend",
    "no",
)  # two processes even where there is no GPU
APART = ("--net", "--uts", "--pid", "--mount")  # what a machine has for itself
PORT = 29500


def free_port() -> int:
    """Of this machine; older accelerate does not look for one itself."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def launcher(*options: object, program: Sequence[object] = ("-m", "dc_merge_peft")) -> list[str]:
    """``accelerate launch`` with these options, of ``dc-merge``."""
    return [sys.executable, "-m", "accelerate.commands.launch", *OPTIONS, *map(str, (*options, *program))]


def launched(arguments: Sequence[object], folder: Path) -> subprocess.Popen[str]:
    """``dc-merge`` in two processes on this machine."""
    options = ("--num_machines", 1, "--num_processes", 2, "--main_process_port", free_port())
    return started([*launcher(*options), *map(str, arguments)], folder, CUDA_VISIBLE_DEVICES="")


@dataclass(frozen=True)
class Machine:
    """A machine that is made up."""

    rank: int
    first_process: subprocess.Popen[str]  # with it, all of them end
    number: str  # of that process, outside

    def does(self, *command: str) -> list[str]:
        """A command as this machine carries it out, in the same folder."""
        return ["nsenter", "-t", self.number, *APART, *command]

    def runs(self, *command: str) -> None:
        """The same, until it is done."""
        subprocess.run(self.does(*command), check=True, capture_output=True)

    def launches(
        self,
        arguments: Sequence[object],
        folder: Path,
        program: Sequence[object] = ("-m", "dc_merge_peft"),
    ) -> subprocess.Popen[str]:
        """Its part of a launch that has a process on each machine."""
        meeting = ("--main_process_ip", address(0), "--main_process_port", PORT)
        options = ("--num_machines", 2, "--machine_rank", self.rank, "--num_processes", 2, *meeting)
        command = ["env", "-C", str(folder), *launcher(*options, program=program), *map(str, arguments)]
        return started(self.does(*command), folder, CUDA_VISIBLE_DEVICES="")

    def dies(self) -> None:
        """All its processes at once, without a word."""
        self.first_process.kill()
        self.first_process.wait()


def address(rank: int) -> str:
    """Of a machine on the wire."""
    return f"10.77.0.{rank + 1}"


def can_make_machines() -> bool:
    """Whether this system lets us."""
    if not (sys.platform.startswith("linux") and all(map(shutil.which, ("unshare", "nsenter", "ip")))):
        return False
    try:
        with two_machines():
            return True
    except (OSError, subprocess.CalledProcessError):
        return False


@contextmanager
def two_machines() -> Iterator[tuple[Machine, Machine]]:
    """Two machines on one wire."""
    machines: list[Machine] = []
    try:
        for rank in range(2):
            machines.append(_booted(rank))
        first, second = machines
        wire = ("wire0", "type", "veth", "peer", "name", "wire1", "netns", second.number)  # a number outside both
        subprocess.run(
            ["nsenter", "-t", first.number, "--net", "ip", "link", "add", *wire], check=True, capture_output=True
        )
        for machine in machines:
            machine.runs("ip", "addr", "add", f"{address(machine.rank)}/24", "dev", f"wire{machine.rank}")
            for device in ("lo", f"wire{machine.rank}"):
                machine.runs("ip", "link", "set", device, "up")
        yield first, second
    finally:
        for machine in machines:
            machine.dies()
            assert machine.first_process.stdout is not None
            machine.first_process.stdout.close()


def _booted(rank: int) -> Machine:
    boot = f"hostname machine-{rank} && mount -t proc proc /proc && echo up && exec sleep 600"
    process = subprocess.Popen(
        ["unshare", *APART, "--fork", "--kill-child", "sh", "-c", boot],
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    assert process.stdout is not None
    if process.stdout.readline() != "up\n":
        process.communicate()
        raise OSError(f"machine {rank} does not start")
    return Machine(rank, process, Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().strip())

"""How the processes of one launch meet: in the store of PyTorch's rendezvous, which each reaches at ``MASTER_ADDR:MASTER_PORT``.

No group of processes is made, as training needs one: its network (Gloo, NCCL) joins every process to every other one, by addresses
that many machines don't have right, and waits for hours for one that has failed. Here all that follows goes through files.
"""

from __future__ import annotations

import os
import platform
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch

from dc_merge_peft.errors import MergeError, OptionError, first_line

MEETING = timedelta(minutes=10)  # in which the processes of one launch have to come together
# As launchers say how many processes there are: torch's, and those of MPI.
_SIZES = ("WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE")


def launched() -> int:
    """How many processes a launcher has started."""
    sizes = [os.environ.get(name, "") for name in _SIZES]
    return max((int(size) for size in sizes if size.isdecimal()), default=1)


@dataclass(frozen=True)
class Meeting:
    """What a process knows once it has met the others."""

    rank: int
    size: int
    device: str  # where this process computes
    token: str  # of this run, the same in all processes


def meet(device: str | None) -> Meeting:
    """Meet the other processes that a launcher has started.

    Args:
        device: As the user has it: ``"cpu"`` for the CPU, ``None``, ``"auto"`` or ``"cuda"`` for a GPU each where there are any.

    Raises:
        OptionError: a device of one process alone, or more processes than GPUs.
        MergeError: the others can't be met.
    """
    device = None if device is None else device.strip().lower()
    if device not in (None, "auto", "cpu", "cuda"):
        raise OptionError(
            f"device '{device}' is given to {launched()} processes: expected cpu, or cuda for a GPU each; leave --device out, or "
            "start one process"
        )
    own = _place()
    device = _device(device, own.local_rank, own.local_world_size)
    try:
        store = _store(own.rank, own.world_size, own.local_world_size)
        token = _meet(store, own.rank, own.world_size)
    except (RuntimeError, ValueError) as error:
        raise MergeError(
            f"the {launched()} processes of this launch can't reach each other ({first_line(error)}): expected all of them to be "
            "started by one launcher, as by accelerate launch, and to reach process 0 at MASTER_ADDR and MASTER_PORT; start one "
            "process to merge without"
        ) from error
    return Meeting(own.rank, own.world_size, device, token)


def _place() -> Any:
    """This process's rank and the launch's size, of all and on this machine, as whichever launcher has set the variables says it."""
    from accelerate.utils import get_cpu_distributed_information

    try:
        own = get_cpu_distributed_information()
        if own.world_size != launched() or not 0 <= own.rank < own.world_size:
            raise ValueError(f"rank {own.rank} of {own.world_size} processes, beside a launch of {launched()}")
    except ValueError as error:
        raise MergeError(
            f"the variables of a launch don't fit together ({first_line(error)}): expected RANK and WORLD_SIZE, or those of MPI, as one "
            "launcher sets them; start the processes by accelerate launch, or unset these variables to start one"
        ) from error
    return own


def _device(device: str | None, local_rank: int, local_size: int) -> str:
    """Where this process computes: a GPU of its own, or its share of the CPU."""
    wanted = os.environ.get("ACCELERATE_USE_CPU") not in ("1", "True", "true") and device != "cpu"
    if wanted and torch.cuda.is_available():
        gpus = torch.cuda.device_count()
        if local_size > gpus:
            raise OptionError(
                f"found {local_size} processes on this machine, which has {gpus} GPU{'s' if gpus > 1 else ''}: expected one for each at "
                "most; start fewer, or compute on the CPU (--device cpu)"
            )
        chosen = torch.device("cuda", local_rank % gpus)
        torch.cuda.set_device(chosen)
        return str(chosen)
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(torch.get_num_threads() // local_size, 1))
    return "cpu"


def _store(rank: int, size: int, local_size: int) -> Any:  # torch.distributed.Store
    """The launcher's store, or one that the first process offers where the launcher has none."""
    from torch.distributed import PrefixStore, rendezvous

    if local_size == size:  # MPI says nothing of addresses, and on one machine nothing needs to be said
        os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    os.environ.setdefault("MASTER_PORT", "29500")
    store, _, _ = next(rendezvous(f"env://?rank={rank}&world_size={size}", timeout=MEETING))
    return PrefixStore(f"dc-merge/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)


def _meet(store: Any, rank: int, size: int) -> str:
    """Wait until all are here and know the token; the first process, with which the store may end, goes last."""
    if rank == 0:
        store.set("token", secrets.token_hex(8))
    _say_and_wait(store, "here", rank, range(size))
    token = str(store.get("token").decode())
    _say_and_wait(store, "ready", rank, range(size) if rank == 0 else ())
    return token


def _say_and_wait(store: Any, word: str, rank: int, others: Sequence[int]) -> None:
    store.set(f"{word}/{rank}", platform.node())
    if not others:
        return
    try:
        store.wait([f"{word}/{other}" for other in others], MEETING)
    except RuntimeError as error:
        missing = [other for other in others if not _there(store, f"{word}/{other}")]
        if not missing:
            raise
        raise RuntimeError(f"no sign of process {', '.join(map(str, missing))} after {MEETING}") from error


def _there(store: Any, key: str) -> bool:
    """Whether a process has said something; older stores can't be asked without waiting."""
    try:
        store.wait([key], timedelta(milliseconds=100))
    except RuntimeError:
        return False
    return True

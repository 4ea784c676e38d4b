"""Two GPUs, or Apple's, that are not there: tensors that say they are on one, compute on the CPU, and refuse to meet those of another
device, or on Apple's to be float64.

They show where every tensor is, which is what breaks on a machine with GPUs; not how fast one is, how it rounds, or what runs
at the same time. Tests of the engine ask for :func:`some_gpus`, which are the machine's own where it has any.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

aten = torch.ops.aten
COPIES = {aten._to_copy.default, aten.copy_.default}
# What takes a tensor of a class of its own for one that is quantised.
CAREFUL = ("dc_merge_peft.outputs.fused_targets", "dc_merge_peft.sources.dora")
KINDS = ("cuda", "mps")
INDEXED = {aten.index.Tensor, aten.index_put_.default, aten.index_put.default, aten._index_put_impl_.default}


class Simulated(Tensor):
    """A tensor of a GPU that is not there; its values are those of ``inner``, on the CPU. To what torch has in C++ it is a meta tensor,
    for which every build has a device guard."""

    inner: Tensor
    place: torch.device

    @staticmethod
    def __new__(cls, inner: Tensor, place: torch.device | None = None, requires_grad: bool = False) -> Any:
        if place is None:  # as accelerate makes a parameter of a parameter's class
            return torch.nn.Parameter(inner, requires_grad)
        made: Any = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, inner.size(), strides=inner.stride(), storage_offset=inner.storage_offset(), dtype=inner.dtype, device="meta"
        )  # fmt: skip
        made.inner, made.place = inner, place
        return made

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        """Where it says it is."""
        return self.place

    @property
    def is_cuda(self) -> bool:  # type: ignore[override]
        """Of CUDA's."""
        return self.place.type == "cuda"

    @property
    def is_meta(self) -> bool:  # type: ignore[override]
        """Never: it has values."""
        return False

    def __repr__(self, **_: Any) -> str:
        return f"Simulated({self.inner}, {self.place})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _dispatched(func, args, kwargs or {})


class _Last(threading.local):
    """What this thread did last."""

    device: torch.device | None = None  # of the GPU that computed
    meta = False  # whether the call that is under way asks for meta tensors by name


_last = _Last()
used: set[str] = set()  # the GPUs that have computed something


def _dispatched(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Compute on the CPU what was asked of a GPU, if all that takes part is there."""
    tensors = [each for each in tree_flatten((args, kwargs))[0] if isinstance(each, Tensor)]
    known = {id(each.inner): each for each in tensors if isinstance(each, Simulated)}
    places = {each.place for each in known.values()}
    if places and func not in COPIES:
        _refuse_others(func, args, tensors, places)
        used.update(map(str, places))
    place = next(iter(places), None)
    _last.device = place or _last.device
    asked = kwargs.get("device")
    if asked is not None and asked.type == "meta" and not _last.meta:  # the device of a Simulated, as C++ has it
        asked = _last.device
    if asked is not None:
        place, kwargs = asked, {**kwargs, "device": torch.device("cpu") if asked.type in KINDS else asked}
    elif func is aten.copy_.default:
        place = args[0].device
    args, kwargs = tree_map(lambda each: each.inner if isinstance(each, Simulated) else each, (args, kwargs))
    found = func(*args, **kwargs)
    if place is None or place.type not in KINDS:
        return found

    def shown(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        if place.type == "mps" and value.dtype in (torch.float64, torch.complex128):
            raise TypeError(f"Cannot convert a MPS Tensor to float64 dtype: {func}")
        return known[id(value)] if id(value) in known else Simulated(value, place)

    return tree_map(shown, found)


def _refuse_others(func: Any, args: tuple[Any, ...], tensors: list[Tensor], places: set[torch.device]) -> None:
    """As CUDA does: numbers and indices may be on the CPU, all else must be on one device."""
    indices = args[1] if func in INDEXED else ()
    others = [
        x for x in tensors if not isinstance(x, Simulated) and x.ndim and not any(x is index for index in indices)
    ]
    if len(places) > 1 or others:
        raise RuntimeError(
            f"Expected all tensors to be on the same device: {func} found {[(tuple(x.shape), str(x.device)) for x in tensors]}"
        )


class _Placing(TorchDispatchMode):
    """New tensors, and those that are moved, go where they are asked to."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _dispatched(func, args, kwargs or {})


class _Naming(TorchFunctionMode):
    """Calls whose way through C++ needs a build with CUDA, in words that do not."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.device:
            return func(*args, **(kwargs or {}))
        args = tuple(map(_indexed, args))
        kwargs = {key: _indexed(value) for key, value in (kwargs or {}).items()}
        first = args[0] if args else None
        if isinstance(first, Simulated):
            _last.device = first.place  # of the numbers that C++ makes tensors of
        if func in (torch.tensor, torch.as_tensor) and getattr(kwargs.get("device"), "type", None) in KINDS:
            return func(*args, **{**kwargs, "device": None}).to(kwargs["device"])
        there = isinstance(first, Simulated) and len(args) == 2 and args[1] == first.place
        if func is Tensor.to and there and kwargs.keys() <= {"non_blocking"}:
            return first
        if func is Tensor.to and len(args) > 1 and isinstance(args[1], Simulated):
            args = (first, args[1].place, args[1].dtype, *args[2:])
        if func is Tensor.tolist and isinstance(first, Simulated):
            args = (first.inner,)
        if func in (Tensor.__getitem__, Tensor.__setitem__) and isinstance(first, Simulated):
            args = (first, _listed(args[1]), *map(_scalar, args[2:]))
        if func in (torch.matmul, Tensor.matmul, Tensor.__matmul__) and first.ndim == 1 and args[1].ndim == 2:
            args = (args[1].mT, first)  # what C++ makes of it changes a shape in place
        _last.meta = any(isinstance(x, (str, torch.device)) and str(x) == "meta" for x in (*args, *kwargs.values()))
        return func(*args, **kwargs)


def _indexed(value: Any) -> Any:
    """Without a number it is the first one."""
    if isinstance(value, str) and value.startswith(KINDS):
        value = torch.device(value)
    bare = isinstance(value, torch.device) and value.type in KINDS and value.index is None
    return torch.device(value.type, 0) if bare else value


def _listed(index: Any) -> Any:
    """Lists in an index become tensors."""
    if isinstance(index, tuple):
        return tuple(map(_listed, index))
    return torch.tensor(list(index)) if isinstance(index, (list, range)) else index


def _scalar(value: Any) -> Any:
    return value if isinstance(value, Tensor) else torch.tensor(value)


def _type(value: Any) -> type:
    return Tensor if isinstance(value, Simulated) else type(value)


@contextmanager
def simulated_gpus(count: int = 2) -> Iterator[None]:
    """So many GPUs of CUDA, in this thread and those that it starts."""
    room = 8 << 30
    answers: dict[str, Callable[..., Any]] = {
        "_lazy_init": lambda: None,
        "is_available": lambda: True,
        "device_count": lambda: count,
        "current_device": lambda: 0,
        "set_device": lambda device: None,
        "synchronize": lambda device=None: None,
        "empty_cache": lambda: None,
        "mem_get_info": lambda device=None: (room, room),
        "memory_reserved": lambda device=None: 0,
        "memory_allocated": lambda device=None: 0,
    }
    with ExitStack() as stack:
        for name, answer in answers.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, answer))
        stack.enter_context(_simulated())
        yield


@contextmanager
def _simulated() -> Iterator[None]:
    run = threading.Thread.run

    def placed(thread: threading.Thread) -> None:
        with _Naming(), _Placing():
            run(thread)

    with ExitStack() as stack:
        for module in CAREFUL:
            stack.enter_context(mock.patch(f"{module}.type", _type, create=True))
        stack.enter_context(mock.patch.object(threading.Thread, "run", placed))
        stack.enter_context(_Naming())
        stack.enter_context(_Placing())
        yield


@contextmanager
def some_gpus() -> Iterator[list[str]]:
    """The names of the machine's GPUs, or of two that are simulated."""
    if torch.cuda.is_available():
        yield [f"cuda:{index}" for index in range(torch.cuda.device_count())]
        return
    with simulated_gpus():
        yield ["cuda:0", "cuda:1"]


@contextmanager
def apples_gpu() -> Iterator[str]:
    """Its name; the machine's own, or one that is simulated. It knows no float64."""
    if torch.backends.mps.is_available():
        yield "mps"
        return
    with mock.patch.object(torch.backends.mps, "is_available", return_value=True), _simulated():
        yield "mps"


if __name__ == "__main__":  # dc-merge on a machine with two of them
    from dc_merge_peft.cli import main
    from tests.support import gpus  # this module under its name

    try:
        with gpus.simulated_gpus():
            main()
    finally:
        print("computed on", *sorted(gpus.used), file=sys.stderr)

"""DoRA adapters, whose delta depends on the weights W (m, n) of the base model:

    dW = magnitude / norm(W + s B A) * (W + s B A) - W,  norm over each row, one magnitude a row (m outputs).

It is dense. As one currency flows through merging, it becomes a LowRank by truncated SVD, one module at a time.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from dc_merge_peft.errors import IncompatibleAdaptersError, OptionError, SourceError, UnsupportedAdapterError, preview
from dc_merge_peft.layers import delta_shape, layer_layout, never_called
from dc_merge_peft.linalg import compute_device, truncated_svd
from dc_merge_peft.lowrank import LowRank, all_finite
from dc_merge_peft.own_forward import multiplies_by_its_weight, own_pass
from dc_merge_peft.sources.base import ModuleSpec, Source
from dc_merge_peft.sources.base_model import BaseModel, injected_layer, path_in_model
from dc_merge_peft.sources.keys import module_path

_MAGNITUDE = re.compile(r"(?P<module>.+)\.lora_magnitude_vector(\.[^.]+)?(\.weight)?", re.DOTALL)

# The dense weight (m, n) of a module in the base model.
WeightOf = Callable[[str], Tensor]


def magnitude_keys(
    keys: Iterable[str], modules: Collection[str], config: Mapping[str, Any], adapter: str
) -> dict[str, str]:
    """For each module of a checkpoint the key of its magnitude vector; empty where the adapter is no DoRA.

    Raises:
        UnsupportedAdapterError: magnitude vectors in an adapter whose config knows nothing of DoRA.
        SourceError: a module of a DoRA adapter has none.
    """
    found = {module_path(match["module"]): key for key in keys if (match := _MAGNITUDE.fullmatch(key))}
    if not config.get("use_dora"):
        if found:
            raise UnsupportedAdapterError(
                f"adapter '{adapter}' holds '{next(iter(found.values()))}', which means DoRA: its delta is rescaled by a "
                "magnitude vector, but its config does not say use_dora; expected plain LoRA, or config and weights of one "
                "training run: correct the config, or convert it to plain LoRA"
            )
        return {}
    missing = [module for module in modules if module not in found]
    if missing:
        raise SourceError(
            f"adapter '{adapter}' has no lora_magnitude_vector for {preview(missing)}: expected one in every module of a "
            "DoRA adapter; the checkpoint is incomplete, save or download it again"
        )
    return found


@dataclass(frozen=True)
class DoraReading:
    """How the dense deltas of DoRA adapters become factors.

    Raises:
        OptionError: the rank is no whole number of at least 1.
    """

    rank: int | None = None  # of the factors; None for twice the adapter's own in each module
    device: torch.device | None = None  # where to compute; None for where the adapter's factors are
    allow_zero: bool = False  # read all-zero factors and magnitudes, too

    def __post_init__(self) -> None:
        if self.rank is not None and (isinstance(self.rank, bool) or not isinstance(self.rank, int) or self.rank < 1):
            raise OptionError(
                f"dora_rank is {self.rank!r}: expected a whole number of at least 1, or none for twice the adapter's rank"
            )


class DoraSource(Source):
    """A DoRA adapter together with the weights it belongs to: its deltas as factors of a chosen rank."""

    def __init__(self, adapter: Source, weight_of: WeightOf, reading: DoraReading, base: str | None = None) -> None:
        """
        Args:
            adapter: The adapter, whose ``is_dora`` is set.
            weight_of: Reads the (m, n) weight of a module.
            reading: Rank and device.
            base: Directory or Hub id of the base model, for the record.
        """
        self.info, self.config = adapter.info, adapter.config
        self.reading, self.base, self.directory = reading, base, adapter.directory
        self.extras, self.extras_reason = adapter.extras, adapter.extras_reason
        self._adapter, self._weight_of = adapter, weight_of
        self.modules = {
            name: replace(spec, rank=min(reading.rank or 2 * spec.rank, *spec.shape))
            for name, spec in adapter.modules.items()
        }
        self.cheap = False
        self._squares: dict[str, tuple[float, float]] = {}  # by module: what truncation lost, and the whole

    def scaling(self, module: str) -> float:
        return self._adapter.scaling(module)

    def on_cpu(self, module: str) -> bool:
        device = self.reading.device
        return self._adapter.on_cpu(module) if device is None else compute_device(device).type == "cpu"

    def factors(self, module: str) -> LowRank:
        lora, magnitude = self._adapter.lora(module), self._adapter.magnitude(module)
        self._refuse_zero(module, {"lora_A": lora.A, "lora_B": lora.B, "lora_magnitude_vector": magnitude})
        device = compute_device(self.reading.device or lora.B.device)
        delta = dora_delta(self._weight_of(module).to(device), lora.to(device), magnitude.to(device))
        if not all_finite(delta):
            raise SourceError(
                f"the DoRA delta of '{module}' in adapter '{self.info.name}' holds NaN or Inf: expected finite factors, "
                "magnitudes and base weights, and no row of the weight that is all zero, for which DoRA has no direction"
            )
        factors = _as_lowrank(delta, self.modules[module].rank)
        whole = float(delta.square().sum())
        kept = whole if factors.rank == min(delta.shape) else factors.to(torch.float64).norm() ** 2
        self._squares[module] = (max(whole - kept, 0.0), whole)
        return factors

    def truncation_error(self) -> float:
        """Relative Frobenius error of the rank over all modules read so far; 0 where all are read whole."""
        read = [self._squares[module] for module in self.modules if module in self._squares]  # in an order of their own
        lost, whole = (sum(part) for part in zip(*read, strict=True)) if read else (0, 0)
        return (lost / whole) ** 0.5 if whole else 0.0

    def loss(self, module: str) -> tuple[float, float]:
        """Of a module that was read: the squared norm of what the rank has cut off, and of the whole delta."""
        return self._squares[module]

    def recall(self, module: str, loss: tuple[float, float]) -> None:
        """Take over :meth:`loss` from an earlier reading."""
        self._squares[module] = loss

    def unmatched_targets(self) -> list[str]:
        return self._adapter.unmatched_targets()

    def untargeted_modules(self) -> list[str]:
        return self._adapter.untargeted_modules()

    def extra(self, name: str) -> Tensor:
        return self._adapter.extra(name)

    def close(self) -> None:
        self._adapter.close()

    def _refuse_zero(self, module: str, tensors: Mapping[str, Tensor]) -> None:
        for name, tensor in tensors.items():
            if not self.reading.allow_zero and not bool(tensor.any()):
                raise SourceError(
                    f"{name} of '{module}' in adapter '{self.info.name}' is all zero: expected a trained DoRA adapter, this "
                    "is how an untrained or badly loaded one looks; check the adapter, or allow it (allow_zero=True, "
                    "--allow-zero)"
                )


def dora_delta(
    W: Tensor,  # (m, n)
    lora: LowRank,  # (m, n), scaling folded in
    magnitude: Tensor,  # (m,)
) -> Tensor:  # (m, n) float64
    """What DoRA adds to W. In float64: the delta is the small difference of two large matrices."""
    W = W.to(torch.float64)
    directions = torch.addmm(W, lora.B.to(torch.float64), lora.A.to(torch.float64))
    scale = magnitude.to(torch.float64) / torch.linalg.norm(directions, dim=1)
    return directions.mul_(scale[:, None]).sub_(W)


def _as_lowrank(delta: Tensor, rank: int) -> LowRank:
    """A dense (m, n) delta as float32 factors: whole where the rank allows, else its leading components."""
    m, n = delta.shape
    if rank < min(m, n):
        return LowRank.from_svd(truncated_svd(delta, rank)).to(torch.float32)
    dense, unit = delta.to(torch.float32), torch.eye(rank, dtype=torch.float32, device=delta.device)
    return LowRank(dense, unit) if n <= m else LowRank(unit, dense)


def with_base(sources: Sequence[Source], base: BaseModel | None, reading: DoraReading) -> list[Source]:
    """DoRA adapters joined with their base model, all other ones as they are; without a base model all as they are."""

    def joined(source: Source, base: BaseModel) -> Source:
        def weight_of(module: str) -> Tensor:
            return _weight_in(base, module, source.modules[module], source.info.name)

        return DoraSource(source, weight_of, reading, base.location)

    return [source if base is None or not source.is_dora else joined(source, base) for source in sources]


def _weight_in(base: BaseModel, module: str, spec: ModuleSpec, adapter: str) -> Tensor:
    """The weight (m, n) of a module in a base model, checked against the adapter."""
    model = base.model
    injected = injected_layer(model)
    if injected is not None:
        raise SourceError(
            f"the base model has adapters of its own, as in '{injected}': expected a plain model; call unload() on its "
            "PeftModel first, or merge in memory with add_weighted_adapter"
        )
    path = path_in_model(model, module)
    if path is None:
        raise IncompatibleAdaptersError(
            f"the base model, a {type(model).__name__}, has no module '{module}', which adapter '{adapter}' changes: expected "
            "the base model of the adapters; give the model object of the class they were trained with"
        )
    return matrix_of(module, model.get_submodule(path), base.weight(path), spec, adapter)


def matrix_of(module: str, layer: nn.Module, weight: object, spec: ModuleSpec, adapter: str) -> Tensor:
    """The weight of a layer as (m, n), as adapters see it.

    Raises:
        IncompatibleAdaptersError: the layer is of another type or shape than the adapter's factors.
        UnsupportedAdapterError: the weight is quantised, or not in memory, or the layer does something else with it, or is never called.
    """
    plain = isinstance(weight, Tensor) and type(weight.data) is Tensor  # one of another class may be anything inside
    if not isinstance(weight, Tensor) or not (plain and weight.is_floating_point()) or weight.is_meta:
        empty = isinstance(weight, Tensor) and weight.is_meta
        found = "a meta tensor without numbers" if empty else "quantised"
        remedy = "load the base model with its weights" if empty else "give the unquantised base model"
        raise UnsupportedAdapterError(
            f"the base weight of '{module}', a {type(layer).__name__}, is {found}: adapter '{adapter}' is DoRA, whose delta "
            f"depends on it; expected a floating-point weight: {remedy}"
        )
    layout, shape = layer_layout(module, layer), delta_shape(layer)
    if layout.kind == "out_proj":
        raise UnsupportedAdapterError(
            f"{never_called(module)}; adapter '{adapter}' is DoRA, which PEFT does not have on the attention itself either: expected other "
            "layers; train the adapter without that module"
        )
    if layout != spec.layout or shape != spec.shape:
        raise IncompatibleAdaptersError(
            f"'{module}' is of type {layout} and shape {shape} in the base model, {spec.layout} and {spec.shape} in adapter "
            f"'{adapter}': expected the base model of the adapters"
        )
    if not multiplies_by_its_weight(layer):
        raise UnsupportedAdapterError(
            f"{own_pass(module, layer)}: adapter '{adapter}' is DoRA, whose delta depends on that weight; expected a layer as "
            "torch's; train the adapter without that module"
        )
    transposed = layout.kind == "embedding" or type(layer).__name__ == "Conv1D"  # of transformers: (in, out)
    return weight.detach().mT if transposed else weight.detach().flatten(1)

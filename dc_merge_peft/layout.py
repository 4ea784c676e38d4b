"""How one layer type stores its LoRA factors, and the way to the (m, n) convention of the mathematics and back."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from dc_merge_peft.lowrank import LowRank

Kind = Literal["linear", "embedding", "conv", "in_proj", "out_proj", "expert"]

# What PEFT puts into a path for each layer that it wraps around another one.
LEVEL = ".base_layer"
# Where PEFT keeps the output projection of an attention layer, whose own factors are those of its input projection.
OUT_PROJ, STORED_OUT_PROJ = ".out_proj", ".base_layer.out_proj"


@dataclass(frozen=True)
class Layout:
    """The layer type of a target module, as far as its LoRA factors tell.

    ==========  ===========================  ==========================  ===========================================
    kind        lora_A                       lora_B                      weight delta of PEFT
    ==========  ===========================  ==========================  ===========================================
    linear      (r, in)                      (out, r)                    ``B @ A``, transposed for ``Conv1D``
    embedding   (r, tokens)                  (dim, r)                    ``(B @ A)^T``
    conv        (r, in, *kernel)             (out, r, 1, ..)             ``B @ A``, reshaped
    in_proj     (r, in)                      (3 * in, r)                 ``B @ A``, of ``nn.MultiheadAttention``
    out_proj    (r, in)                      (in, r)                     ``B @ A``, of ``nn.MultiheadAttention``
    expert      (experts * r, in)            (out, r * experts)          ``B_e @ A_e`` or its transpose, per expert
    ==========  ===========================  ==========================  ===========================================

    In the (m, n) convention m counts outputs (out, dim) and n inputs (in, tokens, in * kernel).

    PEFT stores the factors of all experts of one parameter in one pair. Each expert is a module of the merge, called
    ``path[number]`` after the path under which the pair is stored.
    """

    kind: Kind = "linear"
    kernel: tuple[int, ...] = ()  # of a convolution: (kh, kw) for Conv2d
    experts: int = 1  # that share one stored pair
    # Parameters of the module that holds the experts, of which this is one, sorted. PEFT tells them apart by how deep their
    # factors are nested, which means the same in two adapters only if both target the same parameters.
    parameters: tuple[str, ...] = ()

    @property
    def factor_names(self) -> tuple[str, str]:
        """Names of the A and B parameters in a PEFT module and in its state dict."""
        return ("lora_embedding_A", "lora_embedding_B") if self.kind == "embedding" else ("lora_A", "lora_B")

    def layer(self, module: str) -> str:
        """The path of the PEFT layer that holds the factors of ``module``, ``.base_layer`` included where PEFT nests."""
        if self.kind == "expert":
            return module.rpartition("[")[0]
        return module.removesuffix(OUT_PROJ) + STORED_OUT_PROJ if self.kind == "out_proj" else module

    def modules(self, layer: str) -> tuple[str, ...]:
        """The modules of the merge whose factors the PEFT layer of this path holds: the inverse of :meth:`layer`."""
        if self.kind == "expert":
            return tuple(f"{layer}[{number}]" for number in range(self.experts))
        return (layer.removesuffix(STORED_OUT_PROJ) + OUT_PROJ if self.kind == "out_proj" else layer,)

    def base_path(self, module: str) -> str:
        """The path in the base model of the layer that ``module`` belongs to; for an expert that of the module that holds
        its parameter."""
        return holder_and_depth(self.layer(module))[0] if self.kind == "expert" else module

    def number(self, module: str) -> int:
        """Which one of the experts that share a stored pair; 0 where there is one alone."""
        return int(module.rpartition("[")[2].removesuffix("]")) if self.kind == "expert" else 0

    def own(self, module: str, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
        """The factors of one module out of the pair that its PEFT layer stores: of an expert its (r, in) and (out, r)."""
        if self.kind != "expert":
            return A, B
        number = self.number(module)
        rank = A.shape[0] // self.experts
        return A[number * rank : (number + 1) * rank], B[:, number :: self.experts]

    def to_lowrank(self, A: Tensor, B: Tensor, scaling: float) -> LowRank:
        """A module's own factors as a LowRank (m, n) with the scaling folded into B: in float32 or wider, or in bfloat16, which has
        the range of float32, where the scaling is a power of two and so exact."""
        if self.kind == "conv":
            A, B = A.flatten(1), B.flatten(1)
        exact = B.element_size() >= 4 or (B.dtype == torch.bfloat16 and abs(math.frexp(scaling)[0]) == 0.5)
        wide = B if exact else B.float()
        return LowRank(wide * scaling if scaling != 1 else wide, A)

    def to_stored(self, deltas: Sequence[LowRank]) -> tuple[Tensor, Tensor]:
        """(A, B) in the shapes that PEFT stores, for scaling 1; ``deltas`` are those of the layer's modules, of one rank."""
        if self.kind == "expert":
            B = torch.stack([delta.B for delta in deltas], dim=2)
            return torch.cat([delta.A for delta in deltas]), B.flatten(1)
        (delta,) = deltas
        if self.kind != "conv":
            return delta.A, delta.B
        channels = delta.A.shape[1] // math.prod(self.kernel)
        ones = (1,) * len(self.kernel)
        return delta.A.reshape(delta.rank, channels, *self.kernel), delta.B.reshape(*delta.B.shape, *ones)

    def to_weight(self, delta: Tensor, weight: Tensor, *, transposed: bool) -> Tensor:
        """A dense (m, n) delta in the shape of the layer's weight; ``transposed`` where that is (in, out): ``Conv1D``."""
        if self.kind == "embedding" or transposed:
            return delta.mT
        return delta.reshape(weight.shape) if self.kind == "conv" else delta

    def __str__(self) -> str:
        if self.kind == "conv":
            return f"Conv{len(self.kernel)}d {'x'.join(map(str, self.kernel))}"
        if self.kind == "expert":
            return f"{self.experts} experts ({', '.join(self.parameters)})"
        return f"MultiheadAttention {self.kind}" if self.kind in ("in_proj", "out_proj") else self.kind


def holder_and_depth(layer: str) -> tuple[str, int]:
    """The path of what a PEFT layer is wrapped around, and how many layers lie in between or around it."""
    depth = 0
    while layer.endswith(LEVEL):
        layer, depth = layer.removesuffix(LEVEL), depth + 1
    return layer, depth

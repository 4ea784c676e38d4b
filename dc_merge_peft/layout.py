"""How one layer type stores its LoRA factors, and the way to the (m, n) convention of the mathematics and back."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from dc_merge_peft.lowrank import LowRank

Kind = Literal["linear", "embedding", "conv"]


@dataclass(frozen=True)
class Layout:
    """The layer type of a target module, as far as its LoRA factors tell.

    ==========  ===========================  ==========================  ===================================
    kind        lora_A                       lora_B                      weight delta of PEFT
    ==========  ===========================  ==========================  ===================================
    linear      (r, in)                      (out, r)                    ``B @ A``, transposed for ``Conv1D``
    embedding   (r, tokens)                  (dim, r)                    ``(B @ A)^T``
    conv        (r, in, *kernel)             (out, r, 1, ..)             ``B @ A``, reshaped
    ==========  ===========================  ==========================  ===================================

    In the (m, n) convention m counts outputs (out, dim) and n inputs (in, tokens, in * kernel).
    """

    kind: Kind = "linear"
    kernel: tuple[int, ...] = ()  # of a convolution: (kh, kw) for Conv2d

    @property
    def factor_names(self) -> tuple[str, str]:
        """Names of the A and B parameters in a PEFT module and in its state dict."""
        return ("lora_embedding_A", "lora_embedding_B") if self.kind == "embedding" else ("lora_A", "lora_B")

    def to_lowrank(self, A: Tensor, B: Tensor, scaling: float) -> LowRank:
        """Stored factors as a LowRank (m, n) with the scaling folded into B (in float32 or wider)."""
        if self.kind == "conv":
            A, B = A.flatten(1), B.flatten(1)
        wide = B if B.element_size() >= 4 else B.float()
        return LowRank(wide * scaling if scaling != 1 else wide, A)

    def to_stored(self, delta: LowRank) -> tuple[Tensor, Tensor]:
        """(A, B) in the shapes that PEFT stores, for scaling 1."""
        if self.kind != "conv":
            return delta.A, delta.B
        channels = delta.A.shape[1] // math.prod(self.kernel)
        ones = (1,) * len(self.kernel)
        return delta.A.reshape(delta.rank, channels, *self.kernel), delta.B.reshape(*delta.B.shape, *ones)

    def to_weight(self, delta: Tensor, weight: Tensor, *, transposed: bool) -> Tensor:
        """A dense (m, n) delta in the shape of the layer's weight; ``transposed`` for ``Conv1D``'s (in, out)."""
        if self.kind == "embedding" or transposed:
            return delta.mT
        return delta.reshape(weight.shape) if self.kind == "conv" else delta

    def __str__(self) -> str:
        return f"Conv{len(self.kernel)}d {'x'.join(map(str, self.kernel))}" if self.kind == "conv" else self.kind

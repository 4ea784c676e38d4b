"""A backbone that carries one merge after the other, without being loaded again."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class Carrier:
    """The model in the precision it is measured in, and its own parameters in float32, from which every merge starts."""

    def __init__(self, model: nn.Module, precision: str) -> None:
        self._weights = {name: p.detach().clone() for name, p in model.named_parameters()}
        self.model = model.to(PRECISIONS[precision]).eval()
        self._parameters = dict(self.model.named_parameters())
        self._changed: set[str] = set()

    @torch.no_grad()
    def carry(self, deltas: Mapping[str, Tensor], alpha: float) -> nn.Module:
        """The model with ``W + alpha dW`` in these parameters, added in float32 and then rounded; its own ones elsewhere.

        Args:
            deltas: dW by the name of a parameter, or by the path of a layer whose weight it changes; of the same shape.
            alpha: On all of them.
        """
        names = {name if name in self._parameters else f"{name}.weight": delta for name, delta in deltas.items()}
        for name in self._changed - set(names):
            self._parameters[name].copy_(self._weights[name])
        for name, delta in names.items():
            self._parameters[name].copy_(torch.add(own := self._weights[name], delta.to(own.device), alpha=alpha))
        self._changed = set(names)
        return self.model

    def bare(self) -> nn.Module:
        """The pretrained model itself."""
        return self.carry({}, 0.0)

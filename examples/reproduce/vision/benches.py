"""How merges are measured here: alpha on the paper's grid, and whole towers beside adapters."""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accuracy.bench import Bench
from accuracy.merging import Merge
from accuracy.plan import share
from safetensors.torch import load_file
from torch import Tensor

from dc_merge_peft import DCMergeAdapter, MergeError, MergeWarning

# Appendix E.2 with the authors' programs: 0.1 to 3.0.
PAPER_GRID = tuple(round(0.1 * n, 1) for n in range(1, 31))
# What the authors' programs average beside vectors: the patch embedding, whose weight has four dimensions.
AVERAGED = ["conv1"]


class GridBench(Bench):
    """Looks at every alpha of the paper's grid, where the other benchmarks climb a ladder."""

    def search(
        self, merge: Merge, own: Mapping[str, float], count: int
    ) -> tuple[float, dict[float, float]]:  # the best alpha, and the scores that were looked at
        scores = {}
        for alpha in PAPER_GRID:
            self.carrier.carry(merge.deltas, alpha)
            scores[alpha] = sum(
                share(self.hits(task, "validation", count)) / max(own[task], 1e-9) for task in own
            ) / len(own)
        return max(scores, key=lambda alpha: (scores[alpha], -alpha)), scores


@dataclass(frozen=True)
class Towers:
    """Fully fine-tuned towers as what is merged; averaged parameters are scaled by alpha with the merged ones, as in Eq. 31."""

    base: Path
    device: str = "cpu"
    name: str = "model"
    files: Sequence[str] = ("model.safetensors", "config.json")
    written: bool = True

    def own(self, folder: Path) -> Mapping[str, Tensor]:
        return differences(self.base, folder)

    def merge(self, folders: Sequence[Path], method: str, options: Mapping[str, Any]) -> Merge:
        """What the merge adds to the base tower, by parameter, before alpha."""
        with tempfile.TemporaryDirectory() as place, warnings.catch_warnings():
            warnings.simplefilter("ignore", MergeWarning)

            def merged(alpha: Any) -> tuple[float, Path]:
                merger, out = DCMergeAdapter(method=method, **{**options, "alpha": alpha}), Path(place) / str(alpha)
                done = merger.merge_full(
                    self.base, folders, out, average=AVERAGED, device=self.device, max_shard_size="50GB", progress=False
                )  # fmt: skip
                assert done.merged.alpha is not None
                return done.merged.alpha, out

            try:
                auto, out = merged("auto")
                alpha = auto
            except MergeError:
                (alpha, out), auto = merged(1.0), None
            return Merge({name: value / alpha for name, value in differences(self.base, out).items()}, auto)


def differences(base: Path, tower: Path) -> dict[str, Tensor]:
    """What a tower adds to the base, by the names of the parameters that differ, float32."""
    old, new = (load_file(folder / "model.safetensors") for folder in (base, tower))
    return {name: (new[name] - old[name]).float() for name in old if not torch.equal(new[name], old[name])}

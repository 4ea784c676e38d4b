"""Which LoRA adapters can be merged: layer type x feature, as one table, which the tests prove and the docs show.

``python -m tests.law.matrix`` writes it into ``docs/support.md``.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from torch import nn

from dc_merge_peft.sources.refusals import refused_kinds
from tests.law.nets import LAYERS
from tests.support.own_layers import Standardised

PAGE = Path(__file__).parent.parent.parent / "docs" / "support.md"
BEGIN, END = "<!-- written by python -m tests.law.matrix -->", "<!-- /written -->"

# Features of adapters on disk, and states of a model in memory.
ON_DISK = (
    "plain, fp32", "bf16", "fp16", "rsLoRA", "rank_pattern", "alpha_pattern", "differing ranks", "differing target sets",
    "exclude_modules", "layers_to_transform",
)  # fmt: skip
IN_MEMORY = ("MixedModel", "another adapter active", "set_scale", "merged into the base")
FEATURES = (*ON_DISK, *IN_MEMORY)


@dataclass(frozen=True)
class Cell:
    """What becomes of one combination."""

    verdict: Literal["exact", "refused", "PEFT has no such adapter"]
    reason: str = ""
    places: tuple[Literal["disk", "memory"], ...] = ("disk", "memory")  # where there is such an adapter
    words: tuple[str, ...] = ()  # of the error, this library's or PEFT's


EXACT = Cell("exact")
MERGED = Cell(
    "refused",
    "the base weights are other ones at that moment; call `unmerge_adapter()` first",
    ("memory",),
    ("merged into its base weights", "expected unmerged adapters", "model.unmerge_adapter()"),
)
PARAMETERS: dict[str, Cell] = {
    "differing target sets": Cell(
        "exact", "where the sets differ by module; PEFT allows one set of parameters for all adapters of a model in memory",
        ("disk",),
    ),
    "exclude_modules": Cell(
        "PEFT has no such adapter", "it does not exclude parameters", words=("no modules were excluded",)
    ),
    "layers_to_transform": Cell("PEFT has no such adapter", "it does not choose layers for parameters"),
}  # fmt: skip


def cell(layer: str, feature: str) -> Cell:
    """The entry of the table."""
    if feature == "merged into the base":
        return MERGED
    if layer == "target_parameters" and feature in PARAMETERS:
        return PARAMETERS[feature]
    return EXACT if feature in ON_DISK else Cell("exact", places=("memory",))


@dataclass(frozen=True)
class RefusedLayer:
    """A layer that PEFT trains and that is not merged, whatever the features."""

    layer: Callable[[], nn.Module]
    reason: str
    words: tuple[str, ...]  # of the error
    target: str = "odd"  # the name that the config targets


REFUSED_LAYERS: dict[str, RefusedLayer] = {
    "Convolution with groups": RefusedLayer(
        lambda: nn.Conv2d(4, 4, 3, groups=2), "the merged weight differs from what PEFT computes",
        ("groups=2", "expected groups=1", "without that module"),
    ),
    "Convolution with dilation": RefusedLayer(
        lambda: nn.Conv2d(4, 4, 3, dilation=2), "the merged weight differs from what PEFT computes",
        ("dilation=(2, 2)", "expected groups=1, dilation 1"),
    ),
    "Convolution with another padding mode": RefusedLayer(
        lambda: nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"), "the merged weight differs from what PEFT computes",
        ("padding_mode='reflect'", "zero padding", "without that module"),
    ),
    "Convolution with a forward pass of its own": RefusedLayer(
        lambda: Standardised(4, 4, 3), "PEFT's factors are layers of the same class, which do not act as one weight there",
        ("'odd' is a Standardised", "own", "expected a convolution as torch's", "without that module"),
    ),
    "Embedding with max_norm": RefusedLayer(
        lambda: nn.Embedding(4, 4, max_norm=1.0), "the merged weight differs from what PEFT computes",
        ("max_norm=1", "expected an embedding without", "without that module"),
    ),
    "Output projection of an attention alone": RefusedLayer(
        lambda: nn.MultiheadAttention(4, 2), "torch never calls that layer, so LoRA there does nothing; target the attention",
        ("'odd.out_proj'", "never calls it", "expected LoRA on the attention module itself", "target_modules"), "out_proj",
    ),
}  # fmt: skip

MATRIX = {(layer, feature): cell(layer, feature) for layer in LAYERS for feature in FEATURES}


def render() -> str:
    """The table, its footnotes, and the kinds that are refused, as markdown."""
    notes: dict[str, int] = {}

    def entry(found: Cell) -> str:
        if not found.reason:
            return found.verdict
        note = f"{found.verdict}: {found.reason}"
        return f"{found.verdict} [{notes.setdefault(note, len(notes) + 1)}]"

    rows = [
        "| " + " | ".join([_name(feature), *(entry(MATRIX[layer, feature]) for layer in LAYERS)]) + " |"
        for feature in FEATURES
    ]
    head = ["", *map(_name, LAYERS)]
    table = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|", *rows]
    footnotes = [f"{number}. {note[0].upper()}{note[1:]}." for note, number in notes.items()]
    kinds = [f"| {_name(kind)} | {meaning} | {remedy} |" for kind, meaning, remedy in refused_kinds()]
    refused = ["| refused | what it is | what to do |", "|---|---|---|", *kinds]
    layers = [f"| {name} | {layer.reason} |" for name, layer in REFUSED_LAYERS.items()]
    refused_layers = ["| refused layer | why |", "|---|---|", *layers]
    return "\n".join([*table, "", *footnotes, "", *refused_layers, "", "## Refused kinds", "", *refused])


def _name(text: str) -> str:
    """A name as code, a description as it is."""
    return f"`{text}`" if re.fullmatch(r"[a-zA-Z]*_\w*", text) else text


def page() -> str:
    """The documentation page with the block of now."""
    text = PAGE.read_text(encoding="utf-8")
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n\n{render()}\n\n{END}{after}"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")

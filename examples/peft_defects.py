"""What PEFT's own ``add_weighted_adapter`` gets wrong, measured: a tiny case for each, PEFT's result beside this library's.

python examples/peft_defects.py           # the table
python examples/peft_defects.py --write   # the same, into docs/peft.md

The truth is what the layers compute. Every LoRA layer is run on fixed inputs, in float64: without adapters before the
merge, with each adapter, and with the merged one. The merged adapter's change must be the weighted sum of the adapters'
changes; the table has the relative Frobenius error over all layers. PEFT gets its exact types, ``svd`` with a rank that holds
everything and ``cat``; this library its plain sum, ``ta``.
"""

from __future__ import annotations

import argparse
import copy
import inspect
import re
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import peft
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import dc_merge_peft

PAGE = Path(__file__).parent.parent / "docs/peft.md"
_BLOCK = re.compile(r"(<!-- defects:[^\n]*-->\n).*?(<!-- /defects -->)", re.DOTALL)
EXACT, ROUNDED = 1e-5, 5e-3  # errors up to which a result counts as exact, or as right but for rounding to bfloat16
TOKENS, WIDTH = 20, 12
RANK = 6  # enough for the sum of both adapters of any case


class Block(nn.Module):
    """Layers of every kind that LoRA knows, of one width. They are measured one by one, so there is no forward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.out = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.gpt = Conv1D(WIDTH, WIDTH)
        self.tokens = nn.Embedding(TOKENS, WIDTH)
        self.image, self.pixel = nn.Conv2d(4, 6, (3, 2)), nn.Conv2d(4, 6, 1)
        self.sound = nn.Conv1d(4, 6, 3)


class Model(nn.Module):
    """Two blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.ModuleDict({"layers": nn.ModuleList([Block(), Block()])})


@dataclass(frozen=True)
class Case:
    """Two adapters, and how they are merged."""

    math: Mapping[str, Any]
    code: Mapping[str, Any]
    weights: tuple[float, float] = (1.0, 0.5)
    dtype: torch.dtype = torch.float32
    options: Mapping[str, Any] = field(default_factory=dict)  # of this library
    merge: Callable[[Any, Case, str], None] = field(default=lambda model, case, kind: merge(model, case, kind))
    truth: Callable[[Any, Case, str], dict[str, Tensor]] = field(default=lambda model, case, kind: total(model, case))
    kinds: tuple[str, ...] = ("svd", "cat", "ta")


def fields(*targets: str, **other: Any) -> dict[str, Any]:
    """Of a LoRA config: rank 2, scaling 3."""
    return {"r": 2, "lora_alpha": 6, "target_modules": list(targets or ("fc", "out")), **other}


def merge(model: Any, case: Case, kind: str, name: str = "merged") -> None:
    """By a type that can hold the sum exactly."""
    options = {"svd": {"svd_rank": RANK}, "ta": case.options}.get(kind, {})
    model.add_weighted_adapter(["math", "code"], list(case.weights), name, combination_type=kind, **options)


def failing_first(model: Any, case: Case, kind: str) -> None:
    """A first try that fails for want of an option, then the right call under the same name."""
    try:
        wrong = {"combination_type": "ta", "svd_rank": 0} if kind == "ta" else {"combination_type": "ties"}
        model.add_weighted_adapter(["math", "code"], list(case.weights), "merged", **wrong)
    except (TypeError, ValueError):
        merge(model, case, kind)


def one_pruned(model: Any, case: Case, kind: str) -> None:
    """One adapter by a type that is more than a sum: half of the entries of its delta, or smoothed singular values."""
    options: dict[str, Any] = {"density": 0.5, "svd_rank": WIDTH}
    if kind == "dc":
        options = {"density": 1.0, "alpha": 1.0, "smoothing": "average"}
    model.add_weighted_adapter(["math"], [1.0], "merged", combination_type=kind, **options)


def pruned(model: Any, case: Case, kind: str) -> dict[str, Tensor]:
    """What :func:`one_pruned` asks for, on dense matrices."""
    changes = {}
    for name, layer in lora_layers(model).items():
        delta = layer.lora_B["math"].weight.double() @ layer.lora_A["math"].weight.double() * layer.scaling["math"]
        if kind == "dc":
            U, S, Vh = torch.linalg.svd(delta)
            delta = U[:, :2] @ Vh[:2] * S[:2].mean()
        else:
            smallest = delta.abs().flatten().argsort()[: delta.numel() // 2]
            delta = delta.flatten().index_fill(0, smallest, 0.0).reshape(delta.shape)
        changes[name] = probe(layer) @ delta.mT
    return changes


def cases() -> dict[str, Case]:
    """Everything that is measured. A case that the installed PEFT does not have is left out."""
    found = {
        "rsLoRA": Case(fields(use_rslora=True), fields(use_rslora=True)),
        "rsLoRA, the second adapter only": Case(fields(), fields(use_rslora=True)),
        "DoRA": Case(fields(use_dora=True), fields(use_dora=True), options={"dora_rank": WIDTH}),
        "`lora_bias`": Case(fields(lora_bias=True), fields(lora_bias=True)),
        "PiSSA initialisation": Case(fields(init_lora_weights="pissa"), fields()),
        "OLoRA initialisation": Case(fields(init_lora_weights="olora"), fields()),
        "`rank_pattern`": Case(fields(rank_pattern={"fc": 4}), fields()),
        "`alpha_pattern`": Case(fields(alpha_pattern={"fc": 1}), fields()),
        "different ranks": Case(fields(r=4), fields()),
        "different target lists": Case(fields("fc"), fields("fc", "out")),
        "a list and a regex as targets": Case(fields("fc"), {**fields(), "target_modules": r".*\.fc"}),
        "`layers_to_transform` of the first": Case(fields(layers_to_transform=[0]), fields()),
        "`exclude_modules` of the first": Case(fields(exclude_modules=["layers.1.fc"]), fields()),
        "Conv1D of GPT-2": Case(fields("gpt", fan_in_fan_out=True), fields("gpt", fan_in_fan_out=True)),
        "Embedding": Case(fields("tokens"), fields("tokens")),
        "Conv2d 3x2": Case(fields("image"), fields("image")),
        "Conv2d 1x1": Case(fields("pixel"), fields("pixel")),
        "Conv1d": Case(fields("sound"), fields("sound")),
        "negative weights": Case(fields(), fields(), weights=(1.0, -0.5)),
        "bfloat16 adapters": Case(fields(), fields(), dtype=torch.bfloat16),
        'bfloat16 adapters, `dtype="float32"`': Case(
            fields(), fields(), dtype=torch.bfloat16, options={"dtype": "float32"}, kinds=("", "", "ta")
        ),
        "one adapter, by `magnitude_prune_svd` or `dc`": Case(
            fields(), fields(), merge=one_pruned, truth=pruned, kinds=("magnitude_prune_svd", "", "dc")
        ),
        "a second try after a failure": Case(fields(), fields(), merge=failing_first),
    }
    if kasa := getattr(peft.tuners.lora, "KasaConfig", None):
        found["KaSA"] = Case(fields(kasa_config=kasa()), fields(kasa_config=kasa()))
    known = set(inspect.signature(LoraConfig).parameters)
    return {name: case for name, case in found.items() if {*case.math, *case.code} <= known}


def lora_layers(model: nn.Module) -> dict[str, Any]:
    """The LoRA layers by path."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}


def trained(case: Case) -> Any:
    """A model with both adapters, whose parameters are random numbers."""
    torch.manual_seed(0)
    model = get_peft_model(
        Model().to(case.dtype), LoraConfig(**case.math), adapter_name="math", autocast_adapter_dtype=False
    )
    model.add_adapter("code", LoraConfig(**case.code))
    for layer in lora_layers(model).values():
        for name, parameter in layer.named_parameters():
            if "lora_" in name and "base_layer" not in name:
                parameter.data.add_(0.3 * torch.randn_like(parameter))
    return model.to(case.dtype).eval()


def probe(layer: Any) -> Tensor:
    """The input a layer is measured with."""
    base, generator = layer.get_base_layer(), torch.Generator().manual_seed(1)
    if isinstance(base, nn.Embedding):
        return torch.arange(TOKENS)
    size = {nn.Conv2d: (3, 4, 7, 6), nn.Conv1d: (3, 4, 9)}.get(type(base), (30, WIDTH))
    return torch.randn(size, generator=generator, dtype=torch.float64)


@torch.no_grad()
def outputs(model: Any, adapter: str | None) -> dict[str, Tensor]:
    """What the LoRA layers compute with one adapter, or without any."""
    exact = copy.deepcopy(model).double()
    if adapter is None:
        with exact.disable_adapter():
            return {name: layer(probe(layer)) for name, layer in lora_layers(exact).items()}
    exact.base_model.set_adapter(adapter)
    return {name: layer(probe(layer)) for name, layer in lora_layers(exact.eval()).items()}


def total(model: Any, case: Case) -> dict[str, Tensor]:
    """The weighted sum of what the adapters change."""
    base, math, code = (outputs(model, adapter) for adapter in (None, "math", "code"))
    first, second = case.weights
    return {name: first * (math[name] - base[name]) + second * (code[name] - base[name]) for name in base}


def measured(case: Case, kind: str) -> float | str:
    """The relative error of a merge, or the first words of the error that refuses it."""
    model = trained(case)
    base, wanted = outputs(model, None), case.truth(model, case, kind)
    try:
        case.merge(model, case, kind)
    except Exception as error:  # whatever either library raises is what the table is about
        refusal = isinstance(error, dc_merge_peft.MergeError)
        return f"{'refused' if refusal else 'fails'}: {' '.join(str(error).split()[:8])} ..."
    found = outputs(model, "merged")
    lost = sum(float((found[name] - base[name] - wanted[name]).square().sum()) for name in wanted)
    return (lost / sum(float(change.square().sum()) for change in wanted.values())) ** 0.5


def verdict(outcome: float | str | None, rounding: bool) -> str:
    """A cell in one word."""
    if outcome is None:
        return ""
    if isinstance(outcome, str):
        return outcome.split(":")[0]
    return "exact" if outcome <= EXACT else "rounded" if rounding and outcome <= ROUNDED else "wrong"


def results() -> dict[str, list[tuple[str, float | str | None]]]:
    """For each case the verdict and the outcome of ``svd``, ``cat`` and this library."""
    rows = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name, case in cases().items():
            outcomes = [measured(case, kind) if kind else None for kind in case.kinds]
            rows[name] = [(verdict(outcome, case.dtype != torch.float32), outcome) for outcome in outcomes]
    return rows


def markdown(rows: Mapping[str, list[tuple[str, float | str | None]]]) -> str:
    """The table."""

    def cell(word: str, outcome: float | str | None) -> str:
        if outcome is None:
            return ""
        if isinstance(outcome, str):
            return outcome.replace("|", "\\|")
        return f"{word}, off by {outcome:.0%}" if word == "wrong" else f"{word}, {outcome:.0e}"

    lines = [f"| adapters | PEFT {peft.__version__}, `svd` | PEFT, `cat` | this library |", "| --- | --- | --- | --- |"]
    lines += [f"| {name} | {' | '.join(cell(*each) for each in cells)} |" for name, cells in rows.items()]
    return "\n".join(lines)


def rendered(page: str, table: str) -> str:
    """The page with its table made anew."""
    return _BLOCK.sub(lambda match: f"{match[1]}\n{table}\n\n{match[2]}", page)


def main() -> None:
    """Print the table, or write it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="write it into docs/peft.md")
    arguments = parser.parse_args()
    table = markdown(results())
    if arguments.write:
        PAGE.write_text(rendered(PAGE.read_text(encoding="utf-8"), table), encoding="utf-8")
    else:
        print(table)


if __name__ == "__main__":
    main()

"""The golden data as adapters: numbers from the original authors' programs."""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from dc_merge_peft.lowrank import LowRank

FOLDER = Path(__file__).parent.parent / "golden"
FILES = ("lora_8x16", "lora_3x4", "lora_12x8")

# golden key: (method, options beside alpha, weights and density)
KEYS: dict[str, tuple[str, dict[str, str | float]]] = {
    "ta": ("ta", {}),
    "dc_avg": ("dc", {"smoothing": "average"}),
    "dc_linear5": ("dc", {"smoothing": "linear", "rho": 5.0}),
    "dc_linear3": ("dc", {"smoothing": "linear", "rho": 3.0}),
}


@dataclass(frozen=True, eq=False)
class Golden:
    """One file: factors of every task, and the merged deltas that are expected."""

    tensors: dict[str, Tensor]
    tasks: int
    rank: int
    density: float
    modules: tuple[str, ...]

    def options(self, key: str) -> tuple[str, dict[str, str | float]]:
        """Method and options of a golden key."""
        method, options = KEYS[key]
        return method, {**options, "density": self.density} if method == "dc" else dict(options)

    def lowranks(self, module: str) -> list[LowRank]:
        """The factors of every task."""
        pairs = ((f"task{i}.{module}.lora_B", f"task{i}.{module}.lora_A") for i in range(self.tasks))
        return [LowRank(self.tensors[B], self.tensors[A]) for B, A in pairs]

    def expected(self, key: str) -> dict[str, Tensor]:
        """The merged deltas by module."""
        return {module: self.tensors[f"expected.{key}.{module}"] for module in self.modules}

    def flags(self, key: str) -> list[str]:
        """The same for the command line."""
        method, options = self.options(key)
        return ["--method", method, *(word for name, value in options.items() for word in ("-O", f"{name}={value}"))]


@functools.cache
def golden_file(name: str) -> Golden:
    """Read one file."""
    with safe_open(FOLDER / f"{name}.safetensors", framework="pt") as file:
        metadata = file.metadata()
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
    return Golden(
        tensors=tensors,
        tasks=int(metadata["tasks"]),
        rank=int(metadata["rank"]),
        density=float(metadata["density"]),
        modules=tuple(json.loads(metadata["shapes"])),
    )


def golden_cases() -> list[tuple[str, str]]:
    """Every file with every key."""
    return [(file, key) for file in FILES for key in KEYS]


def write_golden_adapters(golden: Golden, folder: Path) -> list[Path]:
    """Each task as a PEFT adapter directory with scaling 1."""
    folders = []
    for task in range(golden.tasks):
        target = folder / f"task{task}"
        target.mkdir()
        factors = {
            f"base_model.model.{module}.{factor}.weight": golden.tensors[f"task{task}.{module}.{factor}"]
            for module in golden.modules
            for factor in ("lora_A", "lora_B")
        }
        save_file(factors, target / "adapter_model.safetensors", {"format": "pt"})
        names = sorted({module.rpartition(".")[2] for module in golden.modules})
        config = {"peft_type": "LORA", "r": golden.rank, "lora_alpha": golden.rank, "target_modules": names}
        (target / "adapter_config.json").write_text(json.dumps(config))
        folders.append(target)
    return folders

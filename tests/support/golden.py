"""The golden data as adapters: numbers from the original authors' programs."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from dc_merge_peft.dense import Delta, Dense
from dc_merge_peft.lowrank import LowRank

FOLDER = Path(__file__).parent.parent / "golden"
FILES = ("lora_8x16", "lora_3x4", "lora_12x8")
FFT_FILES = ("fft_4", "fft_6")

Options = dict[str, str | float]

# golden key: (method, options beside alpha, weights and those that a file's metadata give)
KEYS: dict[str, tuple[str, Options]] = {
    "ta": ("ta", {}),
    "dc_avg": ("dc", {"smoothing": "average"}),
    "dc_linear5": ("dc", {"smoothing": "linear", "rho": 5.0}),
    "dc_linear3": ("dc", {"smoothing": "linear", "rho": 3.0}),
    "tsvm": ("tsvm", {}),
    "iso_c": ("iso_c", {}),
    "iso_cts": ("iso_cts", {}),
    "wudi": ("wudi", {}),
    "robust": ("robust", {}),
    "ties20_mean": ("ties", {}),
    "ties20_sum": ("ties", {"reduce": "sum"}),
    "knots_ties20": ("knots_ties", {}),
    "consensus": ("consensus", {}),
    "pcb": ("pcb", {}),
}
FFT_KEYS: dict[str, tuple[str, Options]] = {
    "dc": ("dc", {"smoothing": "none"}),
    "tsvm": ("tsvm", {}),
    "iso_c": ("iso_c", {}),
    "iso_cts": ("iso_cts", {}),
}
# Of the doors' tests: one key of each kind of output.
DOOR_KEYS = ("ta", "dc_avg", "dc_linear5", "dc_linear3", "tsvm", "robust")


@dataclass(frozen=True, eq=False)
class Golden:
    """One file: the deltas of every task, and the merged ones that are expected."""

    tensors: dict[str, Tensor]
    tasks: int
    rank: int  # of the adapters; 0 in a file of full fine-tuning deltas
    modules: tuple[str, ...]  # the matrices
    vectors: tuple[str, ...]  # parameters of one dimension
    from_metadata: dict[str, Options]  # by method

    def options(self, key: str) -> tuple[str, Options]:
        """Method and options of a golden key."""
        method, options = (KEYS if self.rank else FFT_KEYS)[key]
        return method, {**options, **self.from_metadata.get(method, {})}

    def lowranks(self, module: str) -> list[LowRank]:
        """The factors of every task."""
        pairs = ((f"task{i}.{module}.lora_B", f"task{i}.{module}.lora_A") for i in range(self.tasks))
        return [LowRank(self.tensors[B], self.tensors[A]) for B, A in pairs]

    def deltas(self, module: str) -> Sequence[Delta]:
        """One module's deltas, with factors or dense as the file has them."""
        return self.lowranks(module) if self.rank else [Dense(W) for W in self.parameters(module)]

    def parameters(self, name: str) -> list[Tensor]:
        """One parameter's deltas in a file of full fine-tuning."""
        return [self.tensors[f"task{i}.{name}"] for i in range(self.tasks)]

    def expected(self, key: str) -> dict[str, Tensor]:
        """The merged deltas by module, vectors included."""
        return {name: self.tensors[f"expected.{key}.{name}"] for name in (*self.modules, *self.vectors)}

    def flags(self, key: str) -> list[str]:
        """Method and options for the command line."""
        method, options = self.options(key)
        return ["--method", method, *(word for name, value in options.items() for word in ("-O", f"{name}={value}"))]


@functools.cache
def golden_file(name: str) -> Golden:
    """Read one file."""
    with safe_open(FOLDER / f"{name}.safetensors", framework="pt") as file:
        metadata = file.metadata()
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
    shapes = json.loads(metadata["shapes"])
    return Golden(
        tensors=tensors,
        tasks=int(metadata["tasks"]),
        rank=int(metadata.get("rank", 0)),
        modules=tuple(name for name, shape in shapes.items() if len(shape) == 2),
        vectors=tuple(name for name, shape in shapes.items() if len(shape) == 1),
        from_metadata={
            "dc": {"density": float(metadata["density"])},
            "iso_cts": {"common_fraction": float(metadata["k_frac"])},
            "wudi": {"steps": int(metadata["wudi_iters"])} if "wudi_iters" in metadata else {},
        },
    )


def golden_cases(keys: Iterable[str] = DOOR_KEYS) -> list[tuple[str, str]]:
    """Every file of adapters with these keys."""
    return [(file, key) for file in FILES for key in keys]


def all_cases() -> list[tuple[str, str]]:
    """Every file with every key."""
    return [*golden_cases(KEYS), *((file, key) for file in FFT_FILES for key in FFT_KEYS)]


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

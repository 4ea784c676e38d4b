"""Reading adapter directories: spellings of keys, file formats, and how much is read at a time."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from dc_merge_peft import DCMergeAdapter, SourceError
from dc_merge_peft.layout import Layout
from dc_merge_peft.sources import CheckpointSource
from dc_merge_peft.sources.files import PickleFile, SafetensorsFile
from tests.support.models import factors, write_checkpoint
from tests.support.versions import needs_safe_pickles

A, B = factors(6, 5, 2)
EMBEDDING_A, EMBEDDING_B = factors(6, 5, 2, seed=1)  # of 5 tokens and dimension 6

LINEAR_KEYS = {
    "saved by PEFT": "base_model.model.{}.lora_{}.weight",
    "without the prefix": "{}.lora_{}.weight",
    "with the adapter's name": "base_model.model.{}.lora_{}.default.weight",
    "another adapter's name": "base_model.model.{}.lora_{}.my-task.weight",
    "no prefix, with a name": "{}.lora_{}.default.weight",
    "compiled base": "base_model.model._orig_mod.{}.lora_{}.weight",
    "compiled layer": "base_model.model.{}._orig_mod.lora_{}.weight",
    "FSDP": "base_model.model._fsdp_wrapped_module.{}.lora_{}._fsdp_wrapped_module.weight",
    "FSDP and checkpointing": "_fsdp_wrapped_module.base_model.model.{}._checkpoint_wrapped_module.lora_{}.weight",
    "compiled PeftModel": "_orig_mod.base_model.model.{}.lora_{}.weight",
}
EMBEDDING_KEYS = {
    "saved by PEFT": "base_model.model.{}.lora_embedding_{}",
    "with .weight": "base_model.model.{}.lora_embedding_{}.weight",
    "with the adapter's name": "base_model.model.{}.lora_embedding_{}.default",
    "with both": "base_model.model.{}.lora_embedding_{}.default.weight",
    "without the prefix": "{}.lora_embedding_{}",
}


def read(folder: Path, module: str) -> Tensor:
    """The dense delta of one module."""
    source = CheckpointSource(folder)
    dense = source.factors(module).dense()
    source.close()
    return dense


@pytest.mark.parametrize("key", LINEAR_KEYS.values(), ids=LINEAR_KEYS)
def test_linear_key_variants(tmp_path: Path, key: str) -> None:
    """Every spelling of a linear layer's keys names the same module and gives the same delta."""
    names = ("encoder.layer.0.q", "encoder.layer.10.q")
    tensors = {key.format(name, factor): value for name in names for factor, value in (("A", A), ("B", B))}
    source = CheckpointSource(write_checkpoint(tmp_path / "task", tensors))
    assert set(source.modules) == set(names)
    spec = source.modules[names[0]]
    assert (spec.shape, spec.rank, spec.layout, spec.dtype) == ((6, 5), 2, Layout("linear"), torch.float32)
    for name in names:
        torch.testing.assert_close(source.factors(name).dense(), 2 * (B @ A), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("key", EMBEDDING_KEYS.values(), ids=EMBEDDING_KEYS)
def test_embedding_key_variants(tmp_path: Path, key: str) -> None:
    """Every spelling of an embedding's keys; m is its dimension, n its tokens."""
    tensors = {key.format("words", "A"): EMBEDDING_A, key.format("words", "B"): EMBEDDING_B}
    source = CheckpointSource(write_checkpoint(tmp_path / "task", tensors))
    assert source.modules["words"].shape == (6, 5) and source.modules["words"].layout == Layout("embedding")
    torch.testing.assert_close(source.factors("words").dense(), 2 * (EMBEDDING_B @ EMBEDDING_A), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("module", ["lora_A.q", "my_lora_block.q", "x.lora_B.default.q", "0", "q.base_layer_norm"])
def test_names_that_look_like_factors(tmp_path: Path, module: str) -> None:
    """A module of the model may itself be called like a factor or a number."""
    keys = {f"base_model.model.{module}.lora_{name}.weight": value for name, value in (("A", A), ("B", B))}
    assert list(CheckpointSource(write_checkpoint(tmp_path / "task", keys)).modules) == [module]


@pytest.mark.parametrize("extra", ["q.base_layer.weight", "q.base_layer.bias", "words.base_layer.weight"])
def test_base_layers_are_ignored(tmp_path: Path, extra: str) -> None:
    """Base weights kept beside the factors are no part of the delta, and are not read."""
    keys = {f"base_model.model.q.lora_{name}.weight": value for name, value in (("A", A), ("B", B))}
    folder = write_checkpoint(tmp_path / "task", {**keys, f"base_model.model.{extra}": torch.ones(6, 5)})
    assert list(CheckpointSource(folder).modules) == ["q"]
    torch.testing.assert_close(read(folder, "q"), 2 * (B @ A), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("shape", [(5, 3), (5, 3, 2), (5, 3, 2, 2)], ids=["Conv1d", "Conv2d", "Conv3d"])
def test_convolutions(tmp_path: Path, shape: tuple[int, ...]) -> None:
    """Factors of convolutions flatten to (m, channels * kernel)."""
    kernel_A = torch.randn(2, *shape)
    kernel_B = B.reshape(6, 2, *(1,) * (len(shape) - 1))
    keys = {"conv.lora_A.weight": kernel_A, "conv.lora_B.weight": kernel_B}
    source = CheckpointSource(write_checkpoint(tmp_path / "task", keys))
    spec = source.modules["conv"]
    assert spec.shape == (6, math.prod(shape)) and spec.layout == Layout("conv", shape[1:])
    assert str(spec.layout) == f"Conv{len(shape) - 1}d " + "x".join(map(str, shape[1:]))
    torch.testing.assert_close(source.factors("conv").dense(), 2 * B @ kernel_A.flatten(1), rtol=1e-6, atol=1e-6)


def as_bin(folder: Path, *, legacy: bool) -> Path:
    """Replace the safetensors file by a .bin."""
    path = folder / "adapter_model.safetensors"
    state = load_file(path)
    path.unlink()
    torch.save(state, folder / "adapter_model.bin", _use_new_zipfile_serialization=not legacy)
    return folder


@needs_safe_pickles
@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy pickle"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_bin(tmp_path: Path, legacy: bool, dtype: torch.dtype) -> None:
    """Both formats of torch.save give what safetensors gives, in every dtype."""
    keys = {"q.lora_A.weight": A.to(dtype), "q.lora_B.weight": B.to(dtype)}
    plain = write_checkpoint(tmp_path / "plain", keys)
    pickled = as_bin(write_checkpoint(tmp_path / "pickled", keys), legacy=legacy)
    first, second = CheckpointSource(plain), CheckpointSource(pickled)
    assert first.modules == second.modules and first.modules["q"].dtype is dtype
    assert torch.equal(first.factors("q").B, second.factors("q").B)
    assert torch.equal(first.factors("q").A, second.factors("q").A)


def test_safetensors_come_first(tmp_path: Path) -> None:
    """Where both files are there, PEFT reads the safetensors file; so does this library."""
    folder = write_checkpoint(tmp_path / "task", {"q.lora_A.weight": A, "q.lora_B.weight": B})
    torch.save({"q.lora_A.weight": A, "q.lora_B.weight": 0 * B}, folder / "adapter_model.bin")
    torch.testing.assert_close(read(folder, "q"), 2 * (B @ A), rtol=1e-6, atol=1e-6)


def test_default_rank_and_alpha(tmp_path: Path) -> None:
    """A config without r and lora_alpha means PEFT's defaults, 8 and 8."""
    wide = {"q.lora_A.weight": torch.randn(8, 9), "q.lora_B.weight": torch.randn(9, 8)}
    folder = write_checkpoint(tmp_path / "task", wide)
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    torch.testing.assert_close(read(folder, "q"), wide["q.lora_B.weight"] @ wide["q.lora_A.weight"])


def test_info(tmp_path: Path) -> None:
    """What the config says about the base model and the targets."""
    fields = {"base_model_name_or_path": "org/base", "revision": "v2", "task_type": "CAUSAL_LM", "exclude_modules": []}
    source = CheckpointSource(write_checkpoint(tmp_path / "task", layers_to_transform=[1], **fields))
    info = source.info
    assert (info.name, info.location, info.revision) == ("task", str(tmp_path / "task"), None)
    assert (info.base_model, info.base_revision, info.task_type) == ("org/base", "v2", "CAUSAL_LM")
    assert info.targets.to_config() == {"target_modules": ["q"], "layers_to_transform": [1]}
    assert CheckpointSource(tmp_path / "task", name="mine").info.name == "mine"


class Watch:
    """Counts the tensors read, and how many of them are alive at once."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.keys: list[str] = []
        self.peak = 0
        self._alive: list[weakref.ref[Tensor]] = []
        for kind in (SafetensorsFile, PickleFile):
            monkeypatch.setattr(kind, "read", self._watched(kind.read))

    def _watched(self, original: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def watched(file: object, key: str) -> Tensor:
            tensor = original(file, key).clone()
            self.keys.append(key)
            self._alive = [ref for ref in self._alive if ref() is not None] + [weakref.ref(tensor)]
            self.peak = max(self.peak, len(self._alive))
            return tensor

        return watched


@pytest.mark.parametrize("place", [0, 1, 2])
def test_fingerprint_looks_all_over_the_file(tmp_path: Path, place: int) -> None:
    """Weights that differ at the beginning, in the middle or at the end have another one; the same ones have the same."""
    A, B = factors(300, 200, 50)
    marks = []
    for changed in (False, True, False):
        values = {"q.lora_A.weight": A.clone(), "q.lora_B.weight": B.clone()}
        if changed:
            stored = values["q.lora_A.weight"] if place == 0 else values["q.lora_B.weight"]
            stored.view(-1)[[0, stored.numel() // 4, -1][place]] += 1
            if place == 1:
                stored[len(stored) // 4 : len(stored) // 2] += 1
        folder = write_checkpoint(tmp_path / f"{len(marks)}", values, r=50)
        marks.append(CheckpointSource(folder).info.fingerprint)
    assert marks[0] == marks[2] != marks[1] and marks[0] is not None


def test_opening_reads_no_tensor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Opening and planning need headers only."""
    watch = Watch(monkeypatch)
    folders = [write_checkpoint(tmp_path / name) for name in ("one", "two")]
    assert list(CheckpointSource(folders[0]).modules) == ["enc.q"]
    assert DCMergeAdapter().plan(folders).summary()["modules"] == 1
    assert watch.keys == []


def test_each_factor_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A merge reads every factor of every adapter once, and lets a module's factors go."""
    watch = Watch(monkeypatch)
    modules = [f"layer.{index}.q" for index in range(6)]
    folders = []
    for name, seed in (("one", 0), ("two", 50)):
        tensors = {}
        for index, module in enumerate(modules):
            tensors |= dict(
                zip((f"{module}.lora_A.weight", f"{module}.lora_B.weight"), factors(6, 5, 2, seed + index), strict=True)
            )
        # alpha = r: the scaling is 1, so that nothing is copied on the way
        folders.append(write_checkpoint(tmp_path / name, tensors, lora_alpha=2))
    DCMergeAdapter(smoothing="average").merge(folders)
    assert len(watch.keys) == 2 * 2 * len(modules) and len(set(watch.keys)) == 2 * len(modules)
    one_module = 2 * len(folders)
    assert watch.peak <= one_module


def test_closed(tmp_path: Path) -> None:
    """After a merge the files are let go: on every system they can be deleted. A source that was open stays its owner's."""
    folder = write_checkpoint(tmp_path / "task")
    merger = DCMergeAdapter(method="ta")
    merger.merge([folder])
    assert not any(Path(file.path).is_relative_to(folder) for file in psutil.Process().open_files())
    source = CheckpointSource(folder)
    first, again = merger.merge([source]), merger.merge([source])
    assert torch.equal(first.delta("enc.q"), again.delta("enc.q"))
    source.close()
    with pytest.raises(SourceError, match="has been closed"):
        source.factors("enc.q")

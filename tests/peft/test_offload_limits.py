"""What can't be read or written where a model is offloaded, sharded or quantised: refused by name, or not needed at all."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload, disk_offload
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from peft.tuners.lora import model as lora_model
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.torch_version import TorchVersion

from dc_merge_peft import DCMergeAdapter, OutputError, SourceError, UnsupportedAdapterError
from dc_merge_peft.offload import Offloading
from dc_merge_peft.outputs import live
from tests.support import models
from tests.support.refused import refused

NAMES = ["sentiment", "topic"]
QUERY = "encoder.layer.1.attention.self.query"
CPU = torch.device("cpu")
# Where DTensor has its public place and FSDP runs on a CPU.
NEW_TORCH = pytest.mark.skipif(TorchVersion(torch.__version__) < "2.6", reason="newer torch")


def two(build: Any = models.bert, **fields: Any) -> Any:
    """A model with two adapters of these fields."""
    return models.with_lora(build(), {name: {"r": 2, "target_modules": ["query"], **fields} for name in NAMES})


def still_refused(model: Any, kind: type[Exception], *words: str) -> None:
    """The merge is refused, and no trace of it is left."""
    names = [name for name, _ in model.named_parameters()]
    with refused(kind, *words):
        model.base_model.add_weighted_adapter(NAMES, [1.0, 1.0], "new", combination_type="ta")
    assert [name for name, _ in model.named_parameters()] == names and list(model.peft_config) == NAMES


def holder(model: Any, adapter: str = "topic") -> Any:
    """The linear layer that holds a lora_A."""
    return models.layers(model, adapter)[QUERY].lora_A[adapter]


def test_meta_tensors_without_a_hook() -> None:
    """Nobody knows their numbers."""
    model = two()
    holder(model).to("meta")
    words = (f"lora_A of '{QUERY}'", "'topic'", "meta tensor without numbers", "expected whole factors", "from disk")
    still_refused(model, UnsupportedAdapterError, *words)


def test_offloaded_files_that_are_gone(tmp_path: Path) -> None:
    """The hook is there, its folder is not."""
    model = disk_offload(two(), str(tmp_path / "offload"), execution_device=CPU)
    for file in (tmp_path / "offload").glob("*query.lora_A.topic*"):
        file.unlink()
    words = (
        "lora_A of 'encoder.layer.0.attention.self.query'",
        "'topic'",
        "can't be read (FileNotFoundError",
        "from disk",
    )
    still_refused(model, SourceError, *words)


def test_a_hook_that_lacks_the_factor() -> None:
    """A factor that was put on the meta device below a hook that has never seen it."""
    model = cpu_offload(two(), execution_device=CPU)
    hook: AlignDevicesHook = holder(model)._hf_hook
    hook.weights_map = {}
    still_refused(model, SourceError, f"lora_A of '{QUERY}'", "can't be read (KeyError", "expected it where accelerate")


def test_zero_3() -> None:
    """DeepSpeed's mark on a partitioned parameter."""
    model = two()
    holder(model).weight.ds_id = 7
    still_refused(model, UnsupportedAdapterError, f"lora_A of '{QUERY}'", "DeepSpeed ZeRO-3", "before the model is")


@pytest.fixture
def one_process() -> Iterator[None]:
    """A process group of one."""
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


@NEW_TORCH
@pytest.mark.usefixtures("one_process")
def test_dtensor() -> None:
    """A factor that torch has distributed."""
    from torch.distributed.tensor import DTensor, Replicate

    model, mesh = two(), init_device_mesh("cpu", (1,))
    holder(model).weight = nn.Parameter(DTensor.from_local(holder(model).weight.detach(), mesh, [Replicate()]))
    words = (f"lora_A of '{QUERY}'", "is a DTensor, sharded over devices", "from disk")
    still_refused(model, UnsupportedAdapterError, *words)


def test_tensor_parallel() -> None:
    """PEFT's mark on a layer that transformers before 5.17 has split: its factors are plain tensors, of one process."""
    model = two()
    models.layers(model, "topic")[QUERY]._tp_info = object()
    words = (f"lora_A of '{QUERY}'", "one process's part of the layer", "tensor parallelism", "from disk")
    still_refused(model, UnsupportedAdapterError, *words)


@NEW_TORCH
@pytest.mark.usefixtures("one_process")
@pytest.mark.skipif(not hasattr(lora_model, "add_lora_tp_hooks_dtensor"), reason="newer PEFT")
@pytest.mark.parametrize("wraps", [True, False])
def test_into_a_tensor_parallel_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wraps: bool) -> None:
    """Since transformers 5.17 PEFT makes DTensors of new factors, which whole ones can't replace: they would not fit what the layer
    computes."""
    from torch.distributed.tensor import distribute_module

    merged = DCMergeAdapter().merge(models.save_adapters(two(), tmp_path, NAMES))
    model = models.bert() if wraps else two()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    mesh = init_device_mesh("cpu", (1,))
    monkeypatch.setattr(lora_model, "is_transformers_dtensor_tp", True)
    monkeypatch.setattr(lora_model, "get_tp_plan_and_mesh", lambda *_: ("colwise", mesh))
    monkeypatch.setattr(
        lora_model, "add_lora_tp_hooks_dtensor", lambda module, *_, **__: distribute_module(module, mesh)
    )
    with refused(
        OutputError, "'encoder.layer.", "query' is split over devices", "expected whole layers", "load_adapter"
    ):
        merged.add_to(model, "new")
    after = model.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[name], value) for name, value in before.items())


@NEW_TORCH
@pytest.mark.usefixtures("one_process")
@pytest.mark.filterwarnings("ignore:FSDP is switching to use .NO_SHARD:UserWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("originals", [False, True])
def test_fsdp(originals: bool) -> None:
    """Layers that FSDP has wrapped, flat or with their original parameters."""
    model = two().requires_grad_(False)
    layer = model.base_model.model.encoder.layer
    layer[1] = FullyShardedDataParallel(layer[1], device_id=CPU, use_orig_params=originals)
    words = ("lora_A of 'encoder.layer.1._fsdp_wrapped_module.attention.self.query'", "as FSDP does", "expected whole")
    still_refused(model, UnsupportedAdapterError, *words)


class Packed(nn.Linear):
    """A layer as bitsandbytes makes them: half a byte a weight, and only its forward pass can unpack them."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__(layer.in_features, layer.out_features, bias=False)
        size = layer.in_features * layer.out_features // 2
        self.weight = nn.Parameter(torch.full((size, 1), 7, dtype=torch.uint8), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * 0.5


def test_quantised_base() -> None:
    """Neither reading nor writing looks into the weight of the base layer."""
    expected = two()
    expected.add_weighted_adapter(NAMES, [1.0, 2.0], "new", combination_type="ta")

    def quantised() -> Any:
        model = models.bert()
        for layer in model.encoder.layer:
            layer.attention.self.query = Packed(layer.attention.self.query)
        return model

    model = two(quantised)
    model.add_weighted_adapter(NAMES, [1.0, 2.0], "new", combination_type="ta")
    for name, layer in models.layers(expected, "new").items():
        found = models.layers(model, "new")[name]
        assert torch.equal(found.lora_A["new"].weight, layer.lora_A["new"].weight)
        assert torch.equal(found.lora_B["new"].weight, layer.lora_B["new"].weight)
        assert found.base_layer.weight.dtype == torch.uint8 and bool((found.base_layer.weight == 7).all())
    model.set_adapter("new")
    assert bool(torch.isfinite(models.output(model)).all())


def test_offloaded_embeddings_and_convolutions() -> None:
    """Factors without a module of their own are read and written too. (PEFT itself can't run an offloaded LoRA on an
    embedding; the new one is in memory and runs.)"""
    fields = {"target_modules": ["tokens", "conv", "mix", "blk.fc"]}
    plain, model = two(models.patches, **fields), cpu_offload(two(models.patches, **fields), execution_device=CPU)
    for made in (plain, model):
        made.add_weighted_adapter(NAMES, [1.0, -0.5], "new", combination_type="ta")
        made.set_adapter("new")
    assert torch.equal(models.output(model), models.output(plain))
    for made in (plain, model):
        made.add_weighted_adapter(["new", "topic"], [1.0, 0.5], "again", combination_type="ta")
        made.set_adapter("again")
    assert torch.equal(models.output(model), models.output(plain))


def test_device_of_new_factors() -> None:
    """Where the base layer computes once it is brought back, not where its weight lies; this needs no such device."""
    layer = models.layers(cpu_offload(two(), execution_device=CPU), "topic")[QUERY]
    layer.base_layer._hf_hook.execution_device = torch.device("cuda", 1)
    fresh = nn.Parameter(torch.ones(2, 2))
    assert live._device_of(layer, fresh, Offloading(layer.modules())) == torch.device("cuda", 1)
    layer.base_layer._hf_hook.execution_device = None
    assert live._device_of(layer, fresh, Offloading(layer.modules())) == CPU
    plain = models.layers(two(), "topic")[QUERY]
    assert live._device_of(plain, fresh, Offloading(plain.modules())) == CPU
    unmade = nn.Parameter(torch.ones(2, 2, device="meta"))  # as PEFT leaves it where its numbers are to come
    assert live._device_of(plain, unmade, Offloading(plain.modules())) == CPU
    plain.base_layer.to("meta")
    assert live._device_of(plain, unmade, Offloading(plain.modules())) is None


def test_several_hooks_on_one_module() -> None:
    """accelerate chains hooks; the one that offloads is found among them."""
    plain, model = two(), cpu_offload(two(), execution_device=CPU)
    add_hook_to_module(holder(model), AlignDevicesHook(io_same_device=True), append=True)
    for made in (plain, model):
        made.add_weighted_adapter(NAMES, [1.0, 1.0], "new", combination_type="dc")
        made.set_adapter("new")
    assert torch.equal(models.output(model), models.output(plain))


def test_failure_leaves_an_offloaded_model_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a PeftModel and in a base model; the next try works."""

    def fail(*_: object) -> None:
        raise RuntimeError("disk full")

    merged = DCMergeAdapter(method="ta").merge(models.save_adapters(two(), tmp_path))
    for build in (two, models.bert):
        model: Any = disk_offload(build(), str(tmp_path / build.__name__), execution_device=CPU)
        output, keys = models.output(model), list(model.state_dict())
        kinds = {name: (type(module), hasattr(module, "_hf_hook")) for name, module in model.named_modules()}
        with monkeypatch.context() as patch:
            patch.setattr(live, "write_factors", fail)
            with pytest.raises(RuntimeError, match="disk full"):
                merged.add_to(model)
        assert list(model.state_dict()) == keys
        assert {name: (type(module), hasattr(module, "_hf_hook")) for name, module in model.named_modules()} == kinds
        assert torch.equal(models.output(model), output)
        assert not torch.equal(models.output(merged.add_to(model)), output)

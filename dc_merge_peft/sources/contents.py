"""The files of a PEFT adapter, and what lies where one was expected, with what to do about it: for the ends of errors."""

from __future__ import annotations

from pathlib import Path

from dc_merge_peft.errors import first_line, preview
from dc_merge_peft.paths import is_file

CONFIG_FILE = "adapter_config.json"
WEIGHT_FILES = ("adapter_model.safetensors", "adapter_model.bin")

_ARCHIVES = (".zip", ".tar", ".gz", ".tgz", ".bz2", ".xz", ".zst", ".7z", ".rar")
_OTHER_PROGRAM = "LoRAs of kohya, ComfyUI and diffusers are no PEFT adapters, and one of PEFT needs the config that was saved with it"


def instead_of_directory(path: Path) -> str:
    """A file in the place of an adapter's directory."""
    if path.suffix.lower() in _ARCHIVES:
        return f"unpack it, and give the folder that has the {CONFIG_FILE}"
    if path.suffix.lower() in (".yaml", ".yml"):
        return "a configuration of a merge is given by --config"
    if is_file(path.parent / CONFIG_FILE):
        return f"give the folder '{path.parent}'"
    return f"there is no {CONFIG_FILE} beside it: {_OTHER_PROGRAM}"


def instead_of_config(directory: Path) -> str:
    """A directory without an adapter's config."""
    if inside := adapters_inside(directory):
        return inside
    if is_file(directory / "config.json"):
        return "is it a full model? dc-merge merge-full merges those, and dc-merge fuse takes one before the adapters"
    try:
        names = sorted(entry.name for entry in directory.iterdir())
    except OSError as error:
        return f"its files can't be listed ({first_line(error)})"
    if not names:
        return "it is empty"
    if weights := [name for name in names if name in WEIGHT_FILES or name.endswith(".safetensors")]:
        return f"there is only {preview(weights, 2)}: {_OTHER_PROGRAM}"
    return "is it a full model?"


def instead_of_weights(directory: Path) -> str:
    """A directory with an adapter's config and no weights."""
    if inside := adapters_inside(directory):
        return inside
    if any(next(directory.glob(sign), None) for sign in ("global_step*", "zero_to_fp32.py", "*fsdp*", "*/*.distcp")):
        return (
            "what is there is a checkpoint of DeepSpeed or FSDP, in pieces: load it with the program that trained it, and "
            "save the adapter with PEFT's save_pretrained"
        )
    return "save or download it again"


def adapters_inside(directory: Path) -> str:
    """Which folders in it hold adapters, such as the checkpoints of a training run; nothing where there are none."""
    found = sorted(directory.glob(f"*/{CONFIG_FILE}")) or sorted(directory.glob(f"*/*/{CONFIG_FILE}"))
    names = [config.parent.relative_to(directory).as_posix() for config in found]
    shown = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
    return f"its subfolders hold adapters: {shown}; give one of them" if names else ""

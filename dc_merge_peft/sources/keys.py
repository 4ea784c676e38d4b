"""State-dict keys of LoRA checkpoints: which module and which factor a tensor is, in every spelling PEFT has used."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from dc_merge_peft.errors import SourceError, UnsupportedAdapterError, preview

PREFIX = "base_model.model."
_LONGEST = 10_000  # characters of a key; every part of a path is looked at together with all that follow it

# "x.lora_A.weight", "x.lora_A.default.weight", "x.lora_embedding_A", "x.lora_embedding_A.default"; a module of the
# model itself may be called anything, so the factor is looked for from the right.
_FACTOR = re.compile(
    r"(?P<module>.+)\.lora_(?P<embedding>embedding_)?(?P<factor>[AB])(?:\.(?!weight$|bias$)(?P<adapter>[^.]+))?(?:\.weight)?",
    re.DOTALL,
)

# What torch.compile, FSDP and activation checkpointing put into the paths of what they wrap. PEFT reads no adapter with the latter two.
_WRAPPERS = re.compile(r"\.(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)(?=\.|$)")

# What is stored beside factors that makes the delta more than B @ A, with the feature that stores it.
_FEATURES = {
    r"lora_E$|lora_E\.|ranknum": "AdaLoRA: its delta has a third factor",
    r"lora_diag": "KaSA: its delta has a third factor",
    r"lora_(rotation|embedding_rotation)": "a LoRA variant with a rotation",
}


@dataclass(frozen=True)
class FactorKeys:
    """The two tensors of one module in a checkpoint."""

    A: str
    B: str
    embedding: bool


def factor_keys(keys: Iterable[str], adapter: str) -> dict[str, FactorKeys]:
    """Sort the keys of a checkpoint into modules.

    Args:
        keys: All keys of the state dict.
        adapter: How to call the adapter in errors.

    Returns:
        By module path in the base model, in the order of the file.

    Raises:
        SourceError: no LoRA factors, a factor without its partner, factors of several adapters in one file, or an endless name.
        UnsupportedAdapterError: tensors that make the delta more than ``B @ A``.
    """
    found: dict[tuple[str, bool], dict[str, str]] = {}
    infixes: set[str | None] = set()
    others = []
    for key in keys:
        if len(key) > _LONGEST:
            raise SourceError(
                f"adapter '{adapter}' stores a tensor under a name of {len(key)} characters ('{key[:100]}...'): expected at most "
                f"{_LONGEST}; the checkpoint is damaged, save or download it again"
            )
        match = _FACTOR.fullmatch(key)
        if match is None:
            others.append(key)
            continue
        infixes.add(match["adapter"])
        pair = found.setdefault((module_path(match["module"]), match["embedding"] is not None), {})
        if match["factor"] in pair:
            raise SourceError(
                f"adapter '{adapter}' stores lora_{match['factor']} of '{module_path(match['module'])}' twice "
                f"('{pair[match['factor']]}' and '{key}'): expected one adapter in one file; save the adapters apart"
            )
        pair[match["factor"]] = key
    _refuse_others(others, adapter, any_factor=bool(found))
    if len(infixes) > 1:
        names = preview(sorted(str(infix) for infix in infixes))
        raise SourceError(
            f"adapter '{adapter}' mixes keys of several adapters ({names}): expected one adapter in one file; "
            "save each with PEFT's save_pretrained"
        )
    return {module: _pair(module, pair, embedding, adapter) for (module, embedding), pair in found.items()}


def other_keys(keys: Iterable[str]) -> list[str]:
    """The keys of a checkpoint that are no factors."""
    return [key for key in keys if _FACTOR.fullmatch(key) is None]


def module_path(module: str) -> str:
    """The path as the base model spells it."""
    return _WRAPPERS.sub("", f".{module}")[1:].removeprefix(PREFIX)


def _pair(module: str, pair: dict[str, str], embedding: bool, adapter: str) -> FactorKeys:
    missing = {"A", "B"} - set(pair)
    if missing:
        (name,) = missing
        raise SourceError(
            f"adapter '{adapter}' has no lora_{name} for '{module}', only '{next(iter(pair.values()))}': expected both "
            "factors; the checkpoint is incomplete, save or download it again"
        )
    return FactorKeys(pair["A"], pair["B"], embedding)


def _refuse_others(others: list[str], adapter: str, *, any_factor: bool) -> None:
    """Keys that are no factors: those that change what the factors mean are refused by name, others are left to the reader of
    what stands beside them."""
    for key in others:
        for pattern, feature in _FEATURES.items():
            if re.search(pattern, key):
                raise UnsupportedAdapterError(
                    f"adapter '{adapter}' holds '{key}', which means {feature}; expected plain LoRA, whose delta is "
                    "scaling * B @ A: convert it to plain LoRA, or merge it into its base model and extract a LoRA"
                )
    if not any_factor:
        listing = f"found {preview(others)}" if others else "it is empty"
        raise SourceError(
            f"adapter '{adapter}' has no lora_A or lora_B tensors ({listing}): expected a PEFT LoRA checkpoint"
        )

"""Named renames of module paths, for adapters whose base model has got other module names since they were trained.

A rename happens only when it is asked for. It changes paths alone: factors, scaling and everything computed stay as they
are, and the merged adapter names its targets by their new full paths.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from dc_merge_peft.errors import OptionError, unknown_name


@dataclass(frozen=True)
class Rename:
    """One rename. All patterns are regular expressions for the beginning of a path; what follows stays as it is."""

    old: str  # whose module names are read
    new: str  # whose module names come out
    rules: tuple[tuple[str, str], ...]  # (pattern, replacement); the first that matches counts
    keeps: str  # paths that are the same in both, or in the new form already
    sign: str  # paths that only the old form has
    about: str = ""  # a pattern to be found in "BASE-MODEL CLASS" of an adapter that is likely to be meant
    since: str = "4"  # the version of transformers that changed the names
    other_base: bool = False  # the new names are those of a converted copy of the base model


_VIT_LAYER = r"((?:\w+\.)?)encoder\.layer\.(\d+)\."
_DINO_LAYER = r"((?:\w+\.)?encoder\.layer\.\d+\.attention\.)"

RENAMES: dict[str, Rename] = {
    # The original LLaVA, a Llama with a tower and a projector in it, as transformers' LlavaForConditionalGeneration.
    "llava-hf": Rename(
        old="the original LLaVA",
        new="transformers' LlavaForConditionalGeneration",
        rules=(
            (r"model\.(layers\.|norm$|embed_tokens$)", r"model.language_model.\1"),
            (r"model\.mm_projector\.0$", "model.multi_modal_projector.linear_1"),
            (r"model\.mm_projector\.2$", "model.multi_modal_projector.linear_2"),
            (r"model\.vision_tower\.vision_tower\.(?:vision_model\.)?", "model.vision_tower."),
        ),
        keeps=r"model\.(language_model|multi_modal_projector|vision_tower)\.|lm_head$",
        sign=r"model\.(layers|mm_projector)\.",
        about=r"(?i)llava",
        other_base=True,
    ),
    # LLaVA in transformers before 4.52 (and its relatives): towers and projector beside a whole language model.
    "llava-v5": Rename(
        old="LlavaForConditionalGeneration before transformers 4.52",
        new="that of transformers 5",
        rules=(
            (r"language_model\.model\.", "model.language_model."),
            (r"language_model\.lm_head$", "lm_head"),
            (r"(?:model\.)?vision_tower\.vision_model\.", "model.vision_tower."),
            (r"(vision_tower|multi_modal_projector)\.", r"model.\1."),
        ),
        keeps=r"model\.(language_model|multi_modal_projector|vision_tower)\.|lm_head$",
        sign=r"language_model\.(model\.|lm_head$)",
    ),
    # transformers 5 has no level in between here: KnOTS's and DC-Merge's checkpoints were made with version 4.
    "clip-vision-v5": Rename(
        old="the CLIPVisionModel of transformers 4",
        new="that of transformers 5",
        rules=((r"vision_model\.", ""),),
        keeps=r"(embeddings|encoder|pre_layrnorm|post_layernorm|head)\b",
        sign=r"vision_model\.",
        about=r" (\w*VisionModel)?$",
        since="5.6",
    ),
    "clip-text-v5": Rename(
        old="the CLIPTextModel of transformers 4",
        new="that of transformers 5",
        rules=((r"text_model\.", ""),),
        keeps=r"(embeddings|encoder|final_layer_norm|head)\b",
        sign=r"text_model\.",
        about=r" (\w*TextModel)?$",
        since="5.6",
    ),
    # ViT, DeiT and BEiT, with and without a head's class around them.
    "vit-v5": Rename(
        old="ViT, DeiT and BEiT of transformers 4",
        new="those of transformers 5",
        rules=(
            (_VIT_LAYER + r"attention\.attention\.query$", r"\1layers.\2.attention.q_proj"),
            (_VIT_LAYER + r"attention\.attention\.key$", r"\1layers.\2.attention.k_proj"),
            (_VIT_LAYER + r"attention\.attention\.value$", r"\1layers.\2.attention.v_proj"),
            (_VIT_LAYER + r"attention\.output\.dense$", r"\1layers.\2.attention.o_proj"),
            (_VIT_LAYER + r"intermediate\.dense$", r"\1layers.\2.mlp.fc1"),
            (_VIT_LAYER + r"output\.dense$", r"\1layers.\2.mlp.fc2"),
        ),
        keeps=r"(\w+\.)?(layers\.|embeddings\.|pooler\.|layernorm$)|\w*classifier$",
        sign=_VIT_LAYER + r"attention\.attention\.",
        about=r"^(?!.*(?i:dinov2))",
        since="5.9",
    ),
    "dinov2-v5": Rename(
        old="the DINOv2 of transformers 4",
        new="that of transformers 5",
        rules=(
            (_DINO_LAYER + r"attention\.query$", r"\1q_proj"),
            (_DINO_LAYER + r"attention\.key$", r"\1k_proj"),
            (_DINO_LAYER + r"attention\.value$", r"\1v_proj"),
            (_DINO_LAYER + r"output\.dense$", r"\1o_proj"),
        ),
        keeps=r"(\w+\.)?(encoder\.layer\.\d+\.(attention\.[qkvo]_proj$|mlp\.fc[12]$)|embeddings\.|layernorm$)|classifier$",
        sign=_DINO_LAYER + r"attention\.",
        about=r"(?i)dinov2",
        since="5.18",
    ),
}


def rename_named(name: str) -> Rename:
    """A rename by its name.

    Raises:
        OptionError: no such rename.
    """
    if not isinstance(name, str) or name not in RENAMES:
        raise OptionError(unknown_name("rename", name, RENAMES))
    return RENAMES[name]


def new_path(path: str, rename: Rename) -> str | None:
    """A module path under its new name; None where the rename does not know it."""
    for pattern, replacement in rename.rules:
        match = re.match(pattern, path)
        if match is not None:
            return match.expand(replacement) + path[match.end() :]
    return path if re.match(rename.keeps, path) else None


def fitting_rename(paths: Iterable[str], exists: Callable[[str], object], given: str | None) -> str:
    """For the end of an error about missing modules: the rename under which a model has them all, or that the one that was
    given may be the reason."""
    if given is not None:
        return f"; they are the names of {RENAMES[given].new}, by rename='{given}': leave it out for another model"
    paths = list(paths)
    for name, rename in RENAMES.items():
        renamed = [new_path(path, rename) for path in paths]
        if all(path is not None and exists(path) for path in renamed):
            return f"; they are named as in {rename.old}: merge with rename='{name}' (--rename {name})"
    return ""


def meeting_rename(one: Iterable[str], other: Iterable[str]) -> str:
    """For the end of an error about two adapters without a common module: the rename under which they have some, or nothing."""
    both = [set(one), set(other)]
    for name, rename in RENAMES.items():
        first, second = ({new_path(path, rename) for path in paths} for paths in both)
        if None not in first | second and first & second:
            return f"under rename='{name}' (--rename {name}) they have some, since one is named as in {rename.old}"
    return ""

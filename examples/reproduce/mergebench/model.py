"""LLaVA with adapters in it, and its answers: prompts, images and decoding as in the benchmark's programs."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from accuracy.keys import content_key
from PIL import Image

from dc_merge_peft import DCMergeAdapter, MergeWarning
from reproduce.mergebench.questions import Questions, image_path
from reproduce.revisions import loadable

RENAME = "llava-hf"
# "vicuna_v1" of the original repository.
PROMPT = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, and polite "
    "answers to the user's questions. USER: {question} ASSISTANT:"
)
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


def load(place: str | Path, dtype: str, device: str) -> tuple[Any, Any]:
    """The base model and its processor.

    Raises:
        SystemExit: there is none.
    """
    from transformers import AutoProcessor, LlavaForConditionalGeneration

    name, at = loadable(place)
    try:
        model: Any = LlavaForConditionalGeneration.from_pretrained(name, dtype=DTYPES[dtype], revision=at)
        processor: Any = AutoProcessor.from_pretrained(name, revision=at)
    except (OSError, ValueError) as error:
        raise SystemExit(
            f"{place}: can't be loaded as LLaVA: {str(error).splitlines()[0]}; give its folder with --base"
        ) from error
    processor.tokenizer.padding_side = "left"
    return model.eval().to(device), processor


@torch.no_grad()
def with_adapters(
    model: Any, adapters: Sequence[str | Path], method: str, options: dict[str, Any], alpha: float | str, scratch: Path
) -> float:
    """Merge adapters into a model in memory, with the mean of their projectors; the alpha that was used.

    The LoRA scaling is part of every delta here, so that the paper's fixed coefficient of 2.0, which is that scaling, is 1.0.
    Results of methods that work on the entries of dW are taken whole, as 26 GB of files where the model has 7 billion weights.

    Args:
        model: LLaVA, changed in place. Where it is, merges are computed.
        adapters: Folders or Hub ids.
        method: Name of the method.
        options: Of the method.
        alpha: On the merged deltas; a number or ``"auto"``.
        scratch: A folder with room for such files.
    """
    scratch.mkdir(parents=True, exist_ok=True)
    merger = DCMergeAdapter(method=method, **{**options, "alpha": alpha})
    device = str(model.device) if model.device.type != "cpu" else None
    with TemporaryDirectory(dir=scratch) as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore", MergeWarning)  # that the projectors are averaged is what is asked for
        # Adapters name the places where their authors had the base model: each may have another one.
        merged = merger.merge(
            adapters, rename=RENAME, extras="average", keep_dense=Path(folder), device=device, allow_different_bases=True,
            progress=False,
        )  # fmt: skip
        for module in merged.modules:
            weight = model.get_submodule(module).weight
            weight.copy_(weight.float() + merged.delta(module).to(weight.device))
        for name, extra in merged.extras.values.items():
            model.get_parameter(name).copy_(extra.value)
        return float(merged.alpha)


@torch.no_grad()
def weights_key(model: Any) -> str:
    """Of a model's numbers: their sums and the sums of their squares, which are quick on a GPU."""
    sums = {}
    for name, parameter in sorted(model.named_parameters()):
        value = parameter.double()
        sums[name] = [value.sum().item(), value.square().sum().item()]
    return content_key(sums)


@torch.inference_mode()
def answered(model: Any, processor: Any, questions: Questions, images: Path, batch: int) -> Iterator[str]:
    """The model's answer to each question, decoded greedily.

    Args:
        model: LLaVA.
        processor: Its processor.
        questions: Of one task.
        images: Folder that the images' paths start from.
        batch: Questions at once; those with an image and those without are kept apart.
    """
    for rows in batches(questions.rows, batch):
        shown = [prompt(row) for row in rows]
        pictures = [
            picture(images / image_path(row), processor, padded=questions.task.padded)
            for row in rows
            if row.get("image")
        ]
        inputs = processor(images=pictures or None, text=shown, padding=True, return_tensors="pt").to(model.device)
        if "pixel_values" in inputs:
            inputs["pixel_values"] = inputs["pixel_values"].to(model.dtype)
        made = model.generate(**inputs, do_sample=False, num_beams=1, max_new_tokens=questions.task.tokens)
        for text in processor.batch_decode(made[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True):
            yield text.strip().removesuffix("</s>").strip()


def batches(rows: Sequence[dict[str, Any]], size: int) -> Iterator[list[dict[str, Any]]]:
    """Neighbours that all have an image or all have none, in the order of the questions."""
    group: list[dict[str, Any]] = []
    for row in rows:
        if group and (len(group) == size or bool(row.get("image")) != bool(group[0].get("image"))):
            yield group
            group = []
        group.append(row)
    if group:
        yield group


def prompt(row: dict[str, Any]) -> str:
    """The whole prompt of a question."""
    return PROMPT.format(question=("<image>\n" if row.get("image") else "") + row["text"])


def picture(file: Path, processor: Any, *, padded: bool) -> Image.Image:
    """The image of a question; ``padded`` makes it a square in the mean colour first, so that nothing is cut off."""
    with Image.open(file) as opened:
        image = opened.convert("RGB")
    if not padded or image.width == image.height:
        return image
    side = max(image.size)
    colour = tuple(int(255 * mean) for mean in processor.image_processor.image_mean)
    square = Image.new("RGB", (side, side), colour)
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square

"""Heads, towers and checkpoints: what answers, and that it answers as PEFT and transformers do."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from reproduce.vision.backbones import BACKBONES, fusion_bench_id, knots_id, load_clip, load_tokenizer
from reproduce.vision.checkpoints import checkpoint_of, kept_adapter, kept_tower
from reproduce.vision.heads import prompted_head, refuse_other_head, stored_head
from reproduce.vision.openclip import PREFIX, from_clip
from reproduce.vision.tasks import TASKS
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModel, CLIPVisionModel

from dc_merge_peft import DCMergeAdapter
from tests.support.clip import SIDE, factors, stored_encoder, tiny_clip, write_adapter

PIXELS = torch.randn(3, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))


def embedded(clip: nn.Module, pixels: torch.Tensor = PIXELS) -> torch.Tensor:
    """Projected image features by transformers' own parts."""
    return clip.visual_projection(clip.vision_model(pixel_values=pixels).pooler_output)  # type: ignore[operator, union-attr]


def test_heads_are_means_of_prompts(clip_folder: Path) -> None:
    """One prompt after the other gives the same as all in padded batches."""
    clip, tokenizer = load_clip(clip_folder), load_tokenizer(clip_folder)
    templates = ("a photo of the {}", "a {} movie review of the road")
    head = prompted_head(clip, tokenizer, ["sad", "forest land"], templates)
    for row, name in zip(head, ["sad", "forest land"], strict=True):
        found = []
        for template in templates:
            tokens = tokenizer(template.format(name), return_tensors="pt")["input_ids"]
            vector = clip.text_projection(clip.text_model(input_ids=tokens).pooler_output)[0]
            found.append(vector / vector.norm())
        mean = torch.stack(found).mean(dim=0)
        torch.testing.assert_close(row, (mean / mean.norm()).detach(), atol=1e-6, rtol=1e-5)


def test_stored_heads(tmp_path: Path) -> None:
    """The authors' files are read up to their scale; other contents are refused."""
    head = torch.randn(2, 12)
    torch.save(100 * head, tmp_path / "head.pt")
    torch.testing.assert_close(stored_head(tmp_path / "head.pt", 2, 12), nn.functional.normalize(head, dim=-1))
    with pytest.raises(SystemExit, match=r"found \(2, 12\): expected a head of 3 x 12"):
        stored_head(tmp_path / "head.pt", 3, 12)
    torch.save(nn.Linear(2, 2), tmp_path / "module.pt")
    with pytest.raises(SystemExit, match="found no plain tensor"):
        stored_head(tmp_path / "module.pt", 2, 2)


def test_stored_heads_in_another_order_are_refused(tmp_path: Path) -> None:
    """A head for other labels, or of another backbone, would only look like a bad merge."""
    head = nn.functional.normalize(torch.randn(20, 12, generator=torch.Generator().manual_seed(0)), dim=-1)
    names, file = [f"class {n}" for n in range(20)], tmp_path / "cars_head.pt"
    refuse_other_head(file, head + 0.01, head, names)
    swapped = head.clone()
    swapped[[3, 4]] = head[[4, 3]]
    refuse_other_head(file, swapped, head, names)  # names that a data set spells otherwise
    with pytest.raises(
        SystemExit,
        match=r"cars_head\.pt: found 20 of 20 classes .* as number 0 to 'class 19' where the data have 'class 0'",
    ):
        refuse_other_head(file, head.roll(1, 0), head, names)
    with pytest.raises(SystemExit, match="expected a head of this backbone"):
        refuse_other_head(file, head @ torch.linalg.qr(torch.randn(12, 12)).Q, head, names)


def test_towers_are_the_same_function(tmp_path: Path) -> None:
    """In open_clip's layout, in memory, saved and loaded by transformers, images have the same embeddings."""
    clip = tiny_clip()
    tower = from_clip(clip)
    torch.testing.assert_close(tower(PIXELS), embedded(clip), atol=1e-5, rtol=1e-4)
    tower.save_pretrained(tmp_path)
    torch.testing.assert_close(AutoModel.from_pretrained(tmp_path).eval()(PIXELS), tower(PIXELS))


def test_kept_adapters(tmp_path: Path) -> None:
    """Pickles and names of transformers 4 become one layout with the same factors; a second look reads nothing."""
    place = write_adapter(tmp_path / "given", 3, prefix="vision_model.", pickle=True)
    kept = kept_adapter(str(place), tmp_path / "kept")
    tensors = load_file(kept / "adapter_model.safetensors")
    for path, (A, B) in factors(3).items():
        assert torch.equal(tensors[f"base_model.model.{path}.lora_A.weight"], A)
        assert torch.equal(tensors[f"base_model.model.{path}.lora_B.weight"], B)
    PeftModel.from_pretrained(tiny_clip().vision_model, kept)
    before = (kept / "adapter_model.safetensors").stat().st_mtime_ns
    assert kept_adapter(str(place), kept).joinpath("adapter_model.safetensors").stat().st_mtime_ns == before
    with pytest.raises(SystemExit, match="found no PEFT adapter"):
        kept_adapter(str(tmp_path), tmp_path / "other")


def test_kept_adapters_of_bases_that_lay_elsewhere_are_merged(tmp_path: Path) -> None:
    """Authors write the path of their own copy of CLIP into a config; the library would take them for different models."""
    kept = []
    for seed in (3, 4):
        place = write_adapter(tmp_path / f"given-{seed}", seed)
        config = json.loads((place / "adapter_config.json").read_text())
        config["base_model_name_or_path"] = f"/home/{seed}/clip-vit-base-patch32"
        (place / "adapter_config.json").write_text(json.dumps(config))
        kept.append(str(kept_adapter(str(place), tmp_path / f"kept-{seed}")))
    DCMergeAdapter(alpha=1.0).merge(kept, progress=False)


def test_kept_towers(tmp_path: Path) -> None:
    """A tower of transformers and an image encoder's file of open_clip give the same tower as the model they are from."""
    base, tuned = from_clip(tiny_clip()), tiny_clip(1)
    vision = CLIPVisionModel(tuned.config.vision_config)
    inner = getattr(vision, "vision_model", vision)
    inner.load_state_dict(getattr(tuned.vision_model, "vision_model", tuned.vision_model).state_dict())
    vision.save_pretrained(tmp_path / "hf")
    kept = kept_tower(str(tmp_path / "hf"), base, tmp_path / "kept-hf")
    pooled = tuned.vision_model(pixel_values=PIXELS).pooler_output
    expected = pooled @ base.proj.weight.T  # without a projection of its own
    torch.testing.assert_close(AutoModel.from_pretrained(kept).eval()(PIXELS), expected, atol=1e-5, rtol=1e-4)

    state = stored_encoder(tuned)
    (tmp_path / "CarsVal").mkdir()
    torch.save(state, tmp_path / "CarsVal/nonlinear_finetuned.pt")
    kept = kept_tower(str(tmp_path / "CarsVal"), base, tmp_path / "kept-file")
    torch.testing.assert_close(AutoModel.from_pretrained(kept).eval()(PIXELS), embedded(tuned), atol=1e-5, rtol=1e-4)

    del state[f"{PREFIX}class_embedding"]
    torch.save(state, tmp_path / "less.pt")
    with pytest.raises(
        SystemExit, match=r"less.pt: 1 tensors do not fit: found nothing for 'class_embedding': expected \(16,\)"
    ):
        kept_tower(str(tmp_path / "less.pt"), base, tmp_path / "no")
    torch.save(nn.Linear(1, 1), tmp_path / "module.pt")
    with pytest.raises(SystemExit, match=r"found no plain state dict .*save its state_dict\(\) first"):
        kept_tower(str(tmp_path / "module.pt"), base, tmp_path / "no")


def test_where_checkpoints_come_from(tmp_path: Path) -> None:
    """What is given first, then a folder's, and only without a folder the Hub's."""
    (tmp_path / "CarsVal").mkdir()
    cars, mnist = TASKS["Cars"], TASKS["MNIST"]
    published = {"MNIST": "org/mnist"}.get
    assert checkpoint_of(cars, tmp_path, {}, published) == str(tmp_path / "CarsVal")
    assert checkpoint_of(cars, tmp_path, {"Cars": "me/cars"}, published) == "me/cars"
    assert checkpoint_of(mnist, tmp_path, {}, published) is None
    assert checkpoint_of(mnist, None, {}, published) == "org/mnist"
    with pytest.raises(SystemExit, match="found no folder"):
        checkpoint_of(cars, tmp_path / "none", {}, published)


def test_ids_of_the_hub() -> None:
    """Those that are known, and none where the published model is of another task."""
    small = BACKBONES["ViT-B/32"]
    assert knots_id(small, "Cars") == "hoffman-lab/KnOTS-ViT-B-32_lora_R16_stanford_cars"
    assert knots_id(small, "PCAM") is None and knots_id(BACKBONES["ViT-B/16"], "Cars") is None
    assert fusion_bench_id(small, "Cars") == "tanganke/clip-vit-base-patch32_stanford-cars"
    assert fusion_bench_id(small, "EMNIST") is None

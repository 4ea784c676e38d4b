"""What PEFT itself makes of a damaged adapter that was merged all the same: the delta of every layer, independent of our reading."""

from __future__ import annotations

import warnings
from pathlib import Path

import torch
from peft import PeftModel

from dc_merge_peft.sources.checkpoint import CheckpointSource
from tests.support.models import bert

REMARK = "which its config does not target, so that PEFT leaves them out"  # as merging says it


def differs_from_peft(adapter: Path, said: str = "") -> str | None:
    """What of an adapter we read in another way than PEFT does; None where it is the same, or where PEFT does not load it.

    Modules that the config does not target are merged on purpose, where that was ``said``.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = PeftModel.from_pretrained(bert(), str(adapter))
    except Exception:  # we may know better, but there is nothing to compare with
        return None
    expected = {
        name.removeprefix("base_model.model."): layer.get_delta_weight("default")
        for name, layer in model.named_modules()
        if "default" in getattr(layer, "lora_A", {})
    }
    source, remarked = CheckpointSource(adapter), REMARK in " ".join(said.split())
    try:
        # A layer of which the file has nothing keeps PEFT's random A and its zero B there: no delta.
        for name in set(expected) | set(source.modules):
            found = source.factors(name).dense().float() if name in source.modules else torch.zeros_like(expected[name])
            wanted = expected.get(name)
            if wanted is None and remarked and name in source.untargeted_modules():
                continue
            if wanted is None:
                return f"PEFT has no LoRA on '{name}'"
            if not torch.allclose(found, wanted.float(), rtol=1e-4, atol=1e-6 * float(wanted.abs().max() + 1e-30)):
                return f"PEFT reads another delta of '{name}'"
    finally:
        source.close()
    return None

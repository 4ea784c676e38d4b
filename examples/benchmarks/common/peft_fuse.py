"""What PEFT's documentation says to do for a full model: ``python peft_fuse.py BASE OUT SHARD ADAPTER...``, a whole process."""

from __future__ import annotations

import sys

from peft import PeftModel
from transformers import AutoModelForCausalLM


def main(base: str, out: str, shard: str, *adapters: str) -> None:
    """Load everything, combine exactly (``cat``), merge and save."""
    names = [f"adapter{index}" for index in range(len(adapters))]
    model = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(base, dtype="auto"), adapters[0], adapter_name=names[0]
    )
    for name, adapter in list(zip(names, adapters, strict=True))[1:]:
        model.load_adapter(adapter, adapter_name=name)
    model.add_weighted_adapter(names, [1.0] * len(names), "all", combination_type="cat")
    model.set_adapter("all")
    model.merge_and_unload().save_pretrained(out, max_shard_size=shard)


if __name__ == "__main__":
    main(*sys.argv[1:])

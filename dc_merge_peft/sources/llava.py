"""What the original LLaVA repository leaves beside an adapter: the weights that were trained without LoRA."""

from __future__ import annotations

from pathlib import Path

from dc_merge_peft.errors import UnsupportedAdapterError

# Full values of everything trainable that is no LoRA, the projector above all. PEFT does not know the file.
EXTRAS_FILE = "non_lora_trainables.bin"


def refuse_extras_file(directory: Path, adapter: str) -> None:
    """Raises:
    UnsupportedAdapterError: the adapter has fully trained weights beside its factors.
    """
    if (directory / EXTRAS_FILE).exists():
        raise UnsupportedAdapterError(
            f"adapter '{adapter}' has {EXTRAS_FILE}, fully trained weights beside LoRA (LLaVA's projector); expected LoRA "
            "factors alone: there is no exact way to merge full values, so take the file out to merge the factors, and "
            "give the model one of the projectors"
        )

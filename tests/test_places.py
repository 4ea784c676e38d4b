"""Module paths as layers and kinds, in several architectures' spellings."""

from __future__ import annotations

from dc_merge_peft.inspection.grouping import places


def test_places() -> None:
    """Layer numbers, and names as short as they stay unique, in several architectures' spellings."""

    def grid(*modules: str) -> list[tuple[str, str]]:
        return [(place.layer, place.kind) for place in places(modules).values()]

    assert grid("model.layers.3.self_attn.q_proj", "model.layers.11.mlp.up_proj", "lm_head") == [
        ("3", "q_proj"), ("11", "up_proj"), ("", "lm_head"),
    ]  # fmt: skip
    assert grid("encoder.layer.0.attention.output.dense", "encoder.layer.0.output.dense", "encoder.layer.0.mlp.dense") == [
        ("0", "attention.output.dense"), ("0", "output.dense"), ("0", "mlp.dense"),
    ]  # fmt: skip
    assert grid("encoder.layers.0.q", "decoder.layers.0.q") == [("encoder.layers 0", "q"), ("decoder.layers 0", "q")]
    assert grid("layers.0.blocks.1.attn", "layers.0.experts.7.w1") == [
        ("blocks 0.1", "attn"), ("experts 0.7", "w1"),
    ]  # fmt: skip
    assert grid("net.0") == [("", "0")]

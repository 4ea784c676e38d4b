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


def test_order_of_layers() -> None:
    """That of their numbers, whatever that of the files or of the adapters is; kinds as they are met, stacks apart, the rest last."""

    def layers(*modules: str) -> list[str]:
        return list(dict.fromkeys(f"{place.layer}/{place.kind}" for place in places(modules).values()))

    files = sorted(f"model.layers.{layer}.{kind}" for layer in (0, 1, 2, 9, 10, 11, 100) for kind in ("v", "q"))
    wanted = [f"{layer}/{kind}" for layer in (0, 1, 2, 9, 10, 11, 100) for kind in ("q", "v")]
    assert layers("head", *files) == [*wanted, "/head"]
    assert layers("h.1.b", "h.2.a", "h.0.a") == ["0/a", "1/b", "2/a"]
    assert layers("text.10.q", "image.0.q", "text.2.q") == ["text 2/q", "text 10/q", "image 0/q"]
    assert layers("net.2.blocks.0.q", "net.10.blocks.1.q", "net.2.blocks.11.q", "net.2.blocks.3.q") == [
        "2.0/q", "2.3/q", "2.11/q", "10.1/q",
    ]  # fmt: skip

"""Reading the metadata of strangers' model cards."""

from __future__ import annotations

from pathlib import Path

import pytest

from dc_merge_peft.sources.cards import read_card


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("---\nlicense: mit\n---\n", "mit"),
        ("\ufeff---\r\nlicense: mit\r\n---\r\ntext", "mit"),
        ("---\nlicense: mit\n---", "mit"),
        ("\n---\nlicense: mit\n---\n", None),
        ("license: mit", None),
        ("---\nlicense: [\n---\n", None),
        ("---\n- license: mit\n---\n", None),
        ("---\nlicense: mit\n", None),
        ("---\n" + "[" * 40_000 + "\n---\n", None),
        ("---\nx: &x {a: 1}\ny: &y {<<: [*x, *x]}\nlicense: mit\n---\n", "mit"),
        ("---\n!!python/object/apply:os.system ['true']\n---\n", None),
        ("---\nlicense: mit\nlicense: mit\n---\n", "mit"),
        ("---\nx: " + "y" * 60_000 + "\nlicense: mit\n---\n", None),
    ],
)
def test_reading_of_cards(tmp_path: Path, content: str, expected: str | None) -> None:
    """What is no block of metadata, or no sensible one, says nothing and breaks nothing."""
    (tmp_path / "README.md").write_bytes(content.encode())
    assert read_card(tmp_path).license == expected


def test_merge_keys_are_not_followed(tmp_path: Path) -> None:
    """A kilobyte of YAML whose merge keys stand for a billion entries."""
    lines = ["a0: &a0 {x: 1}"]
    lines += [f"a{i}: &a{i} {{<<: [{', '.join([f'*a{i - 1}'] * 10)}]}}" for i in range(1, 10)]
    (tmp_path / "README.md").write_text("---\n" + "\n".join(lines) + "\nlicense: mit\n---\n")
    assert read_card(tmp_path).license == "mit"
    (tmp_path / "README.md").write_bytes(b"---\nlicense: \xff\xfe\n---\n")
    assert read_card(tmp_path).license is None

"""Base models of sentence-transformers: what follows the model comes along when adapters are fused into it."""

from __future__ import annotations

import json
from pathlib import Path

from dc_merge_peft import DCMergeAdapter
from tests.support import models
from tests.support.fused import BERT, saved
from tests.support.versions import needs_v5

pytestmark = needs_v5
TA = DCMergeAdapter(method="ta")


def test_what_sentence_transformers_puts_after_a_model_comes_along(tmp_path: Path) -> None:
    """Its pooling and dense layers, in the folders that its list names; without them it would pool otherwise, without a word."""
    base, folders = saved(tmp_path, models.bert(), BERT)
    names = ["", "1_Pooling", "2_Dense", "../elsewhere", "3_Gone", ".git"]  # the list may be a stranger's
    (base / "modules.json").write_text(json.dumps([{"idx": place, "path": name} for place, name in enumerate(names)]))
    kept = (
        "config_sentence_transformers.json",
        "sentence_bert_config.json",
        "1_Pooling/config.json",
        "2_Dense/deep/weights",
    )
    for name in (*kept, "onnx/model.onnx", "../elsewhere/file", ".git/config"):
        (base / name).parent.mkdir(exist_ok=True, parents=True)
        (base / name).write_text(name)
    TA.fuse_to_disk(base, folders, tmp_path / "out")
    TA.fuse(base, folders, tmp_path / "loaded")
    for out in (tmp_path / "out", tmp_path / "loaded"):
        assert all((out / name).read_text() == name for name in kept)
        assert sorted(path.name for path in out.iterdir() if path.is_dir()) == ["1_Pooling", "2_Dense"]
        assert (out / "modules.json").read_bytes() == (base / "modules.json").read_bytes()

    for odd in ("no JSON", "[3]", '{"path": 1}', '[{"path": []}]'):
        (base / "modules.json").write_text(odd)
        TA.fuse_to_disk(base, folders, tmp_path / "out", overwrite=True)
        assert (tmp_path / "out/modules.json").read_text() == odd and not (tmp_path / "out/1_Pooling").exists()

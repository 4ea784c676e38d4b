"""``dc-merge fuse``: every setting of a merge, given by a flag or by a configuration, is the merge's."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from dc_merge_peft import DCMergeAdapter
from tests.support.dora import save_dora
from tests.support.extras import save_extras
from tests.support.models import bert, bert_classifier, factors, write_checkpoint
from tests.support.program import run
from tests.support.refused import listing
from tests.support.versions import needs_v5

pytestmark = [needs_v5, pytest.mark.filterwarnings("ignore::dc_merge_peft.MergeWarning")]
QUERY = "base_model.model.encoder.layer.0.attention.self.query.lora_"


def fused(*arguments: str) -> dict[str, bytes]:
    """What a command that works writes into its output."""
    result = run("fuse", *arguments, "--overwrite")
    assert result.exit_code == 0, result.output
    return listing(Path("out"))


def test_what_is_allowed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another base model, a zero factor and a small memory: each flag is refused by what it allows when left out."""
    monkeypatch.chdir(tmp_path)
    bert().save_pretrained("base")
    for number, name in enumerate(("one", "two", "zero")):
        A, B = factors(16, 16, 2, seed=number)
        tensors = {f"{QUERY}A.weight": A, f"{QUERY}B.weight": B * (name != "zero")}
        write_checkpoint(Path(name), tensors, base_model_name_or_path=f"org/{'other' if name == 'two' else 'base'}")
    for names, flag in ((("one", "two"), "--allow-different-bases"), (("one", "zero"), "--allow-zero")):
        assert run("fuse", "base", *names, "-o", "refused").exit_code == 2
        found = fused("base", *names, "-o", "out", flag)
        assert fused("--config", "out/dc_merge.yaml", "-o", "out") == found
    Path("run.yaml").write_text(
        "adapters: [one, zero]\nbase: base\nallow_zero: true\nmax_memory: 1kB\n", encoding="utf-8"
    )
    small = run("fuse", "--config", "run.yaml", "-o", "small")
    assert small.exit_code == 2 and "max_memory" in small.stderr, small.output


def test_types_are_those_of_the_base_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A dtype in a configuration is refused; one in the record of a fused model or of a merged adapter is that of its merge."""
    monkeypatch.chdir(tmp_path)
    bert().save_pretrained("base")
    for number, name in enumerate(("one", "two")):
        A, B = factors(16, 16, 2, seed=number)
        tensors = {f"{QUERY}A.weight": A, f"{QUERY}B.weight": B}
        write_checkpoint(Path(name), tensors, base_model_name_or_path="base")
    found = fused("base", "one", "two", "-o", "out", "-m", "ta")
    assert run("merge", "one", "two", "-o", "merged", "-m", "ta", "--dtype", "bfloat16").exit_code == 0
    for record in ("out/dc_merge.yaml", "merged/dc_merge.yaml"):
        assert "dtype" in yaml.safe_load(Path(record).read_text())
    assert fused("--config", "out/dc_merge.yaml", "-o", "out") == found
    assert fused("base", "--config", "merged/dc_merge.yaml", "-o", "out").keys() == found.keys()
    Path("run.yaml").write_text("adapters: [one, two]\nbase: base\ndtype: bfloat16\n", encoding="utf-8")
    odd = run("fuse", "--config", "run.yaml", "-o", "other")
    assert odd.exit_code == 2 and "'run.yaml' has dtype: 'bfloat16'" in odd.stderr and "leave it out" in odd.stderr
    assert not Path("other").exists()


def test_ranks_of_dora_and_of_the_merge(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """``--dora-rank`` and ``--svd-rank`` by flags, from the record, and in Python."""
    monkeypatch.chdir(tmp_path)
    paths = [path.name for path in save_dora(tmp_path, bert, {"target_modules": ["query"]})]
    bert().save_pretrained("base")
    found = fused("base", *paths, "-o", "out", "-m", "ta", "--dora-rank", "1", "--svd-rank", "2")
    assert fused("--config", "out/dc_merge.yaml", "-o", "out") == found
    DCMergeAdapter(method="ta").fuse_to_disk("base", paths, "python", dora_rank=1, svd_rank=2)
    assert listing(Path("python")) == found
    record = yaml.safe_load(found["dc_merge.yaml"])
    assert (record["dora_rank"], record["svd_rank"]) == (1, 2)


def test_what_stands_outside_the_factors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """``--extras`` by a flag, from the record, and in Python."""
    monkeypatch.chdir(tmp_path)
    fields = {"r": 2, "target_modules": ["query"], "modules_to_save": ["classifier"]}
    paths = [path.name for path in save_extras(bert_classifier, tmp_path, {"one": fields, "two": fields})]
    bert_classifier().save_pretrained("base")
    assert run("fuse", "base", *paths, "-o", "refused").exit_code == 2
    found = fused("base", *paths, "-o", "out", "-m", "ta", "--extras", "average")
    assert fused("--config", "out/dc_merge.yaml", "-o", "out") == found
    DCMergeAdapter(method="ta").fuse_to_disk("base", paths, "python", extras="average")
    assert listing(Path("python")) == found

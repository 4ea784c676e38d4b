"""What finished modules of DoRA adapters were read at is a part of the merge."""

from __future__ import annotations

from pathlib import Path

import pytest

from dc_merge_peft import DCMergeAdapter, OutputError
from tests.support.dora import MODELS, save_dora
from tests.support.many import stop_after
from tests.support.refused import refused


def test_another_rank_of_dora_is_another_merge(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was read at one rank is not used again at another."""
    build, fields = MODELS["linear"]
    base, folders = tmp_path / "base", save_dora(tmp_path, build, fields)
    build().save_pretrained(base)
    go_on = stop_after(monkeypatch, 1)
    with pytest.raises(KeyboardInterrupt):
        DCMergeAdapter().merge(folders, resume=tmp_path / "work", base=base, dora_rank=3)
    go_on()
    with refused(OutputError, "dora_rank 3 there, 2 here"):
        DCMergeAdapter().merge(folders, resume=tmp_path / "work", base=base, dora_rank=2)

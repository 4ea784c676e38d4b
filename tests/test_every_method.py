"""Every method through every door, on the demo's real adapters: the command line, Python and PEFT give one result. Those that need
data have tests of their own."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
from peft import PeftModel
from typer.testing import CliRunner

from dc_merge_peft import DATA_METHODS, METHODS, DCMergeAdapter
from dc_merge_peft.cli import app
from dc_merge_peft.combination_types import combination_types
from dc_merge_peft.demo.encoder import load_base
from dc_merge_peft.demo.tasks import assets
from tests.support import models

ADAPTERS = [str(assets() / name) for name in ("noun", "speech")]
# WUDI's 300 steps are for those who want its result.
FAST: dict[str, dict[str, Any]] = {"wudi": {"steps": 3}}
RANK = 32


@functools.cache
def encoder() -> Any:
    """MiniLM with two of the demo's adapters loaded by PEFT."""
    model = PeftModel.from_pretrained(load_base()[0], ADAPTERS[0], adapter_name="noun")
    model.load_adapter(ADAPTERS[1], adapter_name="speech")
    return model


@pytest.mark.filterwarnings("ignore::dc_merge_peft.MergeWarning")
@pytest.mark.parametrize(("kind", "name"), [kind for kind in combination_types().items() if kind[1] in METHODS])
def test_every_method(kind: str, name: str, tmp_path: Path) -> None:
    """``dc-merge merge --method X``, ``DCMergeAdapter(method=X)`` and ``combination_type="X"``: the same deltas."""
    options = FAST.get(name, {})
    flags = [word for option, value in options.items() for word in ("-O", f"{option}={value}")]
    out = str(tmp_path / "out")
    command = ["merge", *ADAPTERS, "-o", out, "--method", name, "--svd-rank", str(RANK), "--dtype", "float32", *flags]
    outcome = CliRunner().invoke(app, command, catch_exceptions=False)
    assert outcome.exit_code == 0, outcome.output
    merged = DCMergeAdapter(method=name, **options).merge(ADAPTERS, svd_rank=RANK, dtype="float32", progress=False)
    saved = DCMergeAdapter(method="ta").merge([out], progress=False)
    model = encoder()
    model.add_weighted_adapter(["noun", "speech"], [1.0, 1.0], kind, kind, svd_rank=RANK, dtype="float32", **options)
    live = models.deltas(model, kind)
    model.delete_adapter(kind)
    assert live.keys() == merged.modules.keys() == saved.modules.keys()
    for module in list(live)[::7]:
        assert float(merged.delta(module).norm()) > 1e-3
        assert models.difference(saved.delta(module), merged.delta(module)) < 1e-6
        assert models.difference(live[module], merged.delta(module)) < 1e-6


def test_every_method_is_a_combination_type() -> None:
    """Under its own name, or with ``_dw`` where PEFT has a type of that name."""
    kinds = combination_types()
    assert sorted(kinds.values()) == sorted([*METHODS, *DATA_METHODS])
    assert {kind for kind, name in kinds.items() if kind != name} == {"ties_dw", "dare_ties_dw", "magnitude_prune_dw"}

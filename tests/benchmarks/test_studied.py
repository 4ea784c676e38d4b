"""Studies of rules, of ideas and of alpha: when they are made, and what the page says of them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from everything import command
from everything.command import main
from everything.page import section
from everything.studied import IDEAS, STUDY, alphas_studied, studies

from tests.benchmarks.test_everything import results


def test_studies_are_made_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of benchmarks of adapters, each kind into a file of its own, which the page reads; what is there stays."""
    made: list[list[str]] = []

    def program(arguments: list[str]) -> None:
        made.append(arguments)
        line = {"tasks": 4, "label": "dc", "rule": "Schatten 2", "loss": 0.012, "merges": 1}
        Path(arguments[-1]).write_text(json.dumps([line]), encoding="utf-8")

    for kind in ("study", "study_alpha"):
        monkeypatch.setattr(getattr(command, kind), "main", program)
    arguments = ["study", "--cache", str(tmp_path / "cache"), "--docs", str(tmp_path), "--only", "text8", "text8_fft"]
    assert main(arguments) == 0 and main(arguments) == 0
    assert [Path(call[-1]).name for call in made] == ["study.json", "ideas.json", "alpha.json"]
    assert ["--ideas" in call for call in made] == [False, True, False]
    assert all(call[:3] == ["text8", "--cache", str(tmp_path / "cache/text8")] for call in made)
    table = alphas_studied({name: tmp_path / name for name in ("text8", "text8-fft")})
    assert "| alpha by | text8 | text8, `rzf` |" in table and "| Schatten 2 | 1.2 |  |" in table
    text = section([results("text8", 0.05)], {}, (), table)
    assert text.index("## Alpha without data") < text.index(table) < text.index("## The defaults")
    assert alphas_studied({"text8": tmp_path / "nowhere"}) == ""


def test_ideas_on_the_page(tmp_path: Path) -> None:
    """After the families, with how often one is ahead, and by how much the best is; nothing where none was tried."""

    def write(file: str, gains: dict[str, tuple[float, float]]) -> None:
        lines = [
            {
                "tasks": 4,
                "label": label,
                "alpha_by": by,
                "alpha": [1.0, 1.4],
                "normalized": {"value": 0.9 + gain, "low": 0.8, "high": 1.0},
                "above_first": {"value": gain, "low": gain - 0.01, "high": gain + 0.01},
            }
            for label, values in gains.items()
            for by, gain in zip(("validation", "auto"), values, strict=True)
        ]
        (tmp_path / file).write_text(json.dumps(lines), encoding="utf-8")

    folders = {"text8": tmp_path, "vision": tmp_path / "nowhere"}
    assert studies(folders) == []
    write(STUDY, {"dc": (0.0, 0.0), "load 0.375": (0.01, -0.02)})
    families = studies(folders)
    assert "is ahead of `dc` on 1 of 2 rows." in families[0] and len(families) == 3
    assert families[0].endswith("Merges behind a number, by the number of tasks: text8 2 with 4.")
    write(IDEAS, {"rzf": (0.0, 0.0), "energy": (0.02, 0.004), "agreement": (-0.03, -0.005)})
    text, summed, each = studies(folders)[-3:]
    assert studies(folders)[:3] == families and studies(folders)[3].startswith("### Ideas around `rzf`")
    assert (
        "Of 4 differences from `rzf` 1 are positive by more than their interval, where chance alone gives 0, and 1 are"
        in text
    )
    assert text.endswith("The best of all on the mean is energy, which is 1.2 points ahead, and +0.4 at least.")
    assert "| agreement | -3.0 | -3.0 | 5.0 |" in summed and "#### text8" in each
    write(IDEAS, {"rzf": (0.0, 0.0), "agreement": (-0.03, -0.005)})
    assert studies(folders)[-3].endswith("The best of all on the mean is rzf.")

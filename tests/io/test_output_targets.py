"""The written target_modules make PEFT wrap exactly the merged modules, whatever the sources said."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from peft import PeftModel

from dc_merge_peft import DCMergeAdapter, MergedAdapter, OutputError
from dc_merge_peft.outputs import targets
from dc_merge_peft.sources import CheckpointSource
from dc_merge_peft.sources.targeting import Targets
from tests.support import models
from tests.support.models import difference, factors, write_checkpoint
from tests.support.refused import refused

QUERY, VALUE = "attention.self.query", "attention.self.value"
LAYERS = ("encoder.layer.0.", "encoder.layer.1.")

BERT: dict[str, tuple[list[dict[str, Any]], set[str]]] = {
    "equal lists": (
        [{"target_modules": ["query", "value"]}, {"target_modules": ["value", "query"]}],
        {layer + module for layer in LAYERS for module in (QUERY, VALUE)},
    ),
    "different lists": (
        [{"target_modules": ["query"]}, {"target_modules": ["query", "value"]}],
        {layer + module for layer in LAYERS for module in (QUERY, VALUE)},
    ),
    "overlapping lists": (
        [{"target_modules": ["query", "key"]}, {"target_modules": ["query", "value"]}],
        {layer + f"attention.self.{name}" for layer in LAYERS for name in ("query", "key", "value")},
    ),
    "one layer only": (
        [{"target_modules": ["query"], "layers_to_transform": [1]}] * 2,
        {LAYERS[1] + QUERY},
    ),
    "one task in one layer": (
        [{"target_modules": ["query"]}, {"target_modules": ["query", "value"], "layers_to_transform": 1}],
        {LAYERS[0] + QUERY, LAYERS[1] + QUERY, LAYERS[1] + VALUE},
    ),
    "layers with a pattern": (
        [{"target_modules": ["query"], "layers_to_transform": [0], "layers_pattern": "layer"}] * 2,
        {LAYERS[0] + QUERY},
    ),
    "exclusions": (
        [{"target_modules": ["dense"], "exclude_modules": ["pooler.dense", "intermediate.dense"]}] * 2,
        {layer + part for layer in LAYERS for part in ("attention.output.dense", "output.dense")},
    ),
    "different exclusions": (
        [
            {"target_modules": ["dense"], "exclude_modules": ["pooler.dense"]},
            {"target_modules": ["dense"], "exclude_modules": r".*intermediate\.dense"},
        ],
        {layer + part + ".dense" for layer in LAYERS for part in ("attention.output", "output", "intermediate")}
        | {"pooler.dense"},
    ),
    "a regex": (
        [{"target_modules": r".*layer\.[01]\.attention\.self\.(query|key)"}, {"target_modules": ["query"]}],
        {layer + f"attention.self.{name}" for layer in LAYERS for name in ("query", "key")},
    ),
    "a regex and a list": (
        [{"target_modules": r".*layer\.0\..*query"}, {"target_modules": ["query"], "layers_to_transform": [0, 1]}],
        {layer + QUERY for layer in LAYERS},
    ),
    "all-linear": (
        [{"target_modules": "all-linear"}, {"target_modules": ["query"]}],
        {layer + f"attention.self.{name}" for layer in LAYERS for name in ("query", "key", "value")}
        | {layer + f"{part}.dense" for layer in LAYERS for part in ("attention.output", "intermediate", "output")}
        | {"pooler.dense"},
    ),
    "all-linear twice": (
        [{"target_modules": "all-linear"}] * 2,
        {layer + f"attention.self.{name}" for layer in LAYERS for name in ("query", "key", "value")}
        | {layer + f"{part}.dense" for layer in LAYERS for part in ("attention.output", "intermediate", "output")}
        | {"pooler.dense"},
    ),
}
PATCHES: dict[str, tuple[list[dict[str, Any]], set[str]]] = {
    "fc also hits blk.fc": ([{"target_modules": ["fc"]}] * 2, {"fc", "blk.fc"}),
    "only the outer fc": ([{"target_modules": "fc"}] * 2, {"fc"}),
    "only the inner fc": ([{"target_modules": ["blk.fc"]}, {"target_modules": ["blk.fc", "conv"]}], {"blk.fc", "conv"}),
    "outer fc and conv": ([{"target_modules": "fc|conv"}, {"target_modules": "fc|mix"}], {"fc", "conv", "mix"}),
    "outer and inner by hand": ([{"target_modules": "fc"}, {"target_modules": "fc|blk.fc"}], {"fc", "blk.fc"}),
}


def merge_and_load(folder: Path, name: str, fields: list[dict[str, Any]]) -> tuple[MergedAdapter, PeftModel]:
    """Adapters of these configs, merged, written, and loaded on a fresh base."""
    build = getattr(models, name)
    adapters = {f"task{index}": {"r": 2, **own} for index, own in enumerate(fields)}
    folders = models.save_adapters(models.with_lora(build(), adapters), folder / "in")
    merged = DCMergeAdapter(method="ta").merge(folders)
    merged.save_pretrained(folder / "out")
    return merged, PeftModel.from_pretrained(build(), str(folder / "out"))


@pytest.mark.parametrize(
    ("name", "fields", "expected"),
    [("bert", *case) for case in BERT.values()] + [("patches", *case) for case in PATCHES.values()],
    ids=[*BERT, *PATCHES],
)
def test_exactly_the_merged_modules(
    tmp_path: Path, name: str, fields: list[dict[str, Any]], expected: set[str]
) -> None:
    """PEFT wraps the merged modules and no others, with their deltas."""
    merged, model = merge_and_load(tmp_path, name, fields)
    found = models.deltas(model, "default")
    assert set(found) == set(merged.modules) == expected
    for module, delta in found.items():
        assert difference(delta, merged.delta(module)) < 1e-6


def test_the_sources_own_list_is_kept(tmp_path: Path) -> None:
    """Where the sources agree, the written list is theirs: readable, and right for models of the same family."""
    merge_and_load(tmp_path, "bert", [{"target_modules": ["query", "value"]}] * 2)
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["target_modules"] == ["query", "value"] and "exclude_modules" not in config


def test_sources_of_one_name(tmp_path: Path) -> None:
    """Sources opened by hand may have one name, as final checkpoints have; no module may get lost for that."""
    folders = []
    for run, names in (("run1", ["fc"]), ("run2", ["fc", "blk.out"])):
        tensors = {}
        for module in names:
            A, B = factors(12, 12, 2, seed=len(module) + len(folders))
            tensors |= {f"{module}.lora_A.weight": A, f"{module}.lora_B.weight": B}
        folders.append(write_checkpoint(tmp_path / run / "final", tensors, target_modules="|".join(names)))
    merged = DCMergeAdapter(method="ta").merge([CheckpointSource(folder) for folder in folders])
    merged.save_pretrained(tmp_path / "out")
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert re.fullmatch(config["target_modules"], "fc") and re.fullmatch(config["target_modules"], "blk.out")
    assert len({info.name for info in merged.adapters}) == 2


@pytest.mark.parametrize("name", ["x.lora_B.q", "a+b.q", "h.10.q", "h.1.0.q", "layer(1).q", "q-1", "Ä.q"])
def test_unusual_names_match_themselves_alone(tmp_path: Path, name: str) -> None:
    """A full path becomes a regex that matches it and none of its neighbours."""
    folders = []
    for seed, names in enumerate([(name, "z.1.k"), (name, "z.2.k")]):
        tensors = {}
        for module in names:
            A, B = factors(6, 5, 2, seed)
            tensors |= {f"{module}.lora_A.weight": A, f"{module}.lora_B.weight": B}
        folders.append(write_checkpoint(tmp_path / f"task{seed}", tensors, target_modules=".*", exclude_modules="zzz"))
    DCMergeAdapter(method="ta").merge(folders).save_pretrained(tmp_path / "out")
    pattern = json.loads((tmp_path / "out" / "adapter_config.json").read_text())["target_modules"]
    paths = {name, "z.1.k", "z.2.k"}
    neighbours = {f"y.{name}", f"{name}.y", f"{name}1", "z.12.k", "z.1.q", "z1.k", name.replace(".", "x"), name[1:]}
    assert {path for path in paths | neighbours if re.fullmatch(pattern, path)} == paths


def test_patterns_that_are_too_long_to_be_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Are not written: without the base model that is refused, with it there are the full paths, and of regexes those in one."""
    monkeypatch.setattr(targets, "LONGEST_PATTERN", 20)
    tensors = {
        f"base_model.model.{module}.q.lora_{key}.weight": factor
        for module in ("one", "another", "third")
        for key, factor in zip("AB", factors(6, 5, 2), strict=True)
    }
    paths = []
    for name, left_out in (("a", "one"), ("b", "third")):
        own = {key: factor for key, factor in tensors.items() if left_out not in key}
        paths.append(write_checkpoint(tmp_path / name, own, exclude_modules=[f"{left_out}.q"]))
    merged = DCMergeAdapter(method="ta").merge(paths)
    with refused(OutputError, "a pattern of their paths has", "expected at most 50000", "without exclusions or layers"):
        merged.save_pretrained(tmp_path / "out")
    modules = list(merged.modules)
    specs = [(info.targets, False) for info in merged.adapters]
    names = Targets(target_modules=frozenset(modules))
    assert targets.choose_targets(modules, specs, lambda spec: modules if spec == names else []) == names
    regexes = [(Targets(target_modules=rf"model\.layers\.{index}\.q"), False) for index in range(2)]
    both = ["model.layers.0.q", "model.layers.1.q"]
    monkeypatch.setattr(targets, "LONGEST_PATTERN", 40)
    assert targets.choose_targets(both, regexes) == targets.full_paths(both)

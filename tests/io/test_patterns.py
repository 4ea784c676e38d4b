"""Regular expressions of strangers: the answers are those of ``re``, and none takes for ever."""

from __future__ import annotations

import json
import random
import re
import time
from pathlib import Path
from typing import Any

import pytest

from dc_merge_peft import DCMergeAdapter, SourceError
from dc_merge_peft.sources import patterns, scaling, targeting
from dc_merge_peft.sources.scaling import Patterns
from dc_merge_peft.sources.targeting import Targets
from tests.support.models import factors, write_checkpoint
from tests.support.refused import refused

NAMES = [
    "", "q", "a", "aab", "model.layers.0.self_attn.q_proj", "encoder.layer.11.attention.self.query", "x_y.fc1", "a\nb", "q\n",
    "Ünï.q", "aaaa.bbbb", "1.22.333", "enc.q!",
]  # fmt: skip
ORDINARY = [
    "q", ".*", r".*\.(q|v)", r"layers\.\d+\..*_proj", r"^(?!.*enc).*\.(q_proj|v_proj)$", r"(?:.*?(?:self|attn).*?(?:q_proj|query).*?)",
    r"[^.]+\.\w+", r"a{1,3}b?", r"(a|b)*", r"(a*)*b", r"([a-z_.0-9]+)+", r"\bmodel\b.*", r"(?<=\.)q", r".*(?<!\d)\.q",
    r"(?s).*", r"\S+\s?\S*", r"[\w.]*[^\W]", r"(?:(?:a?){2}b?)*", r".*\Bb.*", r"\Aq\Z", r"(?x) q  # text", r"[a-cx-z]*", r"(?:)*q", "",
    r"^model\.layers\.0\.self_attn.q_proj$", r"x_y\.fc1", "a.b", "q|q_proj", r"aab|self\.query",
]  # fmt: skip


@pytest.mark.parametrize("pattern", ORDINARY)
def test_the_same_answers(pattern: str) -> None:
    """Whole or as an ending, those of ``re``."""
    for name in NAMES:
        assert patterns.fits(pattern, name) is (re.fullmatch(pattern, name) is not None), name
        if not pattern.startswith("(?x)") and not pattern.startswith("(?s)"):
            expected = re.match(rf"(.*\.)?({pattern})$", name) is not None
            assert patterns.fits_ending(pattern, name) is expected, name


def test_the_same_answers_for_any_pattern() -> None:
    """Patterns put together by chance, on names of the same three characters."""
    chance = random.Random(0)

    def pattern(depth: int) -> str:
        kind = chance.choice(["atom"] * 3 + ["join", "or", "repeat", "group", "look"]) if depth else "atom"
        if kind == "atom":
            return chance.choice(["a", "b", ".", "[^a]", r"\.", r"\b", "^", "$", r"\w"])
        inner = [pattern(depth - 1) for _ in range(2)]
        if kind == "join":
            return "".join(inner)
        if kind == "or":
            return f"(?:{inner[0]}|{inner[1]})"
        if kind == "repeat":
            return f"(?:{inner[0]}){chance.choice(['*', '+', '?', '{0,2}', '{2}', '*?', '{1,}'])}"
        return f"({inner[0]})" if kind == "group" else f"(?{chance.choice('=!')}{inner[0]}){inner[1]}"

    found = []
    for _ in range(3000):
        made = pattern(4)
        name = "".join(chance.choice("ab.") for _ in range(chance.randrange(7)))
        found.append(patterns.fits(made, name))
        assert found[-1] is (re.fullmatch(made, name) is not None), (made, name)
    assert 300 < sum(found) < 2700


EVIL = [
    r"(([a-z_.0-9]+)+)[!?]", r".*.*.*.*.*.*.*.*.*.*[!?]", r"(\w|\w\w|.)*[!?]", r"((a|b|c|.)*)*[!?]", r"(?:.*?){50}[!?]",
    r"(.{0,300}){0,300}[!?]", r"(((.*)*)*)*[?!]", r"(?:a{0,30000}){30000}", r"(?:(?:(?:.?){999}){999}){999}[!?]",
    r"(?=(.+)+[!?]).*", r"((?:.+?)+?){2,}[!?]", r"(?i)(q+)+!",
]  # fmt: skip
REFERENCES = [r"(.+)+\1[!?]", r"(a*)*\1b", r"(?i:(.+)+)[!?]"]


@pytest.mark.filterwarnings("ignore:.*config does not target")
@pytest.mark.parametrize("pattern", [*EVIL, *REFERENCES])
@pytest.mark.parametrize(
    "field", ["target_modules", "exclude_modules", "rank_pattern", "alpha_pattern", "layers_pattern"]
)
def test_evil_patterns(tmp_path: Path, pattern: str, field: str) -> None:
    """Wherever a config has patterns: the adapter is merged or refused in a moment."""
    value: Any = {pattern: 2} if field.endswith("_pattern") and field != "layers_pattern" else pattern
    fields = {
        field: value,
        "layers_to_transform": [0],
        **({"target_modules": ["q"]} if field == "layers_pattern" else {}),
    }
    folders = [write_checkpoint(tmp_path / name, **fields) for name in ("one", "two")]
    start = time.process_time()
    try:
        DCMergeAdapter(method="ta").merge(folders).save_pretrained(tmp_path / "out")
        said = "takes too long"
    except SourceError as error:
        said = str(error)
    assert "takes too long" in said or "no regular expression" in said or "has groups" in said
    assert time.process_time() - start < 5


DISPUTED = [r"q{layer}", r"[[a]]q", r"[a&&b]q", r"(?:q){e<=1}", r"[[:alpha:]]+", r"(?:(?:q?){999}){999}"]


@pytest.mark.parametrize("pattern", DISPUTED)
def test_patterns_of_two_readings(tmp_path: Path, pattern: str) -> None:
    """What two libraries read in two ways, or what would be unrolled a million times, is refused."""
    with refused(SourceError, "'one'", "in target_modules", "no regular expression"):
        DCMergeAdapter(method="ta").merge([write_checkpoint(tmp_path / "one", target_modules=pattern)])


BROKEN = [
    "(" * 5000,
    "(",
    "a{2,1}",
    "*",
    "[",
    "(?P<x>a)(?P<x>b)",
    "a(?i)b",
    "\\",
    "(?P=x)",
    "x{99999999999}",
    f"x{{{'9' * 5000}}}",
]


@pytest.mark.parametrize("pattern", BROKEN)
@pytest.mark.parametrize("field", ["target_modules", "rank_pattern"])
def test_broken_patterns(tmp_path: Path, pattern: str, field: str) -> None:
    """What is no regular expression is refused with the field's name."""
    value = {pattern: 2} if field == "rank_pattern" else pattern
    folder = write_checkpoint(tmp_path / "one", **{field: value})
    with refused(
        SourceError, "'one'", f"in {field}, which is no regular expression", "correct its adapter_config.json"
    ):
        DCMergeAdapter(method="ta").merge([folder])


def test_endless_patterns(tmp_path: Path) -> None:
    """Length is limited, and many patterns are no trouble."""
    with refused(SourceError, "a pattern of 300000 characters in rank_pattern", "at most 50000"):
        DCMergeAdapter(method="ta").merge([write_checkpoint(tmp_path / "one", rank_pattern={"q" * 300_000: 2})])
    with refused(SourceError, "a name of more than 50000 characters in exclude_modules", "expected names of modules"):
        DCMergeAdapter(method="ta").merge([write_checkpoint(tmp_path / "one", exclude_modules=["q" * 300_000])])
    many = {f"layers.{index}.q_proj": 2 for index in range(2000)}
    start = time.process_time()
    targets, excluded = ["q", *(f"a{index}" for index in range(20_000))], [f"b{index}" for index in range(20_000)]
    fields = {"alpha_pattern": many, "target_modules": targets, "exclude_modules": excluded}
    with pytest.warns(UserWarning, match="no factors"):
        DCMergeAdapter(method="ta").merge([write_checkpoint(tmp_path / "two", **fields)])
    assert time.process_time() - start < 10


LAYERS = [
    "model.layers.{}.self_attn.q_proj",
    "a_rather_long_name_of_a_model.and_of_its_decoder_part.layers.{}.self_attention.query_key_value",
]


@pytest.mark.parametrize("pattern", [None, "layers", ["layers", "h"], r"lay.*", r"\w+s"])
@pytest.mark.parametrize("name", LAYERS)
def test_layers_to_transform(tmp_path: Path, pattern: Any, name: str) -> None:
    """PEFT's own rule for numbered layers, with and without a pattern, on paths of any length: those listed are merged, and the
    merged adapter lists them again."""
    keys = [f"base_model.model.{name.format(index)}" for index in (0, 11)]
    tensors = {
        f"{key}.lora_{letter}.weight": value
        for key in keys
        for letter, value in zip("AB", factors(6, 5, 2), strict=True)
    }
    for adapter in ("one", "two"):
        write_checkpoint(tmp_path / adapter, tensors, layers_to_transform=[0, 11], layers_pattern=pattern)
    merged = DCMergeAdapter(method="ta").merge([tmp_path / "one", tmp_path / "two"])
    config = json.loads((merged.save_pretrained(tmp_path / "out") / "adapter_config.json").read_text())
    assert len(merged.modules) == 2 and config["layers_to_transform"] == [0, 11]


def test_layers_that_are_not_listed() -> None:
    """The number decides, and a path without one is no layer."""
    targets = Targets(frozenset({"q_proj"}), layers_to_transform=(3,), layers_pattern=("layers",))
    assert [targets.matches(f"model.layers.{index}.q_proj") for index in (3, 33, 0)] == [True, False, False]
    assert not targets.matches("model.q_proj")


def test_groups_in_a_layers_pattern(tmp_path: Path) -> None:
    """PEFT would take the group for the layer's number, and fail."""
    targets = Targets(frozenset({"q_proj"}), layers_to_transform=(3,), layers_pattern=("(layers)",))
    with refused(SourceError, "'(layers)'", "has groups"):
        targets.matches("model.layers.3.q_proj")


def test_endless_numbers_of_layers(tmp_path: Path) -> None:
    """Python makes no number of so many digits."""
    tensors = {
        f"model.layers.{'9' * 5000}.q.lora_{side}.weight": value
        for side, value in zip("AB", factors(6, 5, 2), strict=True)
    }
    folder = write_checkpoint(tmp_path / "one", tensors, layers_to_transform=[1])
    with refused(SourceError, "'model.layers.999", "a layer's number of 5000 digits", "the checkpoint is damaged"):
        DCMergeAdapter(method="ta").merge([folder])


def test_the_first_of_many_patterns() -> None:
    """Of names, escaped or with dots that stand for any letter, beside other patterns: the one that trying all finds first."""
    chance = random.Random(0)
    for _ in range(3000):
        name = "".join(chance.choice("ab.1_-") for _ in range(7)) + chance.choice(["", "", "", "\n"])
        ends = [name[chance.randrange(len(name)) :] for _ in range(3)]
        loose = [re.sub("[b1]", ".", end) for end in ends]
        given = [*ends, *map(re.escape, ends), *loose, "^a", "b$", r"[ab]+", "a|b", ""]
        tried = dict.fromkeys(chance.sample([each for each in given if "--" not in each and "\n" not in each], 4))
        expected = next((each for each in tried if re.match(rf"(.*\.)?({each})$", name)), None)
        assert Patterns(tried).matching(name) == expected, (name, tried)


def test_names_are_not_tried_one_by_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A rank, an alpha and a target for each of many modules: what grew with the square of their number."""
    for place, rule in ((scaling, "fits_ending"), (targeting, "ends_in")):
        monkeypatch.setattr(place, rule, lambda *_: pytest.fail("a name was tried"))
    names = [f"layers.{number}.q-proj" for number in range(40)]
    pairs = {name: factors(4, 3, 1 + number % 2) for number, name in enumerate(names)}
    made = {
        f"base_model.model.{name}.lora_{side}.weight": pairs[name]["AB".index(side)] for name in names for side in "AB"
    }
    ranks = {re.escape(name): len(A) for name, (A, _) in pairs.items()}
    write_checkpoint(tmp_path / "a", made, r=7, rank_pattern=ranks, alpha_pattern=ranks, target_modules=names)
    DCMergeAdapter(method="ta").merge([tmp_path / "a"])

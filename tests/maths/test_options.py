"""Options: loose values from keyword arguments, YAML and the command line become a checked, frozen config."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import pytest

from dc_merge_peft.errors import MergeError, OptionError
from dc_merge_peft.methods import METHODS, DCMergeConfig, MethodConfig, method_for, method_named
from dc_merge_peft.methods.options import build_config, check_config, coerce, describe_type, option


def refusal(method: str = "dc", /, **options: Any) -> str:
    """The text of the error."""
    with pytest.raises(OptionError) as raised:
        method_named(method, options)
    return str(raised.value)


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("rho", "3", 3.0),
        ("rho", "2.5", 2.5),
        ("rho", "1e1", 10.0),
        ("alpha", "auto", "auto"),
        ("alpha", "-0.5", -0.5),
        ("density", "0.001", 0.001),
        ("rank", "8", 8),
        ("rank", "none", None),
        ("rank", "Null", None),
        ("mask", "false", False),
        ("mask", "Yes", True),
        ("mask", "off", False),
        ("mask_size", "4", 4),
        ("smoothing", "average", "average"),
        ("aggregation", "ta", "ta"),
    ],
)
def test_strings_are_parsed(name: str, text: str, value: object) -> None:
    """What the command line hands over: the value, of the right type."""
    found = getattr(build_config(DCMergeConfig, {name: text}, method="dc"), name)
    assert found == value and type(found) is type(value)


def test_numbers_take_the_type_of_the_option() -> None:
    """A whole number where a float is meant becomes one; a float is never taken for a whole number."""
    config = DCMergeConfig(rho=3, alpha=1, tau=0, density=1)
    assert [type(value) for value in (config.rho, config.alpha, config.tau, config.density)] == [float] * 4
    assert "option 'rank' is 4.0: expected a whole number or none" in refusal(rank=4.0)
    assert "option 'rank' is '4.0': expected a whole number or none" in refusal(rank="4.0")


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"rho": "much"}, "option 'rho' is 'much': expected a number"),
        ({"rho": None}, "option 'rho' is None: expected a number"),
        ({"rho": [5]}, "option 'rho' is [5]: expected a number"),
        ({"rho": "nan"}, "option 'rho' is 'nan': expected a number"),
        ({"rho": float("inf")}, "option 'rho' is inf: expected a number"),
        ({"alpha": "automatic"}, "option 'alpha' is 'automatic': expected a number or 'auto'"),
        ({"rank": "all"}, "option 'rank' is 'all': expected a whole number or none"),
        ({"mask": "maybe"}, "option 'mask' is 'maybe': expected true or false"),
        ({"mask": 1}, "option 'mask' is 1: expected true or false"),
        ({"smoothing": "linaer"}, "option 'smoothing' is 'linaer': expected 'linear', 'average' or 'none'"),
        ({"smoothing": None}, "option 'smoothing' is None: expected 'linear', 'average' or 'none'"),
        ({"basis": "optimised"}, "option 'basis' is 'optimised': expected 'whitening' or 'optimized'"),
    ],
)
def test_wrong_types(options: dict[str, Any], text: str) -> None:
    """Found and expected, in words."""
    assert text in refusal(**options)


@pytest.mark.parametrize("name", ["alpha", "rho", "tau", "rank", "density", "mask_size"])
@pytest.mark.parametrize("value", [True, False])
def test_booleans_are_no_numbers(name: str, value: bool) -> None:
    """``rank=True`` is a mistake, not rank 1."""
    assert f"option '{name}' is {value}: expected" in refusal(**{name: value})


@pytest.mark.parametrize("options", [{"alpha": 10**400}, {"rank": "9" * 400}], ids=["alpha", "rank"])
def test_numbers_beyond_float64(options: dict[str, Any]) -> None:
    """A number that no float holds is a wrong value or a very large one, never another kind of error."""
    with pytest.raises(OptionError):
        method_named("dc", {**options, "rho": "wrong"})


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"rho": 0.5}, "option 'rho' is 0.5: expected at least 1"),
        ({"rank": 0}, "option 'rank' is 0: expected at least 1"),
        ({"mask_size": "-3"}, "option 'mask_size' is -3: expected at least 1"),
        ({"tau": 1.01}, "option 'tau' is 1.01: expected from 0 to 1"),
        ({"tau": "-0.1"}, "option 'tau' is -0.1: expected from 0 to 1"),
        ({"density": 2}, "option 'density' is 2.0: expected from 0 to 1"),
    ],
)
def test_ranges(options: dict[str, Any], text: str) -> None:
    """The bounds are named, through the method and through the config class itself."""
    assert refusal(**options) == text
    if not isinstance(next(iter(options.values())), str):
        with pytest.raises(OptionError, match="expected"):
            DCMergeConfig(**options)


@pytest.mark.parametrize(
    ("method", "name", "values", "text"),
    [
        ("wudi", "steps", (-1,), "at least 0"),
        ("wudi", "lr", (-1e-5, 1.5), "from 0 to 1"),
        ("wudi_closed", "ridge", (-0.1,), "at least 0"),
        ("robust", "keep", (-0.1, 1.1), "from 0 to 1"),
        ("robust", "attenuation", (-0.1, 1.1), "from 0 to 1"),
        ("iso_c", "rank", (0,), "at least 1"),
        ("iso_cts", "rank", (0,), "at least 1"),
        ("iso_cts", "common_fraction", (-0.1, 1.1), "from 0 to 1"),
    ],
)
def test_ranges_of_other_methods(method: str, name: str, values: tuple[float, ...], text: str) -> None:
    """Steps that would go nowhere or to infinity, and shares that are none, are refused before anything is read."""
    for value in values:
        assert refusal(method, **{name: value}) == f"option '{name}' is {value}: expected {text}"


@pytest.mark.parametrize("options", [{"rho": 1}, {"tau": 0}, {"tau": 1}, {"density": 0}, {"density": 1}, {"rank": 1}])
def test_ranges_are_closed(options: dict[str, Any]) -> None:
    """The bounds themselves are allowed."""
    assert method_named("dc", options).config.to_dict().items() >= options.items()


def test_unknown_options() -> None:
    """The closest name first, then all of them."""
    text = refusal(densty=0.1)
    assert text.startswith("unknown option of method 'dc' 'densty': did you mean 'density'? valid names are: alpha, ")
    assert all(field.name in text for field in dataclasses.fields(DCMergeConfig))
    valid = "alpha, smoothing, rho, tau, rank, basis, basis_steps, basis_lr, mask, mask_size, cover"
    assert refusal("ta", seed=5) == f"unknown option of method 'ta' 'seed': valid names are: {valid}"
    with pytest.raises(TypeError):
        DCMergeConfig(densty=0.1)  # type: ignore[call-arg]


@pytest.mark.parametrize("name", ["svd_rank", "svd-rank", "dtype", "weights"])
def test_settings_of_the_merge(name: str) -> None:
    """They are no options, and the closest option is another thing: 'rank' cuts every task, not the result."""
    flag = name.replace("_", "-")
    assert refusal("dc", **{name: "8"}) == (
        f"'{name}' is a setting of the merge, no option of method 'dc': expected it beside the method, as in "
        f"merge(..., {name.replace('-', '_')}=...) or --{flag}"
    )


def test_unknown_methods() -> None:
    """The same for the method's own name, and for a config that belongs to none."""
    with pytest.raises(
        OptionError, match="unknown method 'avrage': did you mean 'average'\\? valid names are: dc, ta, "
    ):
        method_named("avrage")
    with pytest.raises(OptionError, match="unknown method 'zzz': valid names are: dc"):
        method_named("zzz")
    with pytest.raises(OptionError, match="found a MethodConfig where a method's config was expected: one of DCMerge"):
        method_for(MethodConfig())


def test_option_errors_are_value_errors() -> None:
    """Callers may catch the library's base class or the standard one."""
    assert issubclass(OptionError, ValueError) and issubclass(OptionError, MergeError)


def test_configs_are_frozen_plain_values() -> None:
    """A config can't change under a running merge, and goes to YAML as it is."""
    config = DCMergeConfig(rank=4)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.rank = 5  # type: ignore[misc]
    with pytest.raises(TypeError):
        DCMergeConfig("auto")  # type: ignore[misc]
    again = build_config(DCMergeConfig, config.to_dict(), method="dc")
    assert again == config and hash(again) == hash(config)
    assert (
        build_config(DCMergeConfig, {name: str(value) for name, value in config.to_dict().items()}, method="dc")
        == config
    )


@pytest.mark.parametrize("name", METHODS)
def test_every_option_is_documented_and_has_a_valid_default(name: str) -> None:
    """Help text for each, defaults that pass their own checks, and the config finds its method again."""
    method = method_named(name)
    assert all(field.metadata["help"] for field in dataclasses.fields(method.config))
    check_config(method.config)
    assert type(method_for(method.config)) is METHODS[name] and method_for(method.config).config is method.config


def test_defaults() -> None:
    """The defaults that the documentation promises."""
    assert DCMergeConfig().to_dict() == {
        "alpha": "auto",
        "smoothing": "linear",
        "rho": 5.0,
        "tau": 0.0,
        "rank": None,
        "aggregation": "ties",
        "density": "auto",
        "basis": "whitening",
        "basis_steps": 500,
        "basis_lr": 0.5,
        "mask": True,
        "mask_size": None,
    }
    plain = {"alpha": 1.0, "smoothing": "none", "rho": 5.0, "tau": 0.0, "rank": None, "basis": "whitening"}
    plain |= {"basis_steps": 500, "basis_lr": 0.5, "mask": True, "mask_size": None, "cover": False}
    assert method_named("ta").config.to_dict() == method_named("average").config.to_dict() == plain


@pytest.mark.parametrize(
    ("expected", "words"),
    [
        (float, "a number"),
        (int | None, "a whole number or none"),
        (float | Literal["auto"], "a number or 'auto'"),
        (Literal["a", "b", "c"], "'a', 'b' or 'c'"),
        (bool, "true or false"),
        (str, "text"),
    ],
)
def test_types_in_words(expected: Any, words: str) -> None:
    """How errors and listings name a type."""
    assert describe_type(expected) == words


def test_coerce_text() -> None:
    """Text stays text, and nothing else is."""
    assert coerce("name", "5", str) == "5"
    with pytest.raises(OptionError, match="option 'name' is 5: expected text"):
        coerce("name", 5, str)


def test_new_configs_get_the_checks_for_nothing() -> None:
    """A config class is its fields: types, ranges and help are declared once."""

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Config(MethodConfig):
        steps: int = option(10, "how many", minimum=1, maximum=20)

    assert build_config(Config, {"steps": "5", "alpha": "auto"}, method="toy") == Config(steps=5, alpha="auto")
    with pytest.raises(OptionError, match="option 'steps' is 21: expected from 1 to 20"):
        Config(steps=21)

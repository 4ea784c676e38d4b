"""One merge as a YAML file: what ``dc-merge merge --config`` reads, and what every output records."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from dc_merge_peft._version import __version__
from dc_merge_peft.errors import OptionError, SourceError, unknown_name
from dc_merge_peft.extras import POLICIES
from dc_merge_peft.methods import EVERY_METHOD
from dc_merge_peft.paths import is_dir
from dc_merge_peft.result import MergeResult
from dc_merge_peft.sources.fingerprint import fingerprint
from dc_merge_peft.sources.hub import RECORD_FILE
from dc_merge_peft.together import base_place
from dc_merge_peft.yaml_files import bounded_yaml

FILE_NAME = RECORD_FILE
_EXPONENT = re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d{1,3}")
# PyYAML's at values that are not what their tag says, as !!int '' or !!timestamp x, and at 1:1:1:....5, which counts in sixties
_OF_TAGS = (LookupError, AttributeError, OverflowError)


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """The settings of one run; ``None`` means the default. ``options`` are those of the method."""

    adapters: tuple[str, ...] = ()
    output: str | None = None
    weights: tuple[float, ...] | None = None
    method: str = "dc"
    options: Mapping[str, Any] = field(default_factory=dict)
    rename: str | None = None
    svd_rank: int | None = None
    dtype: str | None = None
    device: str | None = None
    base: str | None = None
    dora_rank: int | None = None
    extras: str | None = None
    max_memory: str | None = None
    allow_different_bases: bool = False
    allow_zero: bool = False
    models: tuple[str, ...] = ()  # full models, in the place of adapters
    average: tuple[str, ...] = ()
    lora_rank: int | None = None
    allow_identical: bool = False

    @classmethod
    def read(cls, path: str | Path) -> RunConfig:
        """From a YAML file. Any other top-level name is an option of the method, so ``rho: 5`` may stand alone, and ``svd-rank`` is
        ``svd_rank``; the ``record`` that outputs carry is skipped.

        Raises:
            SourceError: the file is missing or no YAML mapping.
            OptionError: a name that is neither a setting nor an option of any method, one given twice, or a value of the wrong type.
        """
        return cls.of(read_record(path), path)

    @classmethod
    def of(cls, found: Mapping[Any, Any], path: str | Path) -> RunConfig:
        """From what :func:`read_record` has found in a file; errors are those of :meth:`read`."""
        values = _underscored(path, found)
        values.pop("record", None)
        options = values.pop("options", None) or {}
        if not isinstance(options, dict):
            raise OptionError(f"the configuration '{path}' has options: {options!r}: expected lines such as 'rho: 5'")
        options = _underscored(path, options)
        known = {field.name for field in dataclasses.fields(cls)}
        loose = {name: values.pop(name) for name in list(values) if name not in known}
        _refuse_unknown(path, [*loose, *options], str(values.get("method") or cls.method), known)
        twice = set(options) & set(loose)
        if twice:
            raise OptionError(f"the configuration '{path}' gives option '{min(twice)}' twice: expected it once")
        examples = {
            "adapters": "[math-lora, code-lora]", "weights": "[1, 0.5]", "models": "[math-model, code-model]",
            "average": "[q_proj]",
        }  # fmt: skip
        for name, example in examples.items():
            if isinstance(values.get(name), list):
                values[name] = tuple(values[name])
            elif values.get(name) is not None:
                raise OptionError(
                    f"the configuration '{path}' has {name}: {values[name]!r}: expected a list, as in {example}"
                )
        values["weights"] = with_exponents(values.get("weights"))
        for name in ("svd_rank", "dora_rank", "lora_rank"):
            if str(values.get(name)).lower() == "none":  # as errors and options have it; YAML itself says null
                values[name] = None
        for name in ("adapters", "models", "average"):
            if values.get(name) is not None:
                values[name] = tuple(map(str, values[name]))  # a directory may be called 2024
        for name in ("output", "method", "rename", "dtype", "device", "base", "extras", "max_memory"):
            if values.get(name) is not None:
                values[name] = str(values[name])
        for name in ("allow_different_bases", "allow_zero", "allow_identical"):
            if values.get(name) is not None and not isinstance(values[name], bool):
                raise OptionError(f"the configuration '{path}' has {name}: {values[name]!r}: expected true or false")
        return cls(**{name: value for name, value in values.items() if value is not None}, options={**options, **loose})

    def to_dict(self) -> dict[str, Any]:
        """Plain values of what is set."""
        flags = ("models", "average", "allow_different_bases", "allow_zero", "allow_identical")
        unused = {name for name in flags if not getattr(self, name)} | ({"adapters"} if self.models else set())
        values = {name: value for name, value in vars(self).items() if value is not None and name not in unused}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


def _underscored(path: str | Path, values: Mapping[Any, Any]) -> dict[str, Any]:
    """The same values under names with underscores, as flags may be written with dashes."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        plain = str(name).replace("-", "_")
        if plain in found:
            raise OptionError(f"the configuration '{path}' gives '{plain}' twice: expected it once")
        found[plain] = value
    return found


def _refuse_unknown(path: str | Path, names: Iterable[str], method: str, settings: Iterable[str]) -> None:
    """Names that no method knows as an option. One of another method may be meant for a method that is named elsewhere."""
    options = {name: {field.name for field in dataclasses.fields(kind.Config)} for name, kind in EVERY_METHOD.items()}
    anywhere = set().union(*options.values())
    for name in names:
        if name not in anywhere and method in options:
            valid = [*sorted(settings), *sorted(options[method])]
            raise OptionError(f"the configuration '{path}' has an {unknown_name('setting or option', name, valid)}")


def check_adapters(path: str | Path, found: Mapping[Any, Any], adapters: Sequence[str]) -> None:
    """Refuse adapters that are not those a record was made from: its paths are relative to the directory of that merge, and an
    adapter may have been trained again.

    Args:
        path: Of the record, or of another configuration, which has no fingerprints.
        found: What :func:`read_record` has found there.
        adapters: As the record names them; those of the Hub have their commit.

    Raises:
        SourceError: one has other weights.
    """
    marks = recorded(found, "fingerprints")
    for place in adapters if isinstance(marks, Mapping) else ():
        mark, own = marks.get(place), None
        with suppress(OSError, RuntimeError):  # what can't be looked at is left for the source to refuse
            folder = Path(place).expanduser()
            own = fingerprint(folder) if is_dir(folder) else None
        if None not in (mark, own) and own != mark:
            raise SourceError(
                f"adapter '{place}' is not the one that '{path}' was made from: its weights are others. Paths there are relative to the "
                "directory of that merge: expected the same adapters; run from there, or name the adapters on the command line"
            )


def read_record(path: str | Path) -> dict[Any, Any]:
    """Everything in a YAML file of a merge, as it stands there: its settings, and in that of an output the ``record``.

    Raises:
        SourceError: the file is missing or no YAML mapping.
    """
    return loaded_yaml(path, "configuration", "method: dc")


def recorded(found: Mapping[Any, Any], name: str) -> Any:
    """What an output's ``record`` in such a file says under a name; None where it says nothing. It may be a stranger's."""
    record = found.get("record")
    return record.get(name) if isinstance(record, Mapping) else None


def loaded_yaml(path: str | Path, what: str, example: str) -> dict[Any, Any]:
    """The mapping in a YAML file; ``what`` it is and an ``example`` of a line are for errors.

    Raises:
        SourceError: the file is missing, or holds no YAML mapping.
    """
    try:
        values = bounded_yaml(Path(path).expanduser())
    except (OSError, ValueError, RuntimeError, yaml.YAMLError, *_OF_TAGS) as error:
        reason = str(error).replace("\n", " ")
        raise SourceError(f"the {what} '{path}' can't be read ({reason}): expected a YAML file") from error
    if not isinstance(values, dict):
        raise SourceError(f"the {what} '{path}' is no mapping: expected lines such as '{example}'")
    return values


def with_exponents(value: Any) -> Any:
    """Numbers such as ``1e-3``, which YAML 1.1 takes for text unless they have a point, as numbers, all the way down."""
    if isinstance(value, dict):
        return {key: with_exponents(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(map(with_exponents, value))
    return float(value) if isinstance(value, str) and _EXPONENT.fullmatch(value) else value


def as_yaml(record: Mapping[str, Any], *, allow_unicode: bool = True) -> str:
    """A record as it is written."""
    return yaml.safe_dump(dict(record), sort_keys=False, allow_unicode=allow_unicode)


def printable_yaml(record: Mapping[str, Any]) -> str:
    """A record as YAML for people; characters that would not show, or turn the text around, are spelled out."""
    dumped = as_yaml(record)
    printable = all(line.isprintable() for line in dumped.split("\n"))
    return (dumped if printable else as_yaml(record, allow_unicode=False)).strip()


def run_record(result: MergeResult) -> dict[str, Any]:
    """What made ``result``, as :meth:`RunConfig.read` takes it, and under ``record`` what came of it; no time: the same merge, the same bytes."""
    full, places = result.full, tuple(info.whole_location for info in result.adapters)
    config = RunConfig(
        adapters=() if full else places,
        models=places if full else (),
        average=full.average if full else (),
        lora_rank=result.svd_rank if full else None,
        weights=result.weights,
        method=result.method,
        options=dict(result.options),
        rename=result.rename,
        svd_rank=None if full else result.svd_rank,
        dtype=None if full else str(result.dtype).removeprefix("torch."),
        base=result.dora.base if result.dora else full.base if full else None,
        dora_rank=result.dora.rank if result.dora else None,
        extras=_policy(result),
        allow_different_bases=len({base_place(info.base_model) for info in result.adapters if info.base_model}) > 1,
        allow_zero=result.allow_zero and not full,
        allow_identical=result.allow_zero and bool(full),
    )
    record: dict[str, Any] = {
        "dc_merge_peft": __version__,
        "alpha": result.alpha,
        "modules": len(result.modules),
        "rank": result.max_rank,
        "truncation_error": result.truncation_error,
    }
    if marks := {info.whole_location: info.fingerprint for info in result.adapters if info.fingerprint}:
        record["fingerprints"] = marks
    if full:
        record["tensors"] = {"merged": full.merged, "averaged": full.averaged, "copied": full.copied}
    if extras := result.extras.record(result.adapters):
        record["extras"] = extras
    if result.dora:
        names = [info.name for info in result.adapters]
        record["dora_error"] = {names[index]: error for index, error in result.dora.errors.items()}
    return {**config.to_dict(), "record": record}


def _policy(result: MergeResult) -> str | None:
    """The policy for tensors outside B and A where it matters; an adapter by what it will be called again."""
    plan = result.extras.plan
    if not plan.decides:
        return None
    if plan.keeper is None:
        return plan.policy
    keeper = result.adapters[plan.keeper]
    return keeper.whole_location if keeper.revision or keeper.name in POLICIES else keeper.name

"""What the model cards of adapters and base models say about licence and task: the block of metadata atop README.md."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from dc_merge_peft.paths import is_dir, is_file
from dc_merge_peft.sources.base import CardFacts
from dc_merge_peft.sources.hub import CARD_FILE, HubId

# Cards are written by hand and by strangers: longer blocks and values of another form say nothing.
_LONGEST_BLOCK = 50_000
_BLOCK = re.compile(r"\A\ufeff?---[ \t]*\r?\n(.*?)\r?\n---[ \t]*(?:\r?\n|\Z)", re.DOTALL)
_FORMS = {
    "license": re.compile(r"[a-z0-9][a-z0-9.+-]{0,63}"),
    "license_name": re.compile(r"[A-Za-z0-9][\w .+-]{0,99}"),
    "license_link": re.compile(r"https://[\w./%~+-]{1,300}"),
    "pipeline_tag": re.compile(r"[a-z0-9][a-z0-9-]{0,63}"),
}
_LISTS = {
    "language": re.compile(r"[a-z]{2,3}(-[A-Za-z0-9]{2,8}){0,2}|multilingual|code"),
    "datasets": re.compile(r"[A-Za-z0-9][\w.-]{0,95}(/[A-Za-z0-9][\w.-]{0,95})?"),
}
_MOST = 100  # of a list
# What trainers write as a dataset that was read from files or made in memory.
_BUILDERS = (
    "generator",
    "json",
    "csv",
    "text",
    "parquet",
    "arrow",
    "pandas",
    "imagefolder",
    "audiofolder",
    "webdataset",
)
_NO_ANSWER = ("null", "none", "unknown", "na")


def read_card(folder: Path) -> CardFacts:
    """The facts in the card of a directory; none where there is no card, or none that can be read."""
    if not is_file(folder / CARD_FILE):
        return CardFacts()
    try:
        with (folder / CARD_FILE).open(encoding="utf-8") as file:
            block = _BLOCK.match(file.read(_LONGEST_BLOCK))
        # The base loader knows no merge keys, which can make a short block endless.
        values = yaml.load(block[1], Loader=yaml.BaseLoader) if block else None
    except (OSError, ValueError, RecursionError, yaml.YAMLError):
        return CardFacts()
    if not isinstance(values, Mapping):
        return CardFacts()
    facts: dict[str, Any] = {name: _fact(values.get(name), form) for name, form in _FORMS.items()}
    if facts["license"] != "other":
        facts |= {"license_name": None, "license_link": None}
    facts |= {name: _facts(values.get(name), form) for name, form in _LISTS.items()}
    return CardFacts(**facts)


def base_card(base: str | None, revision: str | None, *, token: str | bool | None = None, ask_hub: bool) -> CardFacts:
    """The facts in the card of a base model: of its directory, of the local cache, or, if ``ask_hub``, of the Hub."""
    if not base:
        return CardFacts()
    try:
        if is_dir(folder := Path(base).expanduser()):
            return read_card(folder)
        hub_id = HubId.parse(base)
        if hub_id is None or hub_id.subfolder:
            return CardFacts()
        import huggingface_hub

        wanted: dict[str, Any] = {
            "repo_id": hub_id.repo,
            "filename": CARD_FILE,
            "revision": revision or hub_id.revision,
        }
        found = (
            huggingface_hub.hf_hub_download(**wanted, token=token)
            if ask_hub
            else huggingface_hub.try_to_load_from_cache(**wanted)
        )
    except Exception:  # no card, no access or no Hub: nothing is claimed, and nothing fails for that
        return CardFacts()
    return read_card(Path(found).parent) if isinstance(found, str) else CardFacts()


def _facts(value: object, form: re.Pattern[str]) -> tuple[str, ...]:
    """The values of a list, or the one value, that are of a form; each once."""
    values = value if isinstance(value, list) else [value]
    found = (each for each in values[:_MOST] if isinstance(each, str) and form.fullmatch(each))
    return tuple(dict.fromkeys(each for each in found if each.lower() not in (*_NO_ANSWER, *_BUILDERS)))


def _fact(value: object, form: re.Pattern[str]) -> str | None:
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    return value if isinstance(value, str) and form.fullmatch(value) and value.lower() not in _NO_ANSWER else None

"""What a model card states in the Hub's terms: base model, licence, task, and the class that loads it."""

from __future__ import annotations

import platform
import re
from collections.abc import Iterable
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from typing import Any, TypeVar
from urllib.parse import quote

import torch

from dc_merge_peft._version import __version__
from dc_merge_peft.outputs.extras import HEADS
from dc_merge_peft.outputs.public import is_hub_id
from dc_merge_peft.result import MergeResult
from dc_merge_peft.sources.base import AdapterInfo, CardFacts
from dc_merge_peft.sources.cards import base_card
from dc_merge_peft.sources.hub import HubId

HUB = "https://huggingface.co"

T = TypeVar("T")

# By PEFT's task type: the class of transformers, and the Hub's name of the task where it has one.
_TASKS = {
    "CAUSAL_LM": ("AutoModelForCausalLM", "text-generation"),
    "SEQ_2_SEQ_LM": ("AutoModelForSeq2SeqLM", None),
    "SEQ_CLS": ("AutoModelForSequenceClassification", "text-classification"),
    "TOKEN_CLS": ("AutoModelForTokenClassification", "token-classification"),
    "QUESTION_ANS": ("AutoModelForQuestionAnswering", "question-answering"),
    "FEATURE_EXTRACTION": ("AutoModel", "feature-extraction"),
}


def metadata(result: MergeResult, base: CardFacts, *, library: str, relation: str) -> dict[str, Any]:
    """The block of metadata; a field that is not certain is left out."""
    lora = [] if result.full and not result.full.lora else ["lora", "peft"]
    header: dict[str, Any] = {"library_name": library, "tags": sorted(["dc-merge", "merge", *lora])}
    if (base_model := base_model_id(result)) is not None:
        header |= {"base_model": base_model, "base_model_relation": relation}
    if (pipeline := pipeline_tag(result)) is not None:
        header["pipeline_tag"] = pipeline
    return header | stated(result) | licence(result, base)


def stated(result: MergeResult) -> dict[str, list[str]]:
    """Languages and datasets that any of the adapters' cards names: the merged one was made from all of them."""
    named = {
        "language": (name for info in result.adapters for name in info.card.language),
        "datasets": (name for info in result.adapters for name in info.card.datasets),
    }
    return {field: found for field, names in named.items() if (found := sorted(set(names)))}


def base_model_id(result: MergeResult) -> str | None:
    """The base model's Hub id where all adapters agree on one; never a local path."""
    name = _the_one(info.fitting_base for info in result.adapters)
    return name if is_hub_id(name) else None


def base_revision(result: MergeResult) -> str | None:
    """The revision of the base model on which all adapters agree, where it is on the Hub."""
    return _the_one(info.base_revision for info in result.adapters) if base_model_id(result) else None


def base_facts(result: MergeResult, *, token: str | bool | None = None, ask_hub: bool = False) -> CardFacts:
    """What the card of the one base model says, where it is at hand or, if ``ask_hub``, on the Hub."""
    base = _the_one(info.base_model for info in result.adapters)
    revision = _the_one(info.base_revision for info in result.adapters)
    return base_card(base, revision, token=token, ask_hub=ask_hub)


def licence(result: MergeResult, base: CardFacts) -> dict[str, str]:
    """The licence fields if all adapters and the base model have the same ones, else none: what terms a mixture is under
    is not for a program to say."""
    cards = [info.card for info in result.adapters] + [base]
    terms = _the_one((card.license, card.license_name, card.license_link) for card in cards)
    if terms is None or terms[0] is None:
        return {}
    return {
        name: value for name, value in zip(("license", "license_name", "license_link"), terms, strict=True) if value
    }


def pipeline_tag(result: MergeResult) -> str | None:
    """The task that the adapters' cards agree on, else that of their task type."""
    stated = {info.card.pipeline_tag for info in result.adapters} - {None}
    if stated:
        return next(iter(stated)) if len(stated) == 1 else None
    task_type = _the_one(info.task_type for info in result.adapters)
    return _TASKS.get(task_type or "", (None, None))[1]


def model_class(result: MergeResult) -> str | None:
    """The class of transformers that the adapters were trained with, as far as their configs tell."""
    task_type = _the_one(info.task_type for info in result.adapters)
    if task_type in _TASKS:
        return _TASKS[task_type][0]
    mapping = _the_one(tuple(sorted((info.auto_mapping or {}).items(), key=str)) for info in result.adapters)
    named = {str(key): str(value) for key, value in mapping or ()}
    name, library = named.get("base_model_class", ""), named.get("parent_library", "")
    return name if library.split(".")[0] == "transformers" and re.fullmatch(r"[A-Za-z]\w{0,99}", name) else None


def label_count(result: MergeResult) -> int | None:
    """How many labels the classifier in the result has, where it holds one: the base model's config knows nothing of it."""
    heads = HEADS.get(_the_one(info.task_type for info in result.adapters) or "", ())
    counts = {
        extra.spec.shape[0]
        for name, extra in result.extras.of_kind("module").items()
        if extra.spec.module.rpartition(".")[2] in heads
        and name.removeprefix(f"{extra.spec.module}.") in ("weight", "out_proj.weight")
    }
    return counts.pop() if len(counts) == 1 else None


def hub_page(info: AdapterInfo) -> str | None:
    """The address of a Hub adapter at its commit; a local one has none."""
    hub_id = HubId.parse(info.location) if info.revision is not None else None
    if hub_id is None:
        return None
    path = hub_id.repo + (f"/tree/{info.revision}/{hub_id.subfolder}" if hub_id.subfolder else "")
    return f"{HUB}/{quote(path)}"


def versions() -> dict[str, str]:
    """The programs that had a part in the numbers and the files, by name."""
    # A CUDA build of torch has the plain number in its metadata, and says which it is itself.
    found = {"dc_merge_peft": __version__, "torch": torch.__version__}
    for package in ("safetensors", "peft", "transformers", "huggingface_hub"):
        with suppress(PackageNotFoundError):
            found[package] = version(package)
    return {**found, "Python": platform.python_version()}


def _the_one(values: Iterable[T]) -> T | None:
    """The value that all have, else None."""
    first, *others = values
    return first if all(other == first for other in others) else None

"""The model card of a merged adapter or fused model: what was merged, how, and what it cost."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import yaml

from dc_merge_peft.methods import EVERY_METHOD
from dc_merge_peft.outputs.beside import FOLDER, Beside
from dc_merge_peft.outputs.card_facts import (
    HUB,
    base_model_id,
    base_revision,
    hub_page,
    label_count,
    metadata,
    model_class,
    versions,
)
from dc_merge_peft.outputs.markdown import code, fenced, text
from dc_merge_peft.outputs.rows import group_columns, grouped_modules, rows_by_layer, things_of
from dc_merge_peft.result import MergeResult
from dc_merge_peft.runconfig import printable_yaml
from dc_merge_peft.sources.base import AdapterInfo, CardFacts

# Beyond this many modules the card has a row for all of one name and shape.
MOST_ROWS = 60

_USE_ADAPTER = """from peft import PeftModel
from transformers import {model_class}

model = {model_class}.from_pretrained("{base}"{revision}{labels})
model = PeftModel.from_pretrained(model, "{place}")"""

_USE_MODEL = """from transformers import {model_class}

model = {model_class}.from_pretrained("{place}")"""

_MERGE_AGAIN = ("merge", "merges the adapters again")

_CARD = """---
{header}
---

# Merge of {count} {things}

{what}, merged with **{method}** ({title}; {reference}) by `dc_merge_peft`.
{base}
| {thing} | weight |
|---|---|
{sources}

Coefficient alpha: {alpha:.4g}. Relative truncation error over all modules: {error:.2%}.
{remarks}
## Use

{usage}

{report}## Configuration

`dc-merge {command} --config dc_merge.yaml -o OUT` {again}. Made with {versions}.

{configuration}

## Modules

{modules}
"""


def adapter_card(
    result: MergeResult,
    record: Mapping[str, Any],
    base: CardFacts | None = None,
    place: str | None = None,
    beside: Beside | None = None,
) -> str:
    """Markdown for a merged adapter, the Hub's metadata block on top. Names from adapters are escaped.

    Args:
        result: What the card is about.
        record: Its configuration, as it is written to ``dc_merge.yaml``.
        base: What the base model's card says of its licence.
        place: The Hub id under which it is published, for the example.
        beside: What lies beside the card, to be shown in it.
    """
    usage = _USE_ADAPTER.format(
        model_class=model_class(result) or "AutoModel",
        base=code(base_model_id(result) or "the base model"),
        revision=f', revision="{code(revision)}"' if (revision := base_revision(result)) else "",
        labels="" if (labels := label_count(result)) is None else f", num_labels={labels}",
        place=code(place or "path/or/id/of/this/adapter"),
    )
    header = metadata(result, base or CardFacts(), library="peft", relation="adapter")
    if result.full:
        return _card(
            result, record, header, what="A LoRA adapter extracted from the merge", usage=usage, again=_again(record)
        )
    return _card(result, record, header, what="One LoRA adapter in place of several", usage=usage, beside=beside)


def fused_card(
    result: MergeResult, record: Mapping[str, Any], base: CardFacts | None = None, place: str | None = None
) -> str:
    """Markdown for a base model with the merged delta inside; arguments as for :func:`adapter_card`."""
    usage = _USE_MODEL.format(
        model_class=model_class(result) or "AutoModel", place=code(place or "path/or/id/of/this/model")
    )
    header = metadata(result, base or CardFacts(), library="transformers", relation="merge")
    what = "One full model in place of several" if result.full else "The base model with several LoRA adapters inside"
    return _card(result, record, header, what=what, usage=usage, again=_again(record))


def _again(record: Mapping[str, Any]) -> tuple[str, str]:
    """The command that makes the same again; without its base model a fused one is made in two steps."""
    if "models" in record:
        return "merge-full", "merges the models again"
    return ("fuse", "makes the model again") if "base" in record else _MERGE_AGAIN


def _card(
    result: MergeResult,
    record: Mapping[str, Any],
    header: Mapping[str, Any],
    *,
    what: str,
    usage: str,
    again: tuple[str, str] = _MERGE_AGAIN,
    beside: Beside | None = None,
) -> str:
    """The card's common frame, filled in."""
    method = EVERY_METHOD.get(result.method)
    if model_class(result) is None:
        usage += "  # or in the class of your task"
    base = base_model_id(result)
    return _CARD.format(
        header=yaml.safe_dump(dict(header), sort_keys=True).strip(),
        count=len(result.adapters),
        things=f"{'fine-tuned model' if result.full else 'LoRA adapter'}{'s' * (len(result.adapters) != 1)}",
        thing="model" if result.full else "adapter",
        what=what,
        command=again[0],
        again=again[1],
        method=text(result.method),
        title=method.title if method else "a custom method",
        reference=_reference(method.reference, method.link) if method else "no reference",
        base=f"\nBase model: [{text(base)}]({HUB}/{base}).\n" if base else "",
        sources="\n".join(
            f"| {_source(info)} | {weight:g} |" for info, weight in zip(result.adapters, result.weights, strict=True)
        ),
        alpha=result.alpha,
        error=result.truncation_error,
        remarks="".join(f"\n> {text(remark)}\n" for remark in result.remarks),
        usage=fenced(usage, "python"),
        report=_report(beside) if beside and beside.files else "",
        configuration=fenced(printable_yaml(record), "yaml"),
        modules=_modules(result),
        versions=", ".join(f"`{code(name)} {code(number)}`" for name, number in versions().items()),
    )


def _report(beside: Beside) -> str:
    """The section with pictures from the folder beside the card."""
    lines = [f"![{text(picture.alt)}]({FOLDER}/{picture.name})" for picture in beside.pictures]
    if beside.page is not None:
        lines.append(f"All of it as one page, to be opened in a browser: [{beside.page}]({FOLDER}/{beside.page}).")
    return "\n\n".join(["## What is kept", *lines]) + "\n\n"


def _reference(reference: str, link: str) -> str:
    return f"[{reference}]({link})" if link else reference


def _source(info: AdapterInfo) -> str:
    """A link for a Hub adapter, the bare name for a local one."""
    page = hub_page(info)
    if page is None or info.revision is None:
        return text(info.name)
    return f"[{text(info.location)}]({page}) at `{code(info.revision[:8])}`"


def _modules(result: MergeResult) -> str:
    """A table with a row a module, or a row for all modules of one name and shape where they are many."""
    by_layer = rows_by_layer(result)
    if len(by_layer) <= MOST_ROWS:
        return _table(("module", "shape", things_of(result), "rank", "truncation error"), map(_row, by_layer))
    rows = ([f"`{code(name)}`", *cells] for name, *cells in grouped_modules(result))
    table = _table(group_columns(result), rows)
    return f"{len(result.modules)} modules; a row is all of one name and shape, with the largest truncation error.\n\n{table}"


def _row(row: Mapping[str, Any]) -> list[object]:
    m, n = row["shape"]
    rank = f"{row['rank']} of {row['full_rank']}"
    return [f"`{code(row['module'])}`", f"{m} x {n}", len(row["adapters"]), rank, f"{row['truncation_error']:.2%}"]


def _table(columns: Sequence[str], rows: Iterable[Iterable[object]]) -> str:
    head = [f"| {' | '.join(columns)} |", "|" + "---|" * len(columns)]
    return "\n".join([*head, *(f"| {' | '.join(map(str, cells))} |" for cells in rows)])

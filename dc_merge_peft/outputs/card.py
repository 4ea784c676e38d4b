"""The model card of a merged adapter or fused model: what was merged, how, and what it cost."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import yaml

from dc_merge_peft.methods import METHODS
from dc_merge_peft.outputs.public import is_hub_id
from dc_merge_peft.result import MergeResult
from dc_merge_peft.sources.base import AdapterInfo

_USE_ADAPTER = """from peft import PeftModel
from transformers import AutoModel  # or the class of your task

model = AutoModel.from_pretrained("{base}")
model = PeftModel.from_pretrained(model, "path/or/id/of/this/adapter")"""

_USE_MODEL = """from transformers import AutoModel  # or the class of your task

model = AutoModel.from_pretrained("path/or/id/of/this/model")"""

_CARD = """---
{header}
---

# Merge of {count} LoRA adapters

{what}, merged with **{method}** ({title}; {reference}) by `dc_merge_peft`.

| adapter | weight |
|---|---|
{sources}

Coefficient alpha: {alpha:.4g}. Relative truncation error over all modules: {error:.2%}.
{remarks}
## Use

```python
{usage}
```

## Configuration

`dc-merge merge --config dc_merge.yaml -o OUT` merges the adapters again.

```yaml
{configuration}
```

## Modules

| module | shape | adapters | rank | truncation error |
|---|---|---|---|---|
{rows}
"""


def adapter_card(result: MergeResult, record: Mapping[str, Any]) -> str:
    """Markdown for a merged adapter, the Hub's metadata block on top. Names from adapters are escaped."""
    usage = _USE_ADAPTER.format(base=_code(base_model_id(result) or "the base model"))
    what = "One LoRA adapter in place of several"
    return _card(result, record, library="peft", relation="adapter", what=what, usage=usage)


def fused_card(result: MergeResult, record: Mapping[str, Any]) -> str:
    """Markdown for a base model with the merged delta inside."""
    what = "The base model with several LoRA adapters inside"
    return _card(result, record, library="transformers", relation="merge", what=what, usage=_USE_MODEL)


def base_model_id(result: MergeResult) -> str | None:
    """The base model's Hub id where all adapters agree on one; never a local path."""
    names = {info.fitting_base for info in result.adapters}
    name = next(iter(names)) if len(names) == 1 else None
    return name if is_hub_id(name) else None


def _card(result: MergeResult, record: Mapping[str, Any], *, library: str, relation: str, what: str, usage: str) -> str:
    """The card's common frame, filled in."""
    base = base_model_id(result)
    header: dict[str, Any] = {"library_name": library, "tags": ["dc-merge", "lora", "merge", "peft"]}
    if base:
        header |= {"base_model": base, "base_model_relation": relation}
    method = METHODS.get(result.method)
    configuration = yaml.safe_dump(dict(record), sort_keys=False, allow_unicode=True).strip()
    return _CARD.format(
        header=yaml.safe_dump(header, sort_keys=True).strip(),
        count=len(result.adapters),
        what=what,
        method=result.method,
        title=method.title if method else "a custom method",
        reference=method.reference if method else "no reference",
        sources="\n".join(
            f"| {_source(info)} | {weight:g} |" for info, weight in zip(result.adapters, result.weights, strict=True)
        ),
        alpha=result.alpha,
        error=result.truncation_error,
        remarks="".join(f"\n> {_escaped(remark)}\n" for remark in result.remarks),
        usage=usage,
        configuration=configuration.replace("```", "'''"),
        rows="\n".join(_row(row) for row in result.report()),
    )


def _row(row: Mapping[str, Any]) -> str:
    m, n = row["shape"]
    cells = (
        f"`{_code(row['module'])}`",
        f"{m} x {n}",
        len(row["adapters"]),
        f"{row['rank']} of {row['full_rank']}",
        f"{row['truncation_error']:.2%}",
    )
    return "| " + " | ".join(map(str, cells)) + " |"


def _source(info: AdapterInfo) -> str:
    """A link for a Hub adapter, the bare name for a local one."""
    if info.revision is None:
        return _escaped(info.name)
    return f"[{_escaped(info.location)}](https://huggingface.co/{info.location}) at `{info.revision[:8]}`"


def _escaped(text: str) -> str:
    """Text that can't leave its table cell or line."""
    return re.sub(r"([\\`*_\[\]<>|])", r"\\\1", " ".join(str(text).split()))


def _code(text: str) -> str:
    """Text for a code span or block: one line, no backticks, no quotes, no cell borders."""
    return re.sub(r"[`\"|\\]", "'", " ".join(str(text).split()))

"""``dc-merge methods``: what can be chosen, read from the methods themselves."""

from __future__ import annotations

import dataclasses
import inspect
import json
import typing
from typing import Annotated, Any

import typer

from dc_merge_peft.cli.show import console, reports_errors, table
from dc_merge_peft.errors import OptionError, unknown_name
from dc_merge_peft.methods import METHODS
from dc_merge_peft.methods.options import describe_type


@reports_errors
def methods(
    name: Annotated[str | None, typer.Argument(help="One method; all of them by default.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print as JSON.")] = False,
) -> None:
    """List the merging methods and their options."""
    if name is not None and name not in METHODS:
        raise OptionError(unknown_name("method", name, METHODS))
    chosen = [name] if name is not None else list(METHODS)
    if as_json:
        typer.echo(json.dumps({key: describe_method(key) for key in chosen}))
        return
    out = console()
    for key in chosen:
        method = describe_method(key)
        out.print(f"[bold]{key}[/bold]: {method['title']}")
        out.print(f"  {method['reference']}", style="dim")
        rows = [(f"  {o['name']}", o["default"], o["type"], o["help"]) for o in method["options"]]
        out.print(table("", ("  option", "default", "values", "meaning"), rows))
        out.print()
    out.print("Set them with -O option=value, in Python as DCMergeAdapter(method=..., option=value).")


def describe_method(name: str) -> dict[str, Any]:
    """One method as plain values: title, reference, and for each option its default, allowed values and meaning."""
    method = METHODS[name]
    types = typing.get_type_hints(method.Config)
    own = {"alpha", *inspect.get_annotations(method.Config)}  # before those of the space it works in
    return {
        "title": method.title,
        "reference": method.reference,
        "options": [
            {
                "name": field.name,
                "default": "none"
                if field.default is None
                else str(field.default).lower()
                if isinstance(field.default, bool)
                else field.default,
                "type": describe_type(types[field.name]),
                "help": field.metadata["help"],
            }
            for field in sorted(dataclasses.fields(method.Config), key=lambda field: field.name not in own)
        ],
    }

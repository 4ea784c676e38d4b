"""``dc-merge methods``: what can be chosen, read from the methods themselves."""

from __future__ import annotations

import dataclasses
import inspect
import json
import typing
from typing import Annotated, Any

import typer

from dc_merge_peft.cli.show import console, reports_errors, table
from dc_merge_peft.combination_types import combination_types
from dc_merge_peft.errors import OptionError, unknown_name
from dc_merge_peft.methods import EVERY_METHOD
from dc_merge_peft.methods.options import describe_bounds, describe_type
from dc_merge_peft.methods.spaces import SpaceConfig


@reports_errors
def methods(
    name: Annotated[str | None, typer.Argument(help="A method, to see its options.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print as JSON, with all options.")] = False,
) -> None:
    """List the merging methods, or one method's options."""
    if name is not None and name not in EVERY_METHOD:
        raise OptionError(unknown_name("method", name, EVERY_METHOD))
    if as_json:
        typer.echo(json.dumps({key: describe_method(key) for key in ([name] if name is not None else EVERY_METHOD)}))
        return
    out = console()
    if name is None:
        rows = [(key, method["title"], method["peft"]) for key in EVERY_METHOD for method in [describe_method(key)]]
        out.print(table("", ("method", "what it does", "in PEFT"), rows))
        out.print()
        out.print("For a method's options: dc-merge methods NAME. To choose one: docs/methods in the documentation.")
        return
    method = describe_method(name)
    out.print(f"[bold]{name}[/bold]: {method['title']}")
    out.print(f"  {method['reference']}", style="dim")
    rows = [(f"  {o['name']}", o["default"], o["type"], o["help"]) for o in method["options"]]
    out.print(table("", ("  option", "default", "values", "meaning"), rows))
    out.print()
    out.print("Set them with -O option=value, in Python as DCMergeAdapter(method=..., option=value);")
    out.print(f'in PEFT: add_weighted_adapter(..., combination_type="{method["peft"]}", option=value).')


def describe_method(name: str) -> dict[str, Any]:
    """One method as plain values: title, reference, its name in PEFT, and for each option its default, allowed values and
    meaning. A method's own options come before those of the space that it works in."""
    method = EVERY_METHOD[name]
    types = typing.get_type_hints(method.Config)
    own = {"alpha", *inspect.get_annotations(method.Config)}
    of_space = {field.name for field in dataclasses.fields(SpaceConfig)} - own
    return {
        "title": method.title,
        "reference": method.reference,
        "peft": next(kind for kind, key in combination_types().items() if key == name),
        "options": [
            {
                "name": field.name,
                "default": _plain(field.default),
                "type": describe_type(
                    types[field.name], describe_bounds(field.metadata["minimum"], field.metadata["maximum"])
                ),
                "help": field.metadata["help"],
            }
            for field in sorted(dataclasses.fields(method.Config), key=lambda field: field.name in of_space)
        ],
    }


def _plain(default: Any) -> Any:
    """A default as a number or in words."""
    if isinstance(default, bool):
        return str(default).lower()
    return default if isinstance(default, (int, float)) else "none" if default is None else str(default)

"""``dc-merge`` in this process."""

from __future__ import annotations

from typer.testing import CliRunner, Result

from dc_merge_peft.cli import app


def run(*arguments: str) -> Result:
    """The program with these arguments; exceptions other than exits are raised."""
    return CliRunner().invoke(app, list(arguments), catch_exceptions=False)

"""The command line: ``pyro-lift demo | train | adapt | predict | bench``. Each command imports what it needs itself."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

__all__ = ["app", "main"]

app = typer.Typer(name="pyro-lift", no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
bench = typer.Typer(no_args_is_help=True)
app.add_typer(bench, name="bench", help="Measure: a JSON list of records, and a figure beside it.")

Out = Annotated[Path, typer.Option("--out", help="folder for records and figures", file_okay=False)]
Smoke = Annotated[bool, typer.Option("--smoke", help="seconds instead of minutes; the numbers mean nothing")]
Device = Annotated[str, typer.Option("--device", help="cpu or cuda")]


@app.callback()
def _root() -> None:
    """Learn a prior over LoRA adapters from many tasks, and adapt to new ones by Bayesian inference."""


def main() -> None:
    """Entry point: what a user did wrong is one line on stderr and exit code 2, not a traceback."""
    from pyro_lift.inference.sgld import DivergedError

    try:
        app()
    except (ValueError, TypeError, OSError, DivergedError) as error:
        print(f"pyro-lift: {type(error).__name__}: {error}", file=sys.stderr)
        raise SystemExit(2) from error

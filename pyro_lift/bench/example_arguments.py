"""Command-line arguments that the examples share: data, output, and a flag for every size of a comparison."""

from __future__ import annotations

import argparse
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from pyro_lift.bench.comparison import ComparisonSettings
from pyro_lift.tuning.methods import TRIALS

__all__ = ["parser", "settings_of"]


def parser(description: str, defaults: ComparisonSettings, out: str) -> argparse.ArgumentParser:
    """Make the parser of an example: data, output, and a flag for every field of the settings."""
    arguments = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--root", help="where the data lies")
    arguments.add_argument(
        "--out", default=out, type=Path, help=f"folder for records, table and figure (default {out})"
    )
    arguments.add_argument("--smoke", action="store_true", help="small made-up data, seconds; the numbers mean nothing")
    arguments.add_argument("--backbone", help="folder or name on the hub; by default the repository's own")
    arguments.add_argument(
        "--tune",
        type=int,
        nargs="?",
        const=TRIALS,
        help=f"choose every method's settings by the one tuner, among so many (without a number: {TRIALS})",
    )
    for f in fields(ComparisonSettings):
        if f.name == "tune":
            continue
        default = getattr(defaults, f.name)
        kind, several = (float, "+") if isinstance(default, tuple) else (type(default), None)
        arguments.add_argument(
            f"--{f.name.replace('_', '-')}", type=kind, nargs=several, help=f"{f.metadata['help']} (default {default})"
        )
    return arguments


def settings_of(given: argparse.Namespace, defaults: ComparisonSettings) -> ComparisonSettings:
    """Return the settings of a command line: its flags, else the smallest for ``--smoke``, else the example's own."""
    if given.smoke:
        defaults = replace(defaults, warm_up=4, visits=6, steps=4, draws=2, batch_size=4, rates=(1e-3, 3e-3))
        defaults = replace(defaults, seeds=1, dev_tasks=1, test_rows=8)
    named: dict[str, Any] = {}
    for f in fields(ComparisonSettings):
        value = getattr(given, f.name)
        if value is not None:
            named[f.name] = tuple(value) if isinstance(value, list) else value
    return replace(defaults, **named)

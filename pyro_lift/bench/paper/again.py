"""Cells run a second time: on the machine that ran them they have the same numbers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pyro_lift.bench.paper.cells import run_cell
from pyro_lift.bench.sweep import read_manifest, results
from pyro_lift.support.options import check_choice

__all__ = ["ABOUT_THE_RUN", "differences", "run_again"]

#: Keys of a record that say how long a run took, where and of which code, at any depth.
ABOUT_THE_RUN = (
    *("seconds", "cpu_seconds", "meta_seconds", "adapt_seconds", "peak_bytes"),
    *("versions", "commit", "machine", "cell", "costs", "cpu_costs", "stages"),
)


def run_again(
    folder: Path, names: Sequence[str], root: Path | None = None, log: Callable[[str], None] = print
) -> dict[str, list[str]]:
    """Run finished cells again and compare; nothing in the folder changes.

    Args:
        folder: that ``bench paper`` wrote into.
        names: of cells, as their files are named.
        root: where the data lie; None takes the folder that the manifest has.
        log: told of each cell.

    Returns:
        By name, the places whose values differ; empty lists where none does.

    Raises:
        ValueError: a cell that is not in the folder, or not done.
    """
    arguments = {cell.name: dict(cell.arguments) for cell in read_manifest(folder)}
    done = results(folder)
    for name in names:
        check_choice("cell", name, done)
    found: dict[str, list[str]] = {}
    for name in names:
        given = arguments[name] if root is None else {**arguments[name], "root": str(root)}
        found[name] = list(differences(done[name], run_cell(**given)))
        said = "; ".join(found[name][:3]) or "the same numbers"
        log(f"{name}: {len(found[name])} differ: {said}" if found[name] else f"{name}: {said}")
    return found


def differences(first: Any, again: Any, place: str = "") -> Iterator[str]:
    """Yield the places where two records differ, with both values; what is about the run itself is passed over."""
    if isinstance(first, Mapping) and isinstance(again, Mapping):
        for key in dict.fromkeys([*first, *again]):
            if key not in ABOUT_THE_RUN:
                yield from differences(first.get(key), again.get(key), f"{place}/{key}")
    elif isinstance(first, (list, tuple)) and isinstance(again, (list, tuple)) and len(first) == len(again):
        for number, pair in enumerate(zip(first, again, strict=True)):
            yield from differences(*pair, f"{place}/{number}")
    elif first != again and not (first != first and again != again):  # NaN is the same as NaN
        yield f"{place}: {first!r}, then {again!r}"

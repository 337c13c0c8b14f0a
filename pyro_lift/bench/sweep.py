"""Sweeps: a manifest of independent cells, done in any order by any number of processes, each cell once.

A cell is a name and its arguments. Its result is a JSON file ``NAME.json``, written under a temporary name and renamed,
and that file is the mark that the cell is done. A process that takes up a cell makes ``NAME.claim`` first, which only
one can; the claim of a process that died is taken over by ``retry=True``.

:func:`submit` hands the cells to an executor: a local pool of processes, or a cluster through submitit.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple, Protocol

__all__ = ["Cell", "Executor", "Job", "grid", "read_manifest", "results", "run_cells", "submit", "write_manifest"]

MANIFEST = "manifest.json"


class Cell(NamedTuple):
    """One run: its name, a file's name too, and what it is run with."""

    name: str
    arguments: Mapping[str, Any]


class Job(Protocol):
    """What an executor gives back: the futures of the standard library, submitit's jobs."""

    def result(self) -> Any:
        """Wait, and return what was returned or raise what was raised."""


class Executor(Protocol):
    """``ProcessPoolExecutor`` of ``concurrent.futures``, ``submitit.AutoExecutor``, and what else has the verb."""

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Job:
        """Have a function called somewhere."""


def grid(**axes: Sequence[Any]) -> list[Cell]:
    """Every combination; names are the values, joined by dashes.

    Example:
        >>> [cell.name for cell in grid(method=["lift", "maml"], seed=[0, 1])]
        ['lift-0', 'lift-1', 'maml-0', 'maml-1']
    """
    cells = []
    for values in product(*axes.values()):
        name = re.sub(r"[^\w.+-]", "_", "-".join(map(str, values)))
        cells.append(Cell(name, dict(zip(axes, values, strict=True))))
    return cells


def write_manifest(folder: Path, cells: Sequence[Cell]) -> Path:
    """Write the list of cells, for processes on any machine that sees the folder.

    Raises:
        ValueError: two cells of one name.
    """
    names = [cell.name for cell in cells]
    if len(set(names)) != len(names):
        twice = sorted({name for name in names if names.count(name) > 1})
        raise ValueError(f"two cells are named {twice[0]!r}: their results would be one file.")
    folder.mkdir(parents=True, exist_ok=True)
    lines = ",\n".join(json.dumps({"name": cell.name, "arguments": dict(cell.arguments)}) for cell in cells)
    _replace(folder / MANIFEST, f"[\n{lines}\n]\n")
    return folder / MANIFEST


def read_manifest(folder: Path) -> list[Cell]:
    """The cells of a folder."""
    return [Cell(entry["name"], entry["arguments"]) for entry in json.loads((folder / MANIFEST).read_text())]


def run_cells(folder: Path, function: Callable[..., Any], *, retry: bool = False) -> list[str]:
    """Run every cell of the manifest that nobody has taken; several processes may do so at once.

    Args:
        folder: with the manifest.
        function: called with a cell's arguments; what it returns must be JSON.
        retry: whether to take cells that another process claimed and did not finish. Only when none is running.

    Returns:
        Names of the cells that this call ran. A cell that raises stays undone and claimed by nobody; its error goes on.
    """
    ran = []
    for cell in read_manifest(folder):
        done, claim = folder / f"{cell.name}.json", folder / f"{cell.name}.claim"
        if done.exists():
            continue
        if retry:
            claim.unlink(missing_ok=True)
        try:
            handle = os.open(claim, os.O_CREAT | os.O_EXCL | os.O_WRONLY)
        except FileExistsError:
            continue
        try:
            os.write(handle, str(os.getpid()).encode())
            if not done.exists():
                _replace(done, json.dumps(function(**cell.arguments)) + "\n")
                ran.append(cell.name)
        finally:
            os.close(handle)
            with contextlib.suppress(FileNotFoundError):
                claim.unlink()
    return ran


def submit(executor: Executor, folder: Path, function: Callable[..., Any], jobs: int) -> list[Job]:
    """Have ``jobs`` processes of an executor share the manifest's cells.

    Jobs on a cluster that are lost, or stopped at their time limit, leave the cells that they finished: submit again,
    after ``run_cells(..., retry=True)`` or with the claims of the dead removed.

    Args:
        executor: where they run; all must see ``folder``.
        folder: with the manifest.
        function: of the module's top level, or a ``functools.partial`` of one, so that it can be sent.
        jobs: how many; each takes the next free cell until none is left.

    Returns:
        The executor's own jobs; ``result()`` of one gives the names of the cells that it ran.
    """
    return [executor.submit(run_cells, folder, function) for _ in range(jobs)]


def results(folder: Path) -> dict[str, Any]:
    """What is done so far, by cell, in the manifest's order."""
    done = {cell.name: folder / f"{cell.name}.json" for cell in read_manifest(folder)}
    return {name: json.loads(path.read_text()) for name, path in done.items() if path.exists()}


def _replace(path: Path, text: str) -> None:
    """Write so that a reader, or a process killed on the way, never sees half a file."""
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    part.write_text(text)
    os.replace(part, path)

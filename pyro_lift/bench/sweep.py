"""Sweeps: independent cells, done in any order by any number of processes, each cell once.

:func:`map_cells` runs cells in a pool of this machine's processes and hands back their results.

For sweeps that outlive a process there is a manifest. A cell is a name and its arguments. Its result is a JSON file
``NAME.json``, written under a temporary name and renamed, and that file is the mark that the cell is done. A process
that takes up a cell makes ``NAME.claim`` first, which only one can; the claim of a process that died is taken over by
``retry=True``. :func:`submit` hands the cells to an executor: a local pool of processes, or a cluster through submitit.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, wait
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar

import torch

__all__ = [
    "MANIFEST",
    "Cell",
    "Executor",
    "Job",
    "grid",
    "map_cells",
    "read_manifest",
    "results",
    "run_cells",
    "submit",
    "write_manifest",
]

R = TypeVar("R")

#: File of a folder with its cells.
MANIFEST = "manifest.json"


class Cell(NamedTuple):
    """One run: its name, a file's name too, and the keyword arguments it is run with."""

    name: str
    arguments: Mapping[str, Any]


class Job(Protocol):
    """A running job of an executor: a future of the standard library, a job of submitit."""

    def result(self) -> Any:
        """Wait, and return what was returned or raise what was raised."""


class Executor(Protocol):
    """``ProcessPoolExecutor`` of ``concurrent.futures``, ``submitit.AutoExecutor``, and what else has the verb."""

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Job:
        """Have a function called somewhere."""


def grid(**axes: Sequence[Any]) -> list[Cell]:
    """Return a cell for every combination; names are the values, joined by dashes.

    Example:
        >>> [cell.name for cell in grid(method=["lift", "maml"], seed=[0, 1])]
        ['lift-0', 'lift-1', 'maml-0', 'maml-1']
    """
    cells = []
    for values in product(*axes.values()):
        name = re.sub(r"[^\w.+-]", "_", "-".join(map(str, values)))
        cells.append(Cell(name, dict(zip(axes, values, strict=True))))
    return cells


# ------------------------------------------------------------------------------------------------ a pool of processes


def map_cells(
    function: Callable[..., R],
    cells: Sequence[Cell],
    *,
    workers: int,
    threads: int = 1,
    on_step: Callable[[int], Any] | None = None,
) -> Iterator[R]:
    """Call a function with each cell's arguments, in this process or in ``workers`` others.

    Args:
        function: of a module's top level, or a ``functools.partial`` of one, so that it can be sent.
        cells: in the order in which they are begun.
        workers: processes; 1 calls the function here, and leaves torch's threads alone.
        threads: of torch, in each of several processes.
        on_step: told of progress, in this process. The function then gets a keyword argument ``on_step``, to be
            called with the number of steps that it has made since.

    Yields:
        The results in the order of the cells, each as soon as it and those before it are there. Where a cell raises,
        so does this, at the cell's turn, and cells that have not begun are dropped.
    """
    if workers == 1 or len(cells) <= 1:
        told = {} if on_step is None else {"on_step": on_step}
        for cell in cells:
            yield function(**cell.arguments, **told)
        return
    context = multiprocessing.get_context("spawn")
    counter = context.Value("q", 0)
    told = {} if on_step is None else {"on_step": _count}
    with _pool(workers, context, (threads, counter)) as pool:
        futures = [pool.submit(function, **cell.arguments, **told) for cell in cells]
        seen = 0
        for future in futures:
            waiting = True
            while waiting:
                waiting = bool(wait([future], timeout=0.25).not_done)
                made = counter.value
                if on_step is not None and made > seen:
                    on_step(made - seen)
                    seen = made
            yield future.result()


_counter: Any = None


def _start_worker(threads: int, counter: Any) -> None:
    global _counter
    _counter = counter
    torch.set_num_threads(threads)


def _count(steps: int) -> None:
    with _counter.get_lock():
        _counter.value += steps


@contextlib.contextmanager
def _pool(workers: int, context: Any, arguments: tuple[Any, ...]) -> Iterator[ProcessPoolExecutor]:
    """Start a pool that drops what has not begun when something goes wrong, Ctrl-C included."""
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker, initargs=arguments)
    try:
        yield pool
    except BaseException:
        pool.shutdown(wait=False, cancel_futures=True)
        raise
    pool.shutdown()


# ------------------------------------------------------------------------------------------------ a manifest


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
    """Read the cells of a folder.

    Raises:
        ValueError: a folder without them.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise ValueError(f"{folder} holds no cells: {MANIFEST} is not there. Give the folder that they were run in.")
    return [Cell(entry["name"], entry["arguments"]) for entry in json.loads(path.read_text())]


def run_cells(
    folder: Path, function: Callable[..., Any], *, retry: bool = False, names: Sequence[str] | None = None
) -> list[str]:
    """Run every cell of the manifest that nobody has taken; several processes may do so at once.

    Args:
        folder: with the manifest.
        function: called with a cell's arguments; what it returns must be JSON.
        retry: whether to take cells that another process claimed and did not finish. Only when none is running.
        names: of the cells that may be run, in the order in which they are begun; None takes all, as they stand.

    Returns:
        Names of the cells that this call ran. A cell that raises stays undone and claimed by nobody; its error goes on.
    """
    ran = []
    cells = {cell.name: cell for cell in read_manifest(folder)}
    for cell in cells.values() if names is None else [cells[name] for name in names]:
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
    """Read the results so far, by cell, in the manifest's order."""
    done = {cell.name: folder / f"{cell.name}.json" for cell in read_manifest(folder)}
    return {name: json.loads(path.read_text()) for name, path in done.items() if path.exists()}


def _replace(path: Path, text: str) -> None:
    """Write so that a reader, or a process killed on the way, never sees half a file."""
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    part.write_text(text)
    os.replace(part, path)

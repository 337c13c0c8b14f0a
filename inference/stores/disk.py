"""Stores for more tasks than the device holds: in host memory, or in a file, with the next block read ahead.

A visit costs the same however many tasks there are: it touches its own block's rows, and the file is read and written
by one thread beside the computation. Neither the process's memory nor the device's grows with the number of tasks.
"""

from __future__ import annotations

import os
import tempfile
import weakref
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyro_lift.support.spans import span
from pyro_lift.support.transfers import Arrival, begin_to_host

__all__ = ["DiskStore"]


class _Place(NamedTuple):
    """Where a task's row lies in the file."""

    offset: int
    size: int
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return self.size * self.dtype.itemsize


class _Write(NamedTuple):
    """A row on its way to the file."""

    task: int
    row: Arrival
    done: Future[None]


def _close(thread: ThreadPoolExecutor, file: Any) -> None:
    """Close the file and end the thread, without waiting for anything.

    The collector may call this at any place, in the thread itself or in the midst of another store's ``submit``, whose
    lock is every executor's: so nothing is submitted here. Nothing needs to be, since what is queued holds the store.
    """
    file.close()
    thread.shutdown(wait=False)


class DiskStore:
    """Rows in a file; the next block is read ahead and the last is written behind, by one thread.

    The file has no name: it is gone with the process, however that ends. What is to outlive the process is saved as a
    checkpoint. Rows are read and written at their offsets, which like a map of the file goes through the system's page
    cache, and unlike one never counts as the process's own memory or makes the computation wait for a page.

    Laws. A row that is read is the last one written, whether it has reached the file or not; it is a copy. At most
    two blocks wait to be written; past that, ``write`` waits for the oldest.

    Args:
        num_tasks: N.
        folder: of the file; None takes the system's folder for temporary files.

    Raises:
        OSError: the file cannot be read or written, at the latest two visits later; names the folder and the task.
    """

    def __init__(self, num_tasks: int, folder: str | Path | None = None) -> None:
        self.folder = Path(folder or tempfile.gettempdir())
        self.folder.mkdir(parents=True, exist_ok=True)
        self._file = tempfile.TemporaryFile(dir=self.folder, prefix="pyro-lift-store-", buffering=0)  # noqa: SIM115
        self._places: list[_Place | None] = [None] * num_tasks
        self._end = 0
        self._device = torch.device("cpu")
        # One thread: a read that is asked for after a write comes after it.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="pyro-lift-store")
        self._queue: deque[_Write] = deque()
        self._waiting: dict[int, Arrival] = {}
        self._ahead: dict[int, Future[Tensor]] = {}
        self._process = os.getpid()
        # At the interpreter's end the executor's own hook finishes what is queued, and the file goes with the process.
        weakref.finalize(self, _close, self._thread, self._file).atexit = False

    def __getstate__(self) -> None:
        raise TypeError(f"{self!r} is a file of this process and cannot be sent to another; name a kind: store='disk'.")

    def _check_process(self) -> None:
        # A forked process would write into the same file, and its thread is gone.
        if os.getpid() != self._process:
            raise RuntimeError(
                f"{self!r} belongs to another process; each chain needs a store of its own: store='disk'."
            )

    def __len__(self) -> int:
        return len(self._places)

    def __repr__(self) -> str:
        return f"DiskStore(num_tasks={len(self)}, written={sum(1 for _ in self.tasks())}, folder={str(self.folder)!r})"

    def prefetch(self, tasks: Sequence[int]) -> None:
        """Begin to read rows that are asked for next."""
        for task in tasks:
            if self._places[task] is not None and task not in self._waiting and task not in self._ahead:
                self._ahead[task] = self._thread.submit(self._read, task)

    @span("pyro_lift.store")
    def read(self, tasks: Sequence[int]) -> list[Tensor]:
        """Copies of the rows of these tasks, in order; KeyError for one that was never written."""
        self._check_process()
        missing = [task for task in tasks if self._places[task] is None]
        if missing:
            raise KeyError(f"task {missing[0]} has no row yet.")
        self.prefetch(tasks)
        return [self._row(task) for task in tasks]

    def _row(self, task: int) -> Tensor:
        if task in self._waiting:
            # The stream that brings it to the host takes it back in order; nobody has to wait.
            return self._waiting[task].data.to(self._device, copy=True, non_blocking=True)
        return self._ahead.pop(task).result().to(self._device, non_blocking=True)

    @span("pyro_lift.store")
    def write(self, tasks: Sequence[int], rows: Sequence[Tensor]) -> None:
        """Replace the rows of these tasks, by copies."""
        self._check_process()
        for task, row in zip(tasks, rows, strict=True):
            self._ahead.pop(task, None)
            self._device = row.device
            waiting = begin_to_host(row.detach().reshape(-1))
            place = self._place(task, waiting.data)
            self._waiting[task] = waiting
            self._queue.append(_Write(task, waiting, self._thread.submit(self._write, task, place, waiting)))
        self._settle(2 * len(tasks))

    def flush(self) -> None:
        """Wait until everything is in the file."""
        self._settle(0)

    def _settle(self, leave: int) -> None:
        while len(self._queue) > leave or (self._queue and self._queue[0].done.done()):
            write = self._queue.popleft()
            write.done.result()
            if self._waiting.get(write.task) is write.row:
                del self._waiting[write.task]

    def _place(self, task: int, data: Tensor) -> _Place:
        """A task keeps its place; a row of another size gets a new one at the end."""
        place = self._places[task]
        if place is None or place.size != data.numel() or place.dtype != data.dtype:
            place = _Place(self._end, data.numel(), data.dtype)
            self._places[task] = place
            self._end += place.nbytes
        return place

    def _read(self, task: int) -> Tensor:
        place = self._places[task]
        assert place is not None
        row = torch.empty(place.size, dtype=place.dtype)
        self._transfer(os.preadv, task, place, row, "read")
        return row

    def _write(self, task: int, place: _Place, row: Arrival) -> None:
        self._transfer(os.pwritev, task, place, row.wait(), "written")

    def _transfer(self, move: Any, task: int, place: _Place, row: Tensor, what: str) -> None:
        array: Any = row.view(torch.uint8).numpy()
        buffer = memoryview(array)
        done = 0
        try:
            while done < place.nbytes:
                moved = move(self._file.fileno(), [buffer[done:]], place.offset + done)
                if moved == 0:
                    raise OSError(f"the file ends after {place.offset + done} bytes")
                done += moved
        except OSError as error:
            raise OSError(
                error.errno,
                f"disk store in {self.folder}: the row of task {task} could not be {what} ({error.strerror or error}). "
                "Make room, or give it a folder with room: store=DiskStore(num_tasks, folder=...)",
            ) from error

    def has(self, task: int) -> bool:
        """Whether this task has been written."""
        return self._places[task] is not None

    def tasks(self) -> Iterator[int]:
        """The tasks written so far, in order."""
        return (i for i, place in enumerate(self._places) if place is not None)

    @property
    def nbytes(self) -> int:
        """Bytes of the file."""
        return self._end

"""Where the tasks' own weights theta_i live between visits.

A store holds one flat row per task, of any length, and answers a few verbs: ``read``, ``write``, ``has``. It is not
part of the sampler's state tuple because it is too large to copy at every step; a visit reads the rows of its block,
and writes them back only when the whole visit has succeeded.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor

__all__ = ["DeviceStore", "ThetaStore", "make_store"]


class ThetaStore(Protocol):
    """What the sampler asks of a store."""

    def read(self, tasks: Sequence[int]) -> list[Tensor]:
        """The rows of these tasks, in order."""
        ...

    def write(self, tasks: Sequence[int], rows: Sequence[Tensor]) -> None:
        """Replace the rows of these tasks."""
        ...

    def has(self, task: int) -> bool:
        """Whether this task has been written."""
        ...

    def tasks(self) -> Iterator[int]:
        """The tasks written so far, in order."""
        ...


class DeviceStore:
    """Rows kept as tensors on the device they were written from.

    Args:
        num_tasks: N; a task index outside ``0 .. N - 1`` is an error.
    """

    def __init__(self, num_tasks: int) -> None:
        self._rows: list[Tensor | None] = [None] * num_tasks

    def __len__(self) -> int:
        return len(self._rows)

    def __repr__(self) -> str:
        return f"DeviceStore(num_tasks={len(self)}, written={sum(1 for _ in self.tasks())})"

    def read(self, tasks: Sequence[int]) -> list[Tensor]:
        """The rows of these tasks, in order; KeyError for one that was never written."""
        rows = []
        for task in tasks:
            row = self._rows[task]
            if row is None:
                raise KeyError(f"task {task} has no row yet.")
            rows.append(row)
        return rows

    def write(self, tasks: Sequence[int], rows: Sequence[Tensor]) -> None:
        """Replace the rows of these tasks; the tensors are kept, not copied."""
        for task, row in zip(tasks, rows, strict=True):
            self._rows[task] = row.detach()

    def has(self, task: int) -> bool:
        """Whether this task has been written."""
        return self._rows[task] is not None

    def tasks(self) -> Iterator[int]:
        """The tasks written so far, in order."""
        return (i for i, row in enumerate(self._rows) if row is not None)

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return sum(row.numel() * row.element_size() for row in self._rows if row is not None)


def make_store(kind: str | ThetaStore, num_tasks: int) -> ThetaStore:
    """A store by name (``"auto"``, ``"device"``), or the given one."""
    if not isinstance(kind, str):
        return kind
    return DeviceStore(num_tasks)


def row_sum(store: ThetaStore, part: slice) -> Tensor:
    """Sum over tasks of one part of the rows, in float64: S from scratch, for checks and for resuming."""
    total: Tensor | None = None
    for task in store.tasks():
        row = store.read([task])[0][part].double()
        total = row if total is None else total + row
    if total is None:
        raise ValueError("no task has been written yet.")
    return torch.as_tensor(total)

"""Stores in memory: rows on the device that computes, or pinned on the host."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from pyro_lift.support.spans import span
from pyro_lift.support.transfers import pinned_like

__all__ = ["DeviceStore", "HostStore", "RowList"]


class RowList:
    """A place for each task's row; reading and writing belong to the stores.

    Args:
        num_tasks: N; a task index outside ``0 .. N - 1`` is an error.
    """

    def __init__(self, num_tasks: int) -> None:
        self._rows: list[Tensor | None] = [None] * num_tasks

    def __len__(self) -> int:
        return len(self._rows)

    def __repr__(self) -> str:
        return f"{type(self).__name__}(num_tasks={len(self)}, written={sum(1 for _ in self.tasks())})"

    def _row(self, task: int) -> Tensor:
        row = self._rows[task]
        if row is None:
            raise KeyError(f"task {task} has no row yet.")
        return row

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


class DeviceStore(RowList):
    """Rows kept as tensors on the device they were written from.

    Rows of one length may also be read and written all at once, as one matrix: a chain that visits ten thousand short
    rows at a time would spend its time on lists of them.
    """

    def __init__(self, num_tasks: int) -> None:
        super().__init__(num_tasks)
        self._matrix: Tensor | None = None

    @span("pyro_lift.store")
    def read(self, tasks: Sequence[int]) -> list[Tensor]:
        """The rows of these tasks, in order; KeyError for one that was never written."""
        self._split()
        return [self._row(task) for task in tasks]

    @span("pyro_lift.store")
    def write(self, tasks: Sequence[int], rows: Sequence[Tensor]) -> None:
        """Replace the rows of these tasks; the tensors are kept, not copied."""
        self._split()
        for task, row in zip(tasks, rows, strict=True):
            self._rows[task] = row.detach()

    @span("pyro_lift.store")
    def read_all(self) -> Tensor | None:
        """All rows as one matrix ``[N, length]``; None where one was never written, or lengths differ."""
        if self._matrix is None:
            rows = [row for row in self._rows if row is not None]
            if len(rows) < len(self._rows) or len({(row.shape, row.dtype, row.device) for row in rows}) != 1:
                return None
            self._matrix, self._rows = torch.stack(rows), [None] * len(self)
        return self._matrix

    @span("pyro_lift.store")
    def write_all(self, matrix: Tensor) -> None:
        """Replace every row, by a matrix ``[N, length]`` that is kept, not copied.

        Raises:
            ValueError: not one row for each task.
        """
        if matrix.dim() != 2 or len(matrix) != len(self):
            raise ValueError(f"a matrix of shape {list(matrix.shape)} holds no row for each of {len(self)} tasks.")
        if self._matrix is None:
            self._rows = [None] * len(self)
        self._matrix = matrix.detach()

    def has(self, task: int) -> bool:
        """Whether this task has been written."""
        return self._matrix is not None or super().has(task)

    def tasks(self) -> Iterator[int]:
        """The tasks written so far, in order."""
        return iter(range(len(self))) if self._matrix is not None else super().tasks()

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        matrix = self._matrix
        return super().nbytes if matrix is None else matrix.numel() * matrix.element_size()

    def _split(self) -> None:
        """Take a matrix apart into rows, which one of is asked for."""
        if self._matrix is not None:
            self._rows, self._matrix = list(self._matrix.unbind(0)), None


class HostStore(RowList):
    """Rows in host memory, pinned where there is a CUDA device; given back on the device they were written from.

    Laws. Copies do not block. Both ways they go through the current stream of the device, so that a row is never read
    before it has arrived, nor overwritten before it has been read; a chain and its store belong to one stream.
    """

    def __init__(self, num_tasks: int) -> None:
        super().__init__(num_tasks)
        self._device = torch.device("cpu")

    @span("pyro_lift.store")
    def read(self, tasks: Sequence[int]) -> list[Tensor]:
        """Copies of the rows of these tasks, in order; KeyError for one that was never written."""
        rows = [self._row(task) for task in tasks]
        if self._device.type == "cpu":
            return [row.clone() for row in rows]
        # The same stream copies back and forth, so a row is never read before it has arrived.
        return [row.to(self._device, non_blocking=True) for row in rows]

    @span("pyro_lift.store")
    def write(self, tasks: Sequence[int], rows: Sequence[Tensor]) -> None:
        """Replace the rows of these tasks, by copies."""
        for task, row in zip(tasks, rows, strict=True):
            self._device = row.device
            place = self._rows[task]
            if place is None or place.shape != row.shape or place.dtype != row.dtype:
                place = pinned_like(row)
                self._rows[task] = place
            place.copy_(row.detach(), non_blocking=True)

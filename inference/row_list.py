"""What stores that keep each task's row as a tensor have in common."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

__all__ = ["RowList"]


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

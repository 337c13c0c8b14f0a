"""Where the tasks' own weights theta_i live between visits.

A store holds one flat row per task, of any length, and answers a few verbs: ``read``, ``write``, ``has``. It is not
part of the sampler's state tuple because it is too large to copy at every step; a visit reads the rows of its block,
and writes them back only when the whole visit has succeeded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from pyro_lift.inference.stores.disk import DiskStore
from pyro_lift.inference.stores.memory import DeviceStore, HostStore
from pyro_lift.support.memory import free_bytes

__all__ = [
    "DiskStore",
    "HoldsMatrix",
    "HostStore",
    "ReadsAhead",
    "ThetaStore",
    "check_own_store",
    "make_store",
    "read_ahead",
]


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


@runtime_checkable
class HoldsMatrix(Protocol):
    """A store that reads and writes the rows of all tasks at once."""

    def read_all(self) -> Tensor | None:
        """All rows ``[N, length]``; None where one was never written, or lengths differ."""
        ...

    def write_all(self, matrix: Tensor) -> None:
        """Replace every row."""
        ...


@runtime_checkable
class ReadsAhead(Protocol):
    """A store that can be told what is read next."""

    def prefetch(self, tasks: Sequence[int]) -> None:
        """Begin to read the rows of these tasks."""
        ...


def read_ahead(stores: Iterable[ThetaStore], blocks: Callable[[], Sequence[Tensor]]) -> None:
    """Let the stores that can do so begin to read the rows of some blocks, each an index of tasks ``[B]``."""
    able: list[ReadsAhead] = [store for store in stores if isinstance(store, ReadsAhead)]
    tasks = [task for index in blocks() for task in index.tolist()] if able else []
    for store in able:
        store.prefetch(tasks)


def make_store(
    kind: str | ThetaStore, num_tasks: int, row_bytes: int = 0, device: torch.device | str = "cpu"
) -> ThetaStore:
    """A store by name, or the given one.

    Args:
        kind: ``"device"``, ``"host"`` (pinned memory), ``"disk"``; ``"auto"`` takes the first of these that all rows
            fit into half the free memory of, the disk otherwise. A disk store in a folder of your choice is
            ``DiskStore(num_tasks, folder)``.
        num_tasks: N.
        row_bytes: of one task's row.
        device: that computes.
    """
    if not isinstance(kind, str):
        return kind
    device = torch.device(device)
    if kind == "auto":
        kind = _fitting(num_tasks * row_bytes, device)
    kinds: dict[str, Callable[[int], ThetaStore]] = {"device": DeviceStore, "host": HostStore, "disk": DiskStore}
    return kinds[kind](num_tasks)


def check_own_store(store: ThetaStore, num_tasks: int) -> None:
    """Refuse a store of the caller's that is of another size, or holds rows that another chain has written.

    Raises:
        TypeError: no store.
        ValueError: a store that this chain cannot begin with.
    """
    for verb in ("read", "write", "has", "tasks"):
        if not callable(getattr(store, verb, None)):
            raise TypeError(
                f"store={store!r} has no {verb}(); expected a kind by name, or a store such as HostStore(N)."
            )
    size = len(store) if isinstance(store, Sized) else num_tasks
    if size != num_tasks:
        raise ValueError(f"store={store!r} has {size} places; the program has {num_tasks} tasks.")
    if (task := next(iter(store.tasks()), None)) is not None:
        raise ValueError(
            f"store={store!r} holds rows already (task {task}): another chain has written them, and this one would "
            "begin with them. Give each chain a new store."
        )


def _fitting(needed: int, device: torch.device) -> str:
    if 2 * needed <= free_bytes(device):
        return "device"
    host = torch.device("cpu")
    return "host" if device != host and 2 * needed <= free_bytes(host) else "disk"


def row_sum(store: ThetaStore, part: slice) -> Tensor:
    """Sum over tasks of one part of the rows, in float64: S from scratch, for checks and for resuming."""
    total: Tensor | None = None
    for task in store.tasks():
        row = store.read([task])[0][part].double()
        total = row if total is None else total + row
    if total is None:
        raise ValueError("no task has been written yet.")
    return torch.as_tensor(total)

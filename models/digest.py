"""Digests of tasks and network: whether what was found of them before, or a chain over them, is of the same."""

from __future__ import annotations

import hashlib
from collections.abc import Container, Sequence

from torch import Tensor

from pyro_lift.models.adapters import RandomAdapter
from pyro_lift.models.peft_layers import adapter_tensors
from pyro_lift.models.task import Rows, Task

__all__ = ["digest", "digest_of_network", "digest_of_rows", "digests_of_tasks"]

#: Values of each parameter of the network that count.
VALUES = 1024


def digest(adapter: RandomAdapter, tasks: Sequence[Task]) -> str:
    """Return a hash of the tasks' training rows and of the network: the first values of each of its parameters.

    Args:
        adapter: the network and the start of its adapter.
        tasks: of a run.
    """
    seen = hashlib.blake2b(digest_size=16)
    for task in tasks:
        for tensor in _read(task.train):
            _take(seen, tensor)
    _take(seen, adapter.initial)
    _take_network(seen, adapter, without=())
    return seen.hexdigest()


def digest_of_network(adapter: RandomAdapter) -> str:
    """Return a short hash of the first values of each of the network's frozen parameters.

    Args:
        adapter: the network and the start of its adapter, which does not count.
    """
    seen = hashlib.blake2b(digest_size=8)
    _take_network(
        seen, adapter, without=frozenset(e.name for e in adapter.layout) | set(adapter_tensors(adapter.backbone))
    )
    return seen.hexdigest()


def digests_of_tasks(tasks: Sequence[Task]) -> dict[str, str]:
    """Return a hash of each task's training rows, and of the texts that all of them share, by the task's name.

    Args:
        tasks: of a run.
    """
    return {task.name: digest_of_rows(task.train) for task in tasks}


def digest_of_rows(*parts: Rows | None) -> str:
    """Return a short hash of some rows, and of what all of them share: one task's.

    Args:
        parts: of the task, in one order; None for a part that it does not have.
    """
    seen = hashlib.blake2b(digest_size=8)
    for rows in parts:
        for tensor in () if rows is None else (*_read(rows), *(rows.shared[name] for name in sorted(rows.shared))):
            _take(seen, tensor)
    return seen.hexdigest()


def _read(rows: Rows) -> tuple[Tensor, ...]:
    """Return the tensors of rows in one order."""
    return (*(rows.inputs[name] for name in sorted(rows.inputs)), rows.target)


def _take_network(seen: hashlib.blake2b, adapter: RandomAdapter, without: Container[str]) -> None:
    for name, parameter in adapter.backbone.named_parameters():
        if name not in without and type(parameter.data) is Tensor:  # others are quantised, and cannot be cut
            _take(seen, parameter.reshape(-1)[:VALUES])


def _take(seen: hashlib.blake2b, tensor: Tensor) -> None:
    """Let a hash see a tensor's shape, type and values; those of real numbers in double precision."""
    values = tensor.detach().cpu()
    values = values.double() if values.dtype.is_floating_point else values
    seen.update(repr((tuple(values.shape), str(values.dtype))).encode())
    seen.update(values.contiguous().numpy().tobytes())

"""A digest of tasks and network: whether what was found of them before is of the same."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from torch import Tensor

from pyro_lift.models.adapters import RandomAdapter
from pyro_lift.models.task import Task

__all__ = ["digest"]

#: Values of each parameter of the network that count.
VALUES = 1024


def digest(adapter: RandomAdapter, tasks: Sequence[Task]) -> str:
    """Return a hash of the tasks' training rows and of the network: the first values of each of its parameters.

    Args:
        adapter: the network and the start of its adapter.
        tasks: of a run.
    """
    seen = hashlib.blake2b(digest_size=16)

    def take(tensor: Tensor) -> None:
        values = tensor.detach().cpu()
        values = values.double() if values.dtype.is_floating_point else values
        seen.update(repr((tuple(values.shape), str(values.dtype))).encode())
        seen.update(values.contiguous().numpy().tobytes())

    for task in tasks:
        rows = task.train
        for tensor in (*(rows.inputs[name] for name in sorted(rows.inputs)), rows.target):
            take(tensor)
    take(adapter.initial)
    for _, parameter in adapter.backbone.named_parameters():
        if type(parameter.data) is Tensor:  # others are quantised, and cannot be cut
            take(parameter.reshape(-1)[:VALUES])
    return seen.hexdigest()

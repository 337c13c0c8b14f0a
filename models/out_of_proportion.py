"""Tasks out of all proportion to the others: inputs or losses so large that the rest of a family would not be heard."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from pyro_lift.models.task import Task

__all__ = ["far_above", "tasks_of_large_inputs"]

#: Times the median over tasks: a root mean square of inputs, and a loss in nats a row, that is out of proportion.
INPUTS, LOSS = 100.0, 20.0
#: A loss, in nats a row, below which none is held to be large.
LEAST_LOSS = 1.0


def tasks_of_large_inputs(tasks: Sequence[Task]) -> dict[str, float]:
    """Return how many times the median over tasks a task's inputs are large, for those far above it, by name.

    Args:
        tasks: of one family; inputs of real numbers are looked at, by their root mean square.
    """
    found: dict[str, float] = {}
    sizes_of: dict[str, dict[str, float]] = {}
    for task in tasks:
        for key, x in task.train.inputs.items():
            if x.is_floating_point() and x.numel():
                sizes_of.setdefault(key, {})[task.name] = float(x.double().square().mean().sqrt())
    for sizes in sizes_of.values():
        middle = statistics.median(sizes.values())
        for name, size in sizes.items():
            if middle > 0.0 and size > INPUTS * middle:
                found[name] = max(size / middle, found.get(name, 0.0))
    return found


def far_above(losses: Sequence[float], chance: Sequence[float]) -> list[int]:
    """Return the places of losses far above the median of all and that of chance; never most of them.

    Args:
        losses: nats a row, one a task.
        chance: of a prediction that ignores its input, likewise.
    """
    if len(losses) < 3:
        return []
    middle, guess = (statistics.median(map(abs, values)) for values in (losses, chance))
    limit = LOSS * max(middle, guess, LEAST_LOSS)
    return [k for k, loss in enumerate(losses) if loss > limit]

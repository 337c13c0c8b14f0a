"""Tasks out of all proportion to the others: inputs or losses so large that the rest of a family would not be heard."""

from __future__ import annotations

import logging
import statistics
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch

from pyro_lift.models.rows import some_rows
from pyro_lift.models.task import Rows, Task

__all__ = [
    "InputSize",
    "far_above",
    "large_columns",
    "sizes_of_inputs",
    "tasks_of_large_inputs",
    "usual_sizes",
    "warn_of_other_sizes",
    "warn_of_tasks_of_other_sizes",
]

log = logging.getLogger("pyro_lift")

#: Times the median over tasks: a root mean square of inputs, and a loss in nats a row, that is out of proportion.
INPUTS, LOSS = 100.0, 20.0
#: Times the median over a table's columns that one of them is out of proportion, by root mean square.
COLUMN = 1000.0
#: A loss, in nats a row, below which none is held to be large.
LEAST_LOSS = 1.0
#: Times that new rows are as large as a task's own, or the inverse, before they are in another scale: in root mean
#: square and in their largest number. Pictures of 0 to 255 are 80 to 250 times as large as normalised ones.
SIZE, LARGEST = 20.0, 10.0
#: Rows of a task that are looked at for it; numbers that new ones have to have before they are held to be too small.
ROWS, NUMBERS = 64, 64


class InputSize(NamedTuple):
    """How large an input of real numbers is: its root mean square, and its largest absolute value."""

    size: float
    largest: float


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


def large_columns(tasks: Sequence[Task]) -> dict[str, tuple[int, float]]:
    """Return the largest column of tables ``[n, d]`` that is out of proportion, and how many times the median it is.

    Args:
        tasks: of one family; columns are looked at over all of them, by their root mean square.
    """
    found = {}
    for key, first in tasks[0].train.inputs.items():
        parts = [task.train.inputs[key] for task in tasks if key in task.train.inputs]
        if first.dim() != 2 or not all(x.is_floating_point() and x.shape[1:] == first.shape[1:] for x in parts):
            continue
        squares = sum(x.double().square().sum(0) for x in parts) / sum(len(x) for x in parts)
        sizes = torch.as_tensor(squares).sqrt()
        middle, place = sizes.median(), int(sizes.argmax())
        if middle > 0.0 and sizes[place] > COLUMN * middle:
            found[key] = (place, float(sizes[place] / middle))
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


def sizes_of_inputs(rows: Rows) -> dict[str, InputSize]:
    """Return how large the inputs of real numbers are, by name, of at most 64 rows."""
    found = {}
    for key, x in some_rows(rows, ROWS).inputs.items():
        if x.is_floating_point() and x.numel():
            values = x.detach().float()
            found[key] = InputSize(float(values.square().mean().sqrt()), float(values.abs().max()))
    return found


def warn_of_other_sizes(rows: Rows, known: Mapping[str, InputSize], task: str) -> None:
    """Say in the log where rows to predict are in another scale than a task's own: pictures that were not normalised.

    Args:
        rows: to predict.
        known: of the task's own rows (:func:`sizes_of_inputs`); empty where nobody knows.
        task: its name.
    """
    for key, times in _other_sizes(rows, known).items():
        log.warning(
            "%s to predict %.3g times as large as the rows of task %r (root mean square there %.3g): they look to be "
            "in another scale, as pictures of 0 to 255 are beside normalised ones, and predictions will be wrong. "
            "Prepare them as the task's own rows were.",
            f"{key!r}:" if key else "inputs", times, task, known[key].size,
        )  # fmt: skip


def usual_sizes(tasks: Sequence[Task]) -> dict[str, InputSize]:
    """Return how large inputs of real numbers are in most tasks: the medians over those that have them, by name."""
    found: dict[str, list[InputSize]] = {}
    for task in tasks:
        for key, size in sizes_of_inputs(task.train).items():
            found.setdefault(key, []).append(size)
    return {key: InputSize(*map(statistics.median, zip(*sizes, strict=True))) for key, sizes in found.items()}


def warn_of_tasks_of_other_sizes(tasks: Sequence[Task], known: Mapping[str, InputSize]) -> None:
    """Say in the log which new tasks have inputs in another scale than those that a prior was learned from.

    Args:
        tasks: new ones.
        known: :func:`usual_sizes` of those that were learned from; empty where nobody knows.
    """
    for task in tasks:
        for key, times in _other_sizes(task.train, known).items():
            log.warning(
                "task %r: %s %.3g times as large as those of the tasks that the prior was learned from (root mean "
                "square there %.3g): they look to be in another scale, in which what was learned says little. Prepare "
                "them as those were.",
                task.name, f"{key!r}" if key else "inputs", times, known[key].size,
            )  # fmt: skip


def _other_sizes(rows: Rows, known: Mapping[str, InputSize]) -> dict[str, float]:
    """Return how many times as large as they should be inputs are that are in another scale, by name."""
    found = {}
    for key, new in (sizes_of_inputs(rows) if known else {}).items():
        own = known.get(key)
        if own is None or not own.size > 0.0 or not new.size > 0.0:
            continue
        larger = new.size > SIZE * own.size and new.largest > LARGEST * own.largest
        smaller = SIZE * new.size < own.size and LARGEST * new.largest < own.largest
        if larger or (smaller and rows.inputs[key].numel() >= NUMBERS):
            found[key] = new.size / own.size
    return found

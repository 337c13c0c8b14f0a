"""What is held out: tasks that meta-training does not see, and rows of a task that adaptation does not see."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import TypeVar

import torch
from torch import Tensor

from pyro_lift.models.task import Rows, Task

__all__ = ["can_be_judged", "dealt", "drawn_rows", "has_unseen_rows", "judged", "that_can_be_judged"]

from pyro_lift.support.wording import some_tasks

log = logging.getLogger("pyro_lift")

T = TypeVar("T")

#: Rows of a task of tokens that are judged at most: their probabilities are [rows, tokens, vocabulary].
TOKEN_ROWS = 16
#: Fraction of a task's rows that it is judged by where it has no test rows.
JUDGED_SHARE = 1 / 3


def dealt(items: Sequence[T], parts: int) -> list[list[T]]:
    """Deal items into parts in turn: neighbours in a list of tasks are often relatives.

    Example:
        >>> dealt("abcde", 2)
        [['a', 'c', 'e'], ['b', 'd']]
    """
    return [[item for place, item in enumerate(items) if place % parts == k] for k in range(parts)]


def has_unseen_rows(task: Task) -> bool:
    """Whether a task has test or dev rows, which nothing is ever trained on."""
    return task.test is not None or task.dev is not None


def can_be_judged(task: Task) -> bool:
    """Whether a task has test or dev rows, or rows enough that some can be kept from adaptation."""
    return has_unseen_rows(task) or len(task.train) > 1


def that_can_be_judged(tasks: Sequence[Task], instead: str) -> list[Task]:
    """Return the tasks that can be judged; the others, each of a single row, are warned of by name.

    Args:
        tasks: that are to be judged.
        instead: what becomes of the others, for the warning.
    """
    left_out = [task.name for task in tasks if not can_be_judged(task)]
    if left_out:
        log.warning("%s", told_unjudged(left_out, instead))
    return [task for task in tasks if can_be_judged(task)]


def told_unjudged(names: Sequence[str], instead: str) -> str:
    """Say that tasks have one row each, and what becomes of them."""
    one = len(names) == 1
    return (
        f"{some_tasks(names)} {'has' if one else 'have'} one row, and no test rows: there is "
        f"none left to be judged by. {'It is' if one else 'They are'} {instead}. Give more rows, or test=."
    )


def judged(task: Task, most: int) -> Task:
    """Return the task with the test rows that it is judged by: its own, else its dev rows, else a part of its rows.

    Args:
        task: of any kind.
        most: rows to be judged by, at most; of several they are drawn with a fixed seed.

    Raises:
        ValueError: a single row.
    """
    most = min(most, TOKEN_ROWS) if task.kind == "tokens" else most
    rows = task.test or task.dev
    if rows is not None:
        return replace(task, test=drawn_rows(rows, most))
    if len(task.train) < 2:
        raise ValueError(f"task {task.name!r} has one row: there is none left to be judged by.")
    order = _order(task.train)
    count = min(max(round(JUDGED_SHARE * len(order)), 1), most)
    return replace(task, train=_some(task.train, order[count:]), test=_some(task.train, order[:count]))


def drawn_rows(rows: Rows, most: int) -> Rows:
    """Draw at most so many rows with a fixed seed; they keep their order."""
    return _some(rows, _order(rows)[:most])


def _order(rows: Rows) -> Tensor:
    return torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))


def _some(rows: Rows, index: Tensor) -> Rows:
    return rows.take(index.sort().values.to(rows.target.device))

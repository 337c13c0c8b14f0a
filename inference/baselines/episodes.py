"""Episodes of meta-training: a task's rows halved anew at each visit, and the heads that tasks keep."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from pyro_lift.inference.adaptation.gradients import Weights
from pyro_lift.inference.adaptation.update_rules import UpdateRule, adam
from pyro_lift.inference.baselines.protocol import Budget
from pyro_lift.models.adapters import RandomAdapter
from pyro_lift.models.observation import check_width
from pyro_lift.models.task import Rows, Task

__all__ = ["Episode", "Heads", "check_tasks", "episodes"]


class Episode(NamedTuple):
    """One visit: the task, and disjoint random halves of its training rows."""

    number: int
    task: Task
    support: Rows
    query: Rows


def episodes(tasks: Sequence[Task], generator: torch.Generator) -> Iterator[Episode]:
    """Yield tasks in turn for ever, halved anew at each visit; a query row in the support would reward memorising.

    Raises:
        ValueError: a task with a single row.
    """
    for task in tasks:
        if len(task.train) < 2:
            raise ValueError(
                f"task {task.name!r} has one training row: an episode needs one to learn, one to judge by."
            )
    while True:
        for index, task in enumerate(tasks):
            order = torch.randperm(len(task.train), generator=generator).to(task.train.target.device)
            half = (len(order) + 1) // 2
            yield Episode(index, task, task.train.take(order[:half]), task.train.take(order[half:]))


class Heads:
    """Per-task heads during meta-training; they are not part of the learned initialisation."""

    def __init__(self, adapter: RandomAdapter, tasks: Sequence[Task], budget: Budget, learning_rate: float) -> None:
        self.policy = budget.heads.fitted(adapter, tasks)
        self.rule: UpdateRule = adam(self.policy.lr_scale * learning_rate)
        width = check_width(adapter, tasks, self.policy.scale)
        self.values = [self.policy.fresh(task, width, adapter.initial) for task in tasks]
        self._states = [None if head is None else self.rule.init(head) for head in self.values]
        self._rows = [len(task.train) for task in tasks]

    def weights(self, index: int, theta: Tensor) -> Weights:
        """Join shared adapter weights with one task's head."""
        return Weights(theta, self.values[index])

    def update(self, index: int, gradient: Tensor | None) -> None:
        """Take one step of one task's head, its prior included; without a head do nothing."""
        head = self.values[index]
        if head is None or gradient is None or self.policy.prior is None:
            return
        mean, precision = self.policy.prior
        gradient = gradient + precision * (head - mean) / self._rows[index]
        self.values[index], self._states[index] = self.rule.update(head, gradient, self._states[index])


def check_tasks(tasks: Sequence[Task], device: torch.device) -> list[Task]:
    """Move the tasks to the adapter's device; raise if there are none."""
    if not tasks:
        raise ValueError("tasks is empty: there is nothing to train on.")
    return [task.to(device) for task in tasks]

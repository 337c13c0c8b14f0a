r"""How much of a head of all tasks is right for one that it has not seen.

A head that is solved on the rows of all tasks is too sure of a single one, the more so the less these are alike: what
is predicted of a new task is the average over heads, not their average's. So a share a of it is taken,

.. math:: \bar w_a = a\, \bar w, \qquad a = \arg\max_a \sum_i \log p\big(y_i \mid x_i, a\, \bar w_{-i}\big),

by what it alone predicts of tasks that it has not seen.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from pyro_lift.models.head_problem import apply_head
from pyro_lift.tuning.usual_priors import Asked

__all__ = ["SHARES", "best_share", "with_share"]

#: Of the head of all tasks, what is tried.
SHARES = (0.25, 0.35, 0.5, 0.7, 1.0)


def best_share(asked: Sequence[Asked]) -> tuple[float, Tensor]:
    """Return the share that is best, and what it then tells of each task, nats a row over even classes, ``[N]``.

    Args:
        asked: tasks, each with the head of others.
    """
    told = torch.stack([torch.tensor([_by_head_alone(task, share) for share in SHARES]) for task in asked])
    best = int(told.mean(0).argmax())
    return SHARES[best], told[:, best]


def with_share(task: Asked, share: float) -> Asked:
    """Return a task with a share of its head; the same where it has none."""
    return task if task.around is None else task._replace(around=share * task.around)


def _by_head_alone(task: Asked, share: float) -> float:
    """Return the log probability of a task's rows by a share of the head, a row, over that of even classes."""
    around = with_share(task, share).around
    assert around is not None
    told = apply_head(task.features.double(), around.double()).log_softmax(-1)
    return float(told.gather(-1, task.target.unsqueeze(-1)).mean()) + math.log(task.num_classes)

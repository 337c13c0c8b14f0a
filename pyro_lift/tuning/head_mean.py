r"""The head that heads of tasks' own stand around, where the tasks share their classes.

Tasks whose classes are the same have heads that are alike, and a head that is solved on twenty rows alone knows nothing
of that. So one head is solved on the rows of all tasks, on the untouched network's features, and the prior of a task's
own head is put around it,

.. math:: w_c \sim \mathcal N(\bar w_c, s^2 I) \quad\text{in place of}\quad \mathcal N(0, s^2 I),

with the width s still chosen by the task's own rows (:mod:`~pyro_lift.models.heads`). Whether classes of the same
number are the same classes only the tasks can tell: the head of one half of them is tried on those of the other, by the
log probability of rows that were left out, and taken where it predicts them better by the one-sided test at 5 %.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from pyro_lift.models.adapters import RandomAdapter
from pyro_lift.models.features import all_features
from pyro_lift.models.head_choice import choose_head
from pyro_lift.models.heads import HeadModel, choose_prior_sd, solve_head
from pyro_lift.models.observation import network_output
from pyro_lift.models.task import Task
from pyro_lift.tuning.halves import FEWEST_TASKS, is_above_zero, paired
from pyro_lift.tuning.held_out import dealt

__all__ = ["HeadMean", "head_mean", "may_share_classes"]

log = logging.getLogger("pyro_lift")

#: Tasks of each half that are judged, rows that the head is solved on, and rows that choose its width, at most.
JUDGED, ROWS, CHOOSING = 32, 20_000, 1_000


class HeadMean(NamedTuple):
    """A head of all tasks.

    Attributes:
        head: ``[C, E + 1]`` on the untouched network's features, the bias last.
        gain: mean over tasks of the log probability of left-out rows that it adds, nats a row.
        error: its standard error.
    """

    head: Tensor
    gain: float
    error: float

    def results(self) -> dict[str, float]:
        """Measures for the prior's folder and card."""
        return {"gain of heads around one of all tasks, nats a row": self.gain}


def may_share_classes(tasks: Sequence[Task]) -> bool:
    """Whether tasks are classifications of as many classes, of the same names where they have names."""
    alike = {(task.kind, task.num_classes) for task in tasks}
    names = {tuple(task.labels) for task in tasks if task.labels is not None}
    return len(tasks) >= FEWEST_TASKS and len(alike) == 1 and tasks[0].kind == "classification" and len(names) <= 1


@torch.no_grad()
def head_mean(adapter: RandomAdapter, tasks: Sequence[Task]) -> HeadMean | None:
    """Solve one head on the rows of all tasks; None where heads of the tasks' own are as good without it.

    Args:
        adapter: the network as a function of theta; its output is features.
        tasks: of meta-training, on its device.
    """
    if not may_share_classes(tasks):
        return None
    classes = tasks[0].num_classes
    assert classes is not None
    share = max(ROWS // len(tasks), 1)
    halves = [[_read(adapter, task, share) for task in half] for half in dealt(tasks, 2)]
    gains = []
    for seen, unseen in (halves, halves[::-1]):
        around = _pooled(seen, classes)
        for x, y in unseen[:JUDGED]:
            own, shared = (choose_head(x, y, classes, around=head).score for head in (None, around))
            gains.append(shared - own)
    told = torch.tensor(gains, dtype=torch.float64)
    told = told[told.isfinite()]  # a task of one row has none to judge its head by
    if len(told) < 2 or not is_above_zero(told):
        return None
    gain, error = paired(told)
    log.info(
        "the tasks share their classes: heads of their own stand around one head of all tasks' rows (%+.3f ± %.3f nats "
        "a row, on tasks that it has not seen).", gain, error,
    )  # fmt: skip
    return HeadMean(_pooled([pair for half in halves for pair in half], classes), gain, error)


def _read(adapter: RandomAdapter, task: Task, most: int) -> tuple[Tensor, Tensor]:
    """Read the features and the targets of some rows of a task; of more rows than these they are drawn."""
    rows = task.train
    if len(rows) > most:
        chosen = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))[:most].sort().values
        rows = rows.take(chosen.to(rows.target.device))
    return all_features(adapter, rows, adapter.initial, network_output), rows.target


def _pooled(pairs: Sequence[tuple[Tensor, Tensor]], classes: int) -> Tensor:
    x, y = (torch.cat(parts) for parts in zip(*pairs, strict=True))
    model = HeadModel(classes)
    some = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))[:CHOOSING].to(x.device)
    width = choose_prior_sd(x[some], y[some], model).sd
    return solve_head(x, y, model, prior_sd=width).head

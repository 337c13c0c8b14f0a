r"""Whether classes that share no head are better off with one where rows are few, as the tasks say it at phi.

The head of four fifths of the tasks is tried on the others with 1, 2, 4, ... of their rows, each time under the prior
that all tasks choose together around it, against zero under the one that they choose there. It is taken where
it predicts the others of a single row better by the one-sided test at 5 %
(:func:`~pyro_lift.tuning.halves.is_above_zero`), and then for as many rows as it does so in the mean.

A head that is solved on the rows of all tasks is too sure of a single one, the more so the less tasks are alike: what
is predicted of a new task is the average over heads, not their average's. So it is multiplied by the one of
:data:`SHARES` that is best for a single row.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch
from torch import Tensor

from pyro_lift.models.adapters import RandomAdapter
from pyro_lift.models.class_head import ClassHead
from pyro_lift.models.few_classes import FewClasses
from pyro_lift.models.heads import FewRows, UsualPrior
from pyro_lift.models.task import Task
from pyro_lift.support.evenly import spread_evenly
from pyro_lift.tuning.halves import FEWEST_TASKS, is_above_zero, paired
from pyro_lift.tuning.head_mean import asked_of_parts, pooled_head, shared_classes
from pyro_lift.tuning.usual_priors import FEW_ASKED, MOST_FEW, Asked, usual_prior, with_few

__all__ = ["with_few_classes"]

#: Of the head of all tasks, what is tried.
SHARES = (0.25, 0.35, 0.5, 0.7, 1.0)

log = logging.getLogger("pyro_lift")


@torch.no_grad()
def with_few_classes(
    mean: ClassHead | None, adapter: RandomAdapter, tasks: Sequence[Task], theta: Tensor
) -> ClassHead | None:
    """Give heads of classes that share none one for tasks of few rows, where it helps these; others stay as they are.

    Args:
        mean: what the tasks share.
        adapter: the network as a function of theta; its output is features.
        tasks: of meta-training, on its device.
        theta: phi, ``[D]``.
    """
    classes = shared_classes(tasks)
    if mean is None or mean.usual is None or len(mean.head) > 0 or classes is None:
        return mean
    reads, asked = asked_of_parts(adapter, tasks, theta, classes)
    share, priors = _helped(asked)
    if not priors:
        return mean
    whole = pooled_head(reads, classes)
    return mean._replace(few_classes=FewClasses(share * whole.head, whole.labels, priors))


def _helped(asked: Sequence[Asked]) -> tuple[float, FewRows]:
    """Return the share of a head of all tasks that is best, the numbers of rows that it helps, and their priors."""
    able = [task for task in asked if len(task.target) > 1]
    if len(able) < FEWEST_TASKS:
        return 1.0, ()
    some = spread_evenly(able, FEW_ASKED)
    told = [float(torch.stack([_with_a_row(task, share, k) for k, task in enumerate(some)]).mean()) for share in SHARES]
    share = SHARES[told.index(max(told))]
    near = [_around(task, share) for task in asked]
    found: list[tuple[int, UsualPrior]] = []
    number = 1
    while number <= MOST_FEW:
        few = [(k, task) for k, task in enumerate(spread_evenly(near, FEW_ASKED)) if len(task.target) >= 2 * number]
        if len(few) < FEWEST_TASKS:
            break
        usual, around = usual_prior([with_few(task, number, seed) for seed, task in few])
        _, alone = usual_prior([with_few(task._replace(around=None), number, seed) for seed, task in few])
        gain = around - alone
        if usual is None or not (is_above_zero(gain) if not found else float(gain.mean()) > 0.0):
            break
        log.info(
            "tasks of %d row%s have a head around one of all tasks: %+.3f ± %.3f nats a row.",
            number, "" if number == 1 else "s", *paired(gain),
        )  # fmt: skip
        found.append((number, usual))
        number *= 2
    return share, tuple(found)


def _with_a_row(task: Asked, share: float, seed: int) -> Tensor:
    """Return the log probability of a task's other rows, a row, by one and a share of the head, at its best prior."""
    return with_few(_around(task, share), 1, seed).max()


def _around(task: Asked, share: float) -> Asked:
    return task if task.around is None else task._replace(around=share * task.around)

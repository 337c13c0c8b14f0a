r"""Whether classes that share no head are better off with one where rows are few, as the tasks say it at phi.

The head of four fifths of the tasks is tried on the others, a share of it (:mod:`~pyro_lift.tuning.head_share`). Where
that alone is better than even classes by the one-sided test at 5 % (:func:`~pyro_lift.tuning.halves.is_above_zero`),
tasks are asked with 1, 2, 4, ... of their rows, under the prior that they choose together around it, and against zero
under the one that they choose there. It is taken for as many rows, from one on, as it predicts the others better in the
mean.
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
from pyro_lift.tuning.head_mean import asked_of_parts, pooled_head, read_tasks, shared_classes
from pyro_lift.tuning.head_share import best_share, with_share
from pyro_lift.tuning.usual_priors import FEW_ASKED, MOST_FEW, Asked, usual_prior, with_few

__all__ = ["with_few_classes"]

#: Rows of a task that are looked at, or twice as many as it is asked with.
JUDGED = 40

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
    of_parts = asked_of_parts(read_tasks(adapter, tasks, theta), classes)
    share, priors = _helped(of_parts.asked)
    if not priors:
        return mean
    whole = pooled_head(of_parts.reads, classes)
    return mean._replace(few_classes=FewClasses(share * whole.head, whole.labels, priors))


def _helped(asked: Sequence[Asked]) -> tuple[float, FewRows]:
    """Return the share of a head of all tasks that is best, the numbers of rows that it helps, and their priors."""
    some = [task for task in spread_evenly(asked, FEW_ASKED) if len(task.target) > 1 and task.around is not None]
    if len(some) < FEWEST_TASKS:
        return 1.0, ()
    share, told = best_share(some)
    if not is_above_zero(told):
        return 1.0, ()
    some = [with_share(task, share) for task in some]
    found: list[tuple[int, UsualPrior]] = []
    number = 1
    while number <= MOST_FEW:
        able = [(k, task) for k, task in enumerate(some) if len(task.target) >= 2 * number]
        few = [(k, task.at_most(max(2 * number, JUDGED))) for k, task in able]
        if len(few) < FEWEST_TASKS:
            break
        usual, around = usual_prior([with_few(task, number, seed) for seed, task in few])
        _, alone = usual_prior([with_few(task._replace(around=None), number, seed) for seed, task in few])
        gain = around - alone
        if usual is None or not float(gain.mean()) > 0.0:
            break
        log.info(
            "tasks of %d row%s have a head around one of all tasks: %+.3f ± %.3f nats a row.",
            number, "" if number == 1 else "s", *paired(gain),
        )  # fmt: skip
        found.append((number, usual))
        number *= 2
    return share, tuple(found)

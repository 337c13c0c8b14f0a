r"""A head of all tasks that new tasks of few rows stand around, where one of many rows is better off around zero.

Tasks whose classes are the same, but whose maps differ much, have heads that twenty rows know better than a head of all
tasks does. Of one row or two that head is most of what there is to know,

.. math:: w_c \sim \mathcal N(\bar w_c, s_n^2 I) \quad (n \le n^*), \qquad
          w_c \sim \mathcal N(0, s^2 I) \quad (n > n^*),

with the standard deviations s_n that tasks say for each number of rows n, up to the most of which it helps, n*
(:mod:`~pyro_lift.tuning.few_classes`). It is solved at phi, on whose features it stands.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from pyro_lift.models.heads import FewRows, UsualPrior, between
from pyro_lift.models.task import Task, head_outputs

__all__ = ["FewClasses", "rows_of_classes"]


class FewClasses(NamedTuple):
    """A head for tasks of few rows.

    Attributes:
        head: ``[C, E + 1]``, the bias last.
        labels: names of the C classes; none where they have only numbers.
        priors: numbers of rows, rising, and the prior of heads of so many around it; the last is the most that it is
            of.
    """

    head: Tensor
    labels: tuple[str, ...]
    priors: FewRows

    @property
    def most(self) -> int:
        """The most rows that a task around it has."""
        return self.priors[-1][0]

    def of(self, task: Task) -> Tensor | None:
        """Return the rows of a task's classes, in its own order; None where it has others, or more rows."""
        if len(task.train) > self.most:
            return None
        return rows_of_classes(self.head, self.labels, task)

    def usual_of(self, rows: int) -> UsualPrior:
        """Return the prior of a head of so many rows."""
        return between(self.priors, rows)


def rows_of_classes(head: Tensor, labels: tuple[str, ...], task: Task) -> Tensor | None:
    """Return the rows of a head that are of a task's classes, in its own order; None where it has others.

    Classes go by their names where both have names, else by their numbers.
    """
    if labels and task.labels is not None:
        if not set(task.labels) <= set(labels):
            return None
        return head[[labels.index(name) for name in task.labels]]
    return head if head_outputs(task) == len(head) else None

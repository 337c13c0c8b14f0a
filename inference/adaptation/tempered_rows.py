r"""The rows that a temperature of predictions was found at, and what of it holds for a task that has fewer, or more.

A temperature below 1 says that predictions were right more often than they were sure. That is said of tasks of so many
rows. Of two or three rows a head may be wrong and sure of it, and a class that has none of them has little probability,
which a temperature below 1 makes nothing. So with n rows where there were :math:`n_0`,

.. math:: \log T(n) = t \log T, \qquad t = \min\big(1, \max(0, 1 + \log_2 (n / n_0))\big)

and none where more of the task's classes have no row than had then. A temperature above 1 is of no harm there. It says
that predictions were surer than right, and a posterior of many rows is less so. From :data:`MANY_MORE` times the rows
on it holds less,

.. math:: t = \min\big(1, 4\, n_0 / n\big).

That of a regression, whose variance knows of its rows, holds for all.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import median
from typing import NamedTuple

from torch import Tensor

from pyro_lift.inference.adaptation.class_rates import class_counts
from pyro_lift.models.task import Task

__all__ = ["MANY_MORE", "TemperedRows", "tempered_rows"]


#: Times the rows that it was found at, from which on a temperature above 1 holds less.
MANY_MORE = 4.0


class TemperedRows(NamedTuple):
    """What tasks had from which the predictions were made that a temperature was fitted to.

    Attributes:
        rows: of a task, the median over them.
        unseen: share of its classes that have no row, the median over them.
        many_more: times the rows, from which on a temperature above 1 holds less; 0, as of priors that were saved
            without: it holds for any number.
    """

    rows: float
    unseen: float
    many_more: float = 0.0

    def holds(self, temperature: float, task: Task) -> float:
        """Return what a temperature is of a task's predictions.

        Args:
            temperature: T, of tasks that have such rows.
            task: with its training rows.
        """
        rows = len(task.train)
        if temperature == 1.0 or task.kind == "regression":
            return temperature
        if temperature > 1.0:
            most = self.many_more * self.rows
            return temperature if most == 0.0 or rows <= most else math.pow(temperature, most / rows)
        if rows == 0 or _unseen(class_counts(task)) > self.unseen:
            return 1.0
        return math.pow(temperature, min(1.0, max(0.0, 1.0 + math.log2(rows / self.rows))))


def tempered_rows(tasks: Sequence[Task], *, fades: bool = True) -> TemperedRows | None:
    """Say what rows some tasks have; None where that is none.

    Args:
        tasks: by which a temperature is found.
        fades: whether it holds less for many more rows; in runs of before it did not.
    """
    rows = median([len(task.train) for task in tasks]) if tasks else 0.0
    if not rows:
        return None
    unseen = median([_unseen(class_counts(task)) for task in tasks])
    return TemperedRows(float(rows), unseen, MANY_MORE if fades else 0.0)


def _unseen(counts: Tensor | None) -> float:
    """Compute the share of classes without a row; none where rows do not share their classes."""
    return 0.0 if counts is None or not len(counts) else float((counts == 0).double().mean())

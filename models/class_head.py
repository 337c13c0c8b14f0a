"""A head of classes or values that several tasks share, classes by their names where they have names."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from pyro_lift.models.few_classes import FewClasses, rows_of_classes
from pyro_lift.models.few_values import FewValues
from pyro_lift.models.heads import BIAS_SD, FewRows, UsualPrior, between
from pyro_lift.models.task import Task

__all__ = ["ClassHead", "are_alike"]

#: Times the rows by which tasks chose the prior of their heads, from which on a task knows its own biases.
MANY_MORE = 4


class ClassHead(NamedTuple):
    """A linear head, and which classes its rows are of.

    Attributes:
        head: ``[C, E + 1]``, the bias last; of regressions a row for each of their values, none where they share none.
        labels: names of the C classes; none where they have only numbers.
        width: of regressions, where the ratios of their heads' priors stand (:func:`.best_width`); of classes, the
            standard deviation of a logit.
        feature_sd: of regressions, standard deviation of each feature over the rows of all tasks, ``[E]``; None in
            priors that were saved without it.
        around_width: of regressions that share a head, where the ratios of their heads' priors stand around it; None
            where each task chooses it by its own rows, as of priors that were saved without it.
        bias_sd: of classes, standard deviation of a bias; None where each task chooses its width by its own rows, as of
            priors that were saved without it.
        rows: that :attr:`width` and :attr:`bias_sd` are of: the usual number of the tasks that chose them; 0 in priors
            that were saved without.
        few: of classes, numbers of rows below that, rising, and the prior of heads of so many; none in priors that
            were saved without.
        kept: of classes, rows of a task that heads were made of where :attr:`width` and :attr:`bias_sd` were chosen: of
            many more the prior weighs less (:meth:`sureness_of`); 0, as of priors that were saved without, always the
            same.
        few_values: the same of regressions, at phi; None where they were not asked, as of priors that were saved
            without.
        few_classes: of classes that share no head, one that tasks of few rows stand around, at phi; None where it does
            not help them, as of priors that were saved without.
    """

    head: Tensor
    labels: tuple[str, ...] = ()
    width: float = 1.0
    feature_sd: Tensor | None = None
    bias_sd: float | None = None
    around_width: float | None = None
    rows: int = 0
    few: FewRows = ()
    kept: int = 0
    few_values: FewValues | None = None
    few_classes: FewClasses | None = None

    @property
    def usual(self) -> UsualPrior | None:
        """What the tasks say together of the prior of their heads of classes; None where they were not asked."""
        return None if self.bias_sd is None else UsualPrior(self.width, self.bias_sd)

    def with_few(self, few: FewRows) -> ClassHead:
        """Return the same with priors of heads of fewer rows than :attr:`rows`."""
        return self._replace(few=tuple((rows, usual) for rows, usual in few if rows < self.rows))

    def usual_of(self, rows: int) -> UsualPrior | None:
        """Return the prior of a head of so many rows.

        Between two numbers that tasks speak of, logarithms of the standard deviations go as that of the number. Of
        :data:`MANY_MORE` times the rows that they were asked with, biases are free: on eight hundred rows those that
        are right for a hundred cost 0.01 to 0.2 nats.
        """
        if self.usual is None or not self.few:
            return self.usual
        if rows >= MANY_MORE * self.rows:
            return self.usual._replace(bias_sd=BIAS_SD)
        if rows >= self.rows:
            return self.usual
        return between((*self.few, (self.rows, self.usual)), rows)

    def sureness_of(self, rows: int) -> float:
        """Return how much the prior weighs against what a task of so many rows says itself, 1 at most.

        Heads of one row have a prior under which they say nothing, and of twenty rows that is wrong. So of more rows
        than tasks have it weighs less from :data:`MANY_MORE` times those on that heads were made of where it was
        chosen, of which one does not count: nothing where that one was all.
        """
        if self.kept == 0 or rows <= self.rows:
            return 1.0
        return min(MANY_MORE * (self.kept - 1) / rows, 1.0)

    def of(self, task: Task) -> Tensor | None:
        """Return the rows of a task's classes, in its own order, ``[c, E + 1]``; None where it has others.

        Classes go by their names where both have names, else by their numbers.
        """
        return rows_of_classes(self.head, self.labels, task)


def are_alike(one: ClassHead | None, other: ClassHead | None) -> bool:
    """Whether two heads are the same but for what another machine may round."""
    if one is None or other is None:
        return one is other
    if (one.few_values is None) != (other.few_values is None) or _few_of(one) != _few_of(other):
        return False
    pairs = ((one.head, other.head), (one.feature_sd, other.feature_sd), (_few_head(one), _few_head(other)))
    return (one[1:3], one[4:-2]) == (other[1:3], other[4:-2]) and all(_are_close(*pair) for pair in pairs)


def _few_of(one: ClassHead) -> tuple[object, ...] | None:
    return None if one.few_classes is None else one.few_classes[1:]


def _few_head(one: ClassHead) -> Tensor | None:
    return None if one.few_classes is None else one.few_classes.head


def _are_close(one: Tensor | None, other: Tensor | None) -> bool:
    if one is None or other is None:
        return one is other
    if one.shape != other.shape or one.numel() == 0:
        return one.shape == other.shape
    return torch.allclose(one, other.to(one), rtol=0.0, atol=1e-2 * float(one.abs().max()))

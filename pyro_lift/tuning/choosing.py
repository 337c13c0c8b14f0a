"""Choosing a method's settings by the scores of tasks that were held out: the one rule of all that is tuned here."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Generic, NamedTuple, TypeVar

from pyro_lift.inference.sgld import DivergedError

__all__ = ["FAILED", "Tuned", "choose", "tune"]

C = TypeVar("C")

#: Scores of a setting under which a chain or an optimiser diverged.
FAILED: Mapping[str, float] = {"nll": math.inf, "ece": math.inf}


class Tuned(NamedTuple, Generic[C]):
    """A grid's best candidate, and the mean NLL of every candidate in the grid's order."""

    best: C
    losses: list[float]


def choose(grid: Sequence[C], scores: Sequence[Sequence[Mapping[str, float]]], *, tie: float = 0.0) -> Tuned[C]:
    """Choose the candidate with the lowest mean NLL.

    Args:
        grid: the candidates.
        scores: of each candidate, the scores on every development task: ``nll`` and ``ece``.
        tie: candidates whose mean NLL is within so many nats of the lowest are taken for equally good, which so few
            tasks cannot tell apart; among them the one with the lowest mean ECE is chosen.

    Example:
        >>> choose(["a", "b"], [[{"nll": 0.50, "ece": 0.3}], [{"nll": 0.51, "ece": 0.1}]], tie=0.02)
        Tuned(best='b', losses=[0.5, 0.51])
    """
    losses = [statistics.fmean(task["nll"] for task in tasks) for tasks in scores]
    close = [k for k, loss in enumerate(losses) if loss <= min(losses) + tie]
    best = min(close, key=lambda k: statistics.fmean(task["ece"] for task in scores[k]))
    return Tuned(grid[best], losses)


def tune(grid: Sequence[C], judge: Callable[[C], Iterable[Mapping[str, float]]], *, tie: float = 0.0) -> Tuned[C]:
    """Score every candidate and choose one; a candidate that diverges is never chosen.

    Args:
        grid: the candidates.
        judge: from a candidate to its scores on the development tasks.
        tie: see :func:`choose`.
    """
    scores: list[Sequence[Mapping[str, float]]] = []
    for candidate in grid:
        try:
            scores.append(list(judge(candidate)))
        except DivergedError:
            scores.append([FAILED])
    return choose(grid, scores, tie=tie)

r"""How many of the networks behind a prediction stay where adaptation began, and how that is found.

The adapter's path is only as good as a task's rows let it be: with few of them it overfits, and more is lost than won.
Where heads are solved, a network at the start of the path predicts by itself, and an average of both kinds is a choice
between "these rows ask for other features" and "they do not". With few rows each has half of the weight, or what tasks
of the kind say together (:mod:`~pyro_lift.tuning.unmoved_share`). Where no head is solved all draws move, unless these
say otherwise. A regression of seven rows or fewer that goes by all tasks stays (:mod:`~pyro_lift.models.few_values`). A
task with more rows can tell: a fifth of them, every fifth of each class, is kept from the chain, and
the share of the networks at the start is the weight w that predicts these rows best (stacking),

.. math:: \max_w\; \sum_{n} \log\big(w\, p_0(y_n) + (1 - w)\, p_1(y_n)\big) + c \log w + c \log(1 - w),

with :math:`p_0` from the start and :math:`p_1` the mean over draws, both by heads that the other rows have solved. The
last two terms, c rows for either, draw w towards a half. Where w rounds to all of the draws, all stay: the task asks
for no other features. Heads of the prediction are solved on all rows.

References:
    Yao, Vehtari, Simpson, Gelman (2018), Using stacking to average Bayesian predictive distributions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from pyro_lift.models.observation import has_head
from pyro_lift.models.solved_heads import SolvedHeads
from pyro_lift.models.task import Task

__all__ = [
    "STACKED_FROM",
    "UNMOVED",
    "Unmoved",
    "kept_from_the_chain",
    "stacked_share",
    "unmoved_draws",
    "usual_share",
    "with_unmoved",
]

#: Share of the networks that stay at the start where it is not found from rows.
UNMOVED = 0.5
#: Rows from which on it is: a fifth of fewer says too little, and is missed by the chain.
STACKED_FROM = 100
#: One row of so many is kept from the chain.
ONE_OF = 5
#: c, rows that each of the two has in advance.
IN_ADVANCE = 2.0
#: Steps of expectation maximisation; the problem is concave and has one unknown.
EM_STEPS = 200


class Unmoved:
    """What some tasks' chains see of their rows, and the share of the draws that goes back to the start.

    Args:
        tasks: new ones.
        solved: their heads; None where heads are not solved.
        share: that is taken as it is; None finds it.
        few: share of a task of fewer than :data:`STACKED_FROM` rows, where it is not given; None is :data:`UNMOVED`
            where heads are solved, and nothing elsewhere.
        looks: whether tasks are looked at on their development rows, which find the draws then.
        head_scale: of heads that move with the weights.

    Raises:
        ValueError: a share is given, and heads move with the weights.

    Attributes:
        tasks: with the rows that chains see.
        solved: their heads, as chains see them.
        heads: the same on all rows, for predictions.
    """

    def __init__(
        self,
        tasks: Sequence[Task],
        solved: SolvedHeads | None,
        *,
        share: float | None = None,
        few: float | None = None,
        looks: bool = False,
        head_scale: float | None = None,
    ) -> None:
        self.heads, self._given, self._few = solved, share, few
        for name, given in {"unmoved": share, "unmoved_few": few}.items():
            if solved is None and given and any(has_head(task, head_scale) for task in tasks):
                raise ValueError(
                    f"{name}={given:g}: a head that moves with the weights says nothing at the start. "
                    f'Solve the heads (head="solve"), or leave {name} out.'
                )
        self.tasks, self.solved = list(tasks), solved
        self._kept: list[Tensor | None] = [None] * len(self.tasks)
        if solved is None or share is not None:
            return
        self._kept = [None if looks and task.dev is not None else kept_from_the_chain(task) for task in self.tasks]
        if any(kept is not None for kept in self._kept):
            self.tasks = [
                task if kept is None else replace(task, train=task.train.take(torch.nonzero(~kept).flatten()))
                for task, kept in zip(self.tasks, self._kept, strict=True)
            ]
            choices = [solved.choice(k) for k in range(len(self.tasks))]
            self.solved = solved.on(self.tasks, choices)

    def put_back(self, task: int, start: Tensor, thetas: Tensor) -> Tensor:
        """Put the start ``[D]`` in the place of the first of a task's draws ``[S, D]``, as many as its share says."""
        if self._given is None and self.heads is not None and self.heads.stays(task):
            return with_unmoved(start, thetas, 1.0, all_may=True)
        return with_unmoved(start, thetas, self._share(task, start, thetas), all_may=self._kept[task] is not None)

    def _share(self, task: int, start: Tensor, thetas: Tensor) -> float:
        kept = self._kept[task]
        if self._given is not None:
            return self._given
        if kept is None:
            few = self._few if len(self.tasks[task].train) < STACKED_FROM else None
            return usual_share(self.heads is not None) if few is None else few
        assert self.heads is not None
        later = thetas[len(thetas) // 2 :]
        log_p = [self.heads.log_prob_without(task, theta, kept) for theta in (start.to(thetas), *later)]
        moved = torch.stack(log_p[1:]).logsumexp(0) - torch.tensor(float(len(later))).log()
        return stacked_share(log_p[0], moved)


def usual_share(solved: bool) -> float:
    """Return the share of the draws that stay where nothing is known of the tasks: half of them if heads are solved."""
    return UNMOVED if solved else 0.0


def kept_from_the_chain(task: Task) -> Tensor | None:
    """Choose the rows ``[n]`` that a task's chain does not see: every fifth of each class; None of a small task."""
    target = task.train.target
    if len(target) < STACKED_FROM:
        return None
    if task.kind == "regression":  # values are no classes
        target = torch.zeros(len(target), dtype=torch.long, device=target.device)
    kept = torch.zeros(len(target), dtype=torch.bool, device=target.device)
    # Options of a row's own are no classes, and dealing by their numbers does no harm.
    for label in target.unique():
        kept[torch.nonzero(target == label).flatten()[ONE_OF - 1 :: ONE_OF]] = True
    return kept if bool(kept.any()) else None


def stacked_share(start: Tensor, moved: Tensor) -> float:
    """Return the weight w of the start's predictions, given log probabilities of the same rows, ``[n]`` each."""
    w = torch.tensor(0.5, dtype=torch.float64, device=start.device)
    odds = (moved - start).double()
    for _ in range(EM_STEPS):
        responsibility = 1.0 / (1.0 + (1.0 - w) / w * odds.exp())
        w = (responsibility.sum() + IN_ADVANCE) / (len(odds) + 2.0 * IN_ADVANCE)
    return float(w)


def unmoved_draws(draws: int, share: float = UNMOVED, *, all_may: bool = False) -> int:
    """Count the draws that stay at the start; at least one moves, unless all may stay."""
    return min(round(share * draws), draws if all_may else draws - 1)


def with_unmoved(start: Tensor, thetas: Tensor, share: float = UNMOVED, *, all_may: bool = False) -> Tensor:
    """Put the start ``[D]`` in the place of the first of the draws ``[S, D]``."""
    stay = unmoved_draws(len(thetas), share, all_may=all_may)
    if stay == 0:
        return thetas
    return torch.cat([start.to(thetas).expand(stay, -1), thetas[stay:]])

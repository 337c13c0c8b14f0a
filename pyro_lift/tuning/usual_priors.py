r"""The prior that the heads of several tasks' classes have, chosen by the tasks together, by the number of rows.

A prior is the standard deviation of a logit and that of a bias, and the one is taken under which rows that were left
out are the most likely, over all tasks. What is left out is drawn: dealt class by class, what is left would have the
class frequencies of what is not, and biases that follow these would seem to be worth more than they are.

A head is used at its mode. Of a hundred rows that is near to the average over all heads that go with them, of three it
is far too sure: a class without a row among them has no probability under a prior that is right for twenty. So tasks
are asked with as few of their rows as a new one may have,

.. math:: \max_{s, s_b} \sum_i \sum_{n \notin M_i} \log p\big(y_n \mid x_n, \hat h_{M_i}(s, s_b)\big), \qquad
          |M_i| = 1, 2, 4, 8, \dots

drawn :data:`DRAWS` times each or more, and a head has the prior of its number, between two of them by logarithms.
Features on which joint training has made heads of twenty rows good may make those of three worse, and surer. So where
it goes on, tasks are asked again with few rows, on features of the half of the tasks that they are not in
(:mod:`~pyro_lift.tuning.cross_fit`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import median_high
from typing import NamedTuple

import torch
from torch import Tensor

from pyro_lift.models.class_head import ClassHead
from pyro_lift.models.head_problem import HeadModel, apply_head, head_problem, newton
from pyro_lift.models.heads import BIAS_SDS, LOGIT_WIDTHS, FewRows, UsualPrior, choose_prior_sd, scaling_of
from pyro_lift.support.evenly import spread_evenly
from pyro_lift.support.small_problems import on_one_thread
from pyro_lift.tuning.halves import FEWEST_TASKS

__all__ = [
    "CHOICE_ROWS",
    "FEW_ASKED",
    "MOST_FEW",
    "Asked",
    "by_number_of_rows",
    "few_rows",
    "order_of",
    "scores_of",
    "under",
    "usual_prior",
    "with_few",
]

#: Rows of a task by which it chooses, at most; and of the few that it is asked with.
CHOICE_ROWS, MOST_FEW = 100, 32
#: Parts that a task's rows are dealt into, each predicted by the others.
PARTS = 5
#: How often a few are drawn, and rows that are drawn of each task in all, at least: of two rows a head is much or
#: little worth as they fall.
DRAWS, DRAWN = 4, 32
#: Tasks that are asked with few of their rows, at most.
FEW_ASKED = 32
#: Gradient of a mode, in units of the prior: thousandths of a nat.
TOLERANCE = 1e-3


class Asked(NamedTuple):
    """Rows of a task that say something of the prior of its head, :data:`CHOICE_ROWS` at most.

    Attributes:
        features: ``[n, E]``.
        target: class numbers ``[n]``.
        num_classes: C.
        around: the head ``[C, E + 1]`` at which the prior stands; None is zero.
    """

    features: Tensor
    target: Tensor
    num_classes: int
    around: Tensor | None = None

    def at_most(self, rows: int) -> Asked:
        """Return the same with so many of the rows, drawn, where there are more."""
        if len(self.target) <= rows:
            return self
        some = order_of(len(self.target), 0)[:rows].to(self.target.device)
        return self._replace(features=self.features[some], target=self.target[some])


def scores_of(asked: Asked, *, drawn: bool = True) -> Tensor:
    """Return the log probability of a task's left-out rows, a row, for each sd of a bias and each width.

    Of a single row, which is left out from none, that of the head that it stands around.

    Args:
        asked: the task's rows.
        drawn: whether what is left out is drawn; as runs of before, it is dealt class by class.
    """
    x, y, C, around = asked
    if len(x) == 1:
        told = -math.log(C) if around is None else float(apply_head(x.double(), around.double()).log_softmax(-1)[0, y])
        return torch.full((len(BIAS_SDS), len(LOGIT_WIDTHS)), told, dtype=torch.float64)
    if drawn:
        order, parts = order_of(len(x), 0), min(PARTS, len(x))
        kept = torch.ones(parts, len(x))
        kept[torch.arange(len(x)) % parts, order] = 0.0
        return _left_out(x, y, C, around, kept)
    each = [choose_prior_sd(x, y, HeadModel(C, around=around, bias_sd=sd)).scores for sd in BIAS_SDS]
    return -torch.tensor(each, dtype=torch.float64)


def usual_prior(scores: Sequence[Tensor]) -> tuple[UsualPrior | None, Tensor]:
    """Return the prior under which the tasks' left-out rows are the most likely, and what each then has, ``[N]``."""
    all_of = torch.stack(list(scores))
    bias, width = divmod(int(all_of.mean(0).argmax()), len(LOGIT_WIDTHS))
    if bool((all_of == all_of[:, :1, :1]).all()):  # single rows say nothing of it
        return None, all_of[:, 0, 0]
    return UsualPrior(LOGIT_WIDTHS[width], BIAS_SDS[bias]), all_of[:, bias, width]


def few_rows(tasks: Sequence[Asked]) -> FewRows:
    """Find the prior of heads of 1, 2, 4, ... rows, up to half of what four of the tasks have.

    Args:
        tasks: their rows.

    Returns:
        Numbers of rows, rising, and the prior of each; none where all tasks are of a single row.
    """
    found, number = [], 1
    while number <= MOST_FEW:
        able = [(k, task) for k, task in enumerate(spread_evenly(tasks, FEW_ASKED)) if len(task.target) >= 2 * number]
        if len(able) < FEWEST_TASKS:
            break
        usual, _ = usual_prior([with_few(task, number, seed) for seed, task in able])
        if usual is not None:
            found.append((number, usual))
        number *= 2
    return tuple(found)


def by_number_of_rows(head: ClassHead, tasks: Sequence[Asked]) -> ClassHead:
    """Give a head what its tasks say of heads of few rows, and how many rows what they say of theirs is of."""
    rows = median_high(len(task.target) for task in tasks)
    kept = rows - -(-rows // min(PARTS, rows))
    return head._replace(rows=rows, kept=kept).with_few(few_rows(tasks))


def under(head: ClassHead, usual: UsualPrior | None) -> ClassHead:
    """Give a head the prior that its tasks have chosen; the same where they say nothing of it."""
    return head if usual is None else head._replace(width=usual.width, bias_sd=usual.bias_sd)


def with_few(asked: Asked, number: int, seed: int) -> Tensor:
    """Return the log probability of a task's other rows, a row, by heads of so many of them, drawn some times.

    Args:
        asked: the task's rows, twice as many at least.
        number: of the rows that a head is made of.
        seed: of what is drawn.

    Returns:
        For each sd of a bias and each width, ``[sds of a bias, widths]``.
    """
    n = len(asked.target)
    kept = torch.zeros(max(DRAWS, DRAWN // number), n)
    for k in range(len(kept)):
        kept[k, order_of(n, 1 + DRAWN * seed + k)[:number]] = 1.0
    return _left_out(*asked, kept)


@on_one_thread
@torch.no_grad()
def _left_out(features: Tensor, target: Tensor, num_classes: int, around: Tensor | None, kept: Tensor) -> Tensor:
    """Average the log probability of left-out rows ``[sds of a bias, widths]`` over the splits ``kept`` ``[F, n]``.

    All priors and splits are solved at once, each head on standardised features of its own rows, rotated to their span.
    """
    x, kept = features.double(), kept.to(features.device).double()
    offset = None if around is None else apply_head(x, around.double())
    x = scaling_of(x.expand(len(kept), *x.shape), kept).apply(x)
    most = int(kept.sum(-1).max())
    if most < x.shape[-1]:
        rows = torch.argsort(kept, dim=-1, descending=True, stable=True)[:, :most]
        own = (x * kept.unsqueeze(-1)).gather(-2, rows.unsqueeze(-1).expand(-1, -1, x.shape[-1]))
        x = x @ torch.linalg.qr(own.mT)[0]
    grid = (len(BIAS_SDS), len(LOGIT_WIDTHS), len(kept))
    sds = torch.tensor(BIAS_SDS).to(x)[:, None, None].expand(grid)
    widths = torch.tensor(LOGIT_WIDTHS).to(x)[:, None].expand(grid) / math.sqrt(features.shape[-1])
    model = HeadModel(num_classes, bias_sd=sds)
    x, y = x.expand(*grid, *x.shape[1:]), target.expand(*grid, -1)
    problem = head_problem(x, y, model, widths, kept.expand(*grid, -1), offset, rotate=False)
    v, _ = newton(problem, problem.start, TOLERANCE)
    told = (problem.outputs(v).log_softmax(-1) * problem.target).sum(-1)
    return (((1.0 - kept) * told).sum((-2, -1)) / (1.0 - kept).sum()).cpu()


def order_of(n: int, seed: int) -> Tensor:
    """Draw the order of n rows."""
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed))

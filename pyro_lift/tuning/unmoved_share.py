r"""How many draws of an adaptation stay at its start: what tasks say together that have few rows each.

A task of few rows cannot tell whether the network is to move for it (:mod:`~pyro_lift.inference.adaptation.unmoved`).
Tasks of a kind can: each is adapted to, and rows that it was not adapted to are predicted with every share w of the
draws at the start, as a posterior of S draws predicts them,

.. math:: p_w = w\, p_0 + \frac1S \sum_{s > wS} p_s, \qquad
          \hat w = \arg\min_w \min_T \tfrac1M \sum_i \tfrac1{n_i} \sum_n -\log p_{wT}(y_{in}),

w = 0, 0.1, ..., 0.9, with :math:`p_{wT}` at the temperature that is best for all tasks at this w: how sure predictions
are is another question, and an average is less sure than its parts. A few rows of a few tasks say it roughly. So the
share is half way between the usual one and :math:`\hat w`: over 30 runs of made-up families that gains nine tenths of
what :math:`\hat w` itself does, loses half as much at worst, and gains more than to ask for one beyond chance.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyro_lift.inference.adaptation.temperature import Predicted
from pyro_lift.inference.adaptation.unmoved import STACKED_FROM, unmoved_draws
from pyro_lift.models.task import Task
from pyro_lift.tuning.predictions import least_losses

__all__ = ["SHARES", "Apart", "apart", "chosen_share", "with_share"]

#: Shares that are tried.
SHARES = tuple(k / 10 for k in range(10))


class Apart(NamedTuple):
    """Predictions of the same rows of a task, from the start of its adaptation and from each draw that moved.

    Attributes:
        start: of it.
        moved: of the later draws ``[S - 1, n, C]``, in their order.
    """

    start: Predicted
    moved: Tensor

    def mixed(self, share: float) -> Predicted:
        """Predict as a posterior does with this share of S draws at the start: the first of them make room."""
        each = torch.cat([self.start.probabilities.unsqueeze(0), self.moved])
        return self.start._replace(probabilities=with_share(each, share).mean(0))


def with_share(each: Tensor, share: float) -> Tensor:
    """Put what the first of S draws says, ``[S, ...]``, in the place of as many as stay there with it.

    With none of them, the first is left out: it would have moved.
    """
    stay = unmoved_draws(len(each), share)
    return torch.cat([each[:1].expand(stay, *each.shape[1:]), each[max(stay, 1) :]])


def apart(posterior: Any, task: Task) -> Apart | None:
    """Predict a task's test rows from each draw; None of a task that says by itself which of them stay.

    Args:
        posterior: the first of whose draws is at the start of the adaptation.
        task: that it is of.
    """
    assert task.test is not None
    if len(task.train) >= STACKED_FROM:
        return None
    each = [posterior.of_draws(slice(k, k + 1)).predicted(task.test) for k in range(len(posterior.thetas))]
    return Apart(each[0], torch.stack([one.probabilities for one in each[1:]]))


def chosen_share(predictions: Sequence[Apart], usual: float) -> float:
    """Return the mean of the usual share of draws at the start and the one with the lowest loss.

    Args:
        predictions: of each task, one or more.
        usual: share, where tasks say nothing.
    """

    def loss(share: float) -> float:
        return float(least_losses([each.mixed(share) for each in predictions]).mean())

    return 0.5 * (usual + min(SHARES, key=loss))

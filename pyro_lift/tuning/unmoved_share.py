r"""How many draws of an adaptation stay at its start: what tasks say together that have few rows each.

A task of few rows cannot tell whether the network is to move for it (:mod:`~pyro_lift.inference.adaptation.unmoved`).
Tasks of a kind can: each is adapted to, and rows that it was not adapted to are predicted from the start alone,
:math:`p_0`, and from the draws that moved, :math:`p_1`. The share w of the start is the one of

.. math:: \min_w \min_T \tfrac1M \sum_i \tfrac1{n_i} \sum_n -\log p_{wT}(y_{in}), \qquad p_w = w p_0 + (1 - w) p_1,

w = 0, 0.1, ..., 0.9, with :math:`p_{wT}` at the temperature that is best for all tasks at this w: how sure predictions
are is another question, and an average is less sure than its parts. It is taken where the loss is below that of the
usual share by the paired one-sided test over tasks at 5 %.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from pyro_lift.inference.adaptation.temperature import Predicted, fit_temperature, tempered
from pyro_lift.inference.adaptation.unmoved import STACKED_FROM
from pyro_lift.metrics.probabilities import nll
from pyro_lift.models.task import Task
from pyro_lift.tuning.halves import is_above_zero

__all__ = ["HALF", "Apart", "apart", "best_share", "loss_of"]

#: Share that adaptations are made with for both predictions to be there.
HALF = 0.5
#: Shares that are tried.
SHARES = tuple(k / 10 for k in range(10))


class Apart(NamedTuple):
    """Predictions of the same rows of a task, from the start of its adaptation and from the draws that moved."""

    start: Predicted
    moved: Predicted

    def mixed(self, share: float) -> Predicted:
        """Average them with a weight of the start's."""
        p = share * self.start.probabilities + (1.0 - share) * self.moved.probabilities
        return self.start._replace(probabilities=p)


def apart(posterior: Any, task: Task) -> Apart | None:
    """Predict a task's test rows from the start and from the other draws; None of a task that says by itself.

    Args:
        posterior: made with a share of :data:`HALF`.
        task: that it is of.
    """
    assert task.test is not None
    stay = int((posterior.thetas == posterior.thetas[0]).all(-1).sum())
    if len(task.train) >= STACKED_FROM or stay == len(posterior.thetas):
        return None
    parts = (slice(0, stay), slice(stay, None))
    return Apart(*(posterior.of_draws(part).predicted(task.test) for part in parts))


def best_share(predictions: Sequence[Apart], usual: float) -> float:
    """Return the share of the start with the lowest loss, or the usual one where that is not worse by the test.

    Args:
        predictions: of each task.
        usual: share, where tasks say nothing.
    """
    losses = {share: _losses([each.mixed(share) for each in predictions]) for share in (*SHARES, usual)}
    best = min(SHARES, key=lambda share: float(losses[share].mean()))
    return best if len(predictions) > 1 and is_above_zero(losses[usual] - losses[best]) else usual


def loss_of(predictions: Predicted, temperature: float) -> float:
    """Compute the NLL a row at a temperature."""
    return nll(tempered(predictions.probabilities, temperature, predictions.rates), predictions.target)


def _losses(predictions: Sequence[Predicted]) -> torch.Tensor:
    """Compute the NLL a row of each task at the temperature that is best for all, ``[M]``."""
    temperature = fit_temperature(predictions)
    return torch.tensor([loss_of(each, temperature) for each in predictions], dtype=torch.float64)

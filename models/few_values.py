r"""The prior of a regression's head that has few rows, as the tasks of meta-training say it at phi.

With n rows a head is drawn from around the head of all tasks,

.. math:: w \sim \mathcal N\big(\bar w,\ s_n^2 / E\big), \qquad b \sim \mathcal N\big(\bar b,\ t_n^2\big)

on features in units of what they vary by over the rows of all tasks, the bias at the mean of the task's own rows. Both
standard deviations are in the unit of the targets. They are those under which the tasks' other rows are the most likely
when n of a task's rows are known (:mod:`~pyro_lift.tuning.few_values`).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from pyro_lift.models.head_problem import HeadModel
from pyro_lift.models.heads import FewRows, UsualPrior, between

__all__ = ["MOVES_FROM", "FewValues", "least_spread"]

#: Of the median spread over features, the least that one is divided by: a feature that is level at phi need not be
#: where a task's own theta is. It was no cure for networks that move with few rows (sines of one to three, seed 0, NLL:
#: 4.51, 3.66, 3.43, and 4.53, 3.64, 3.43 at a thousandth), for which :data:`MOVES_FROM` is, and costs nothing.
LEVEL = 0.3
#: Rows from which on a task's theta moves: of fewer, what they say of features is less than what a chain's noise does
#: to these. NLL at phi, and with half of the draws: sines of three rows 3.10 and 3.58, 3.12 and 3.19; unrelated maps
#: 4.22 and 4.47, 4.15 and 4.19; maps near to one another 3.41 and 3.40, 3.82 and 3.59. Of six rows the six families are
#: level on average, of twelve 0.05 better with them.
MOVES_FROM = 8


class FewValues(NamedTuple):
    """What tasks say of heads of few rows.

    Attributes:
        head: around which they stand, ``[M, E + 1]``.
        feature_sd: what features are divided by at least: what they vary by over the rows of all tasks, ``[E]``.
        priors: numbers of rows, rising, with the standard deviations of a value and of a bias.
    """

    head: Tensor
    feature_sd: Tensor
    priors: FewRows

    def of(self, rows: int) -> UsualPrior | None:
        """Return the prior of a head of so many rows; None where these are more than the tasks were asked with."""
        return None if rows > self.priors[-1][0] else between(self.priors, rows)

    def model(self, prior: UsualPrior, noise_scale: float) -> HeadModel:
        """Make the likelihood in units of the noise."""
        return HeadModel(
            len(self.head),
            "regression",
            around=self.head,
            bias_sd=prior.bias_sd / noise_scale,
            least_spread=self.feature_sd,
            level_spread=True,
        )


def least_spread(feature_sd: Tensor, level: float = LEVEL) -> Tensor:
    """Return the least that features of few rows are divided by: what they vary by over the rows of all tasks.

    Args:
        feature_sd: that, ``[E]``.
        level: of the median over features that vary, the least for those that do not.
    """
    varying = feature_sd[feature_sd > 0.0]
    return feature_sd.maximum(level * varying.median()) if len(varying) else torch.ones_like(feature_sd)

r"""What regressions of meta-training say of how unevenly they vary (:mod:`~pyro_lift.models.dispersion`).

Tasks were adapted to on some of their rows, and the others predicted. With the square errors :math:`e^2` and the
variances :math:`v` of these and with what the first rows missed, r, the degrees of freedom and the usual r are those
under which the others are the most likely,

.. math:: \max_{\nu,\,\bar r}\ -\tfrac12 \sum_i \operatorname{mean}_m
          \Big(\log T \hat s_i v_{im} + \frac{e_{im}^2}{T \hat s_i v_{im}}\Big),

where T is the mean of :math:`e^2 / \hat s v`. Of many rows a larger r and a smaller T are the same, and of few
:math:`\hat s` is 1, so a T near 1 is preferred (:data:`NEAR`). Where nothing gains :data:`TIE` tasks are taken to be
alike, :data:`ALIKE`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from pyro_lift.models.dispersion import Dispersion
from pyro_lift.tuning.halves import FEWEST_TASKS

__all__ = ["Widths", "fitted_dispersion"]

#: Degrees of freedom of tasks that are alike, and the others that are tried.
ALIKE, TRIED = 100.0, (2.0, 4.0, 8.0, 16.0, 32.0)
#: Factors on the median of r that are tried.
USUAL = (0.7, 1.0, 1.4, 2.0, 2.8, 4.0, 5.6, 8.0)
#: Nats a value that the square of log T counts for, and that tasks have to gain by being unlike.
NEAR, TIE = 0.02, 0.01


class Widths(NamedTuple):
    """What predictions of a task's left-out rows were.

    Attributes:
        rows: that it was adapted to.
        left_out: r of each value, ``[M]``.
        miss: square errors ``[m, M]``.
        variance: of the predictions, ``[m, M]``.
    """

    rows: int
    left_out: Tensor
    miss: Tensor
    variance: Tensor

    def under(self, dispersion: Dispersion) -> Widths:
        """Return the same with the variances that a dispersion gives."""
        return self._replace(variance=self.variance * dispersion.of(self.left_out, self.rows).factors.to(self.variance))

    @property
    def ratio(self) -> Tensor:
        """Square errors over variances, the mean of all."""
        return (self.miss / self.variance).mean()

    def log_density(self, temperature: float) -> Tensor:
        """Compute the log density of a value, but for constants, at a factor on the variance."""
        variance = temperature * self.variance
        return -0.5 * (variance.log() + self.miss / variance).mean()


def fitted_dispersion(told: Sequence[Widths]) -> tuple[Dispersion, float] | None:
    """Find how unevenly tasks vary, and the factor on the variance of all that is left to find.

    Args:
        told: of some tasks.

    Returns:
        None where the tasks are fewer than four, or have different numbers of values.
    """
    if len(told) < FEWEST_TASKS or len({len(each.left_out) for each in told}) > 1:
        return None
    ratios = torch.stack([(each.miss / each.variance).mean(0) for each in told]).median(0).values
    values = tuple((ratios / ratios.mean()).clamp_min(1e-12).tolist()) if float(ratios.mean()) > 0.0 else ()
    values = values or (1.0,) * len(ratios)
    median = torch.stack([each.left_out for each in told]).double().median(0).values.clamp_min(1e-12)

    def under(rows: float) -> _Judged:
        of = (Dispersion(rows, tuple((factor * median).tolist()), values) for factor in USUAL)
        return max((_judged(told, each) for each in of), key=lambda judged: judged.score)

    alike = under(ALIKE)
    best = max((under(rows) for rows in TRIED), key=lambda judged: judged.score)
    found = best if best.score > alike.score + TIE else alike
    return found.dispersion, found.temperature


class _Judged(NamedTuple):
    """A dispersion, the factor that is left, and the log density of a value, but for constants."""

    dispersion: Dispersion
    temperature: float
    score: float


def _judged(told: Sequence[Widths], dispersion: Dispersion) -> _Judged:
    told = [each.under(dispersion) for each in told]
    temperature = max(float(torch.stack([each.ratio for each in told]).mean()), 1e-12)
    density = torch.stack([each.log_density(temperature) for each in told]).mean()
    return _Judged(dispersion, temperature, float(density) - NEAR * math.log(temperature) ** 2)

r"""Tasks whose likelihood is Gaussian in theta: read once, they are never run again, and theta is drawn exactly.

Where log p(D_i | theta_i) is quadratic in theta_i, as for normal data around anything linear in theta,

.. math:: \log p(D_i \mid \theta_i) = c_i + g_i^\top (\theta_i - r_i)
          - \tfrac12 (\theta_i - r_i)^\top H_i\,(\theta_i - r_i)

holds everywhere, and a few runs of the program give r, g, H for good. With a normal prior of mean phi and precision P

.. math:: \theta_i \mid \phi, D_i \sim \mathcal N\big(r_i + A_i^{-1}(\kappa g_i + P(\phi - r_i)),\; T A_i^{-1}\big),
          \qquad A_i = \kappa H_i + P.

:mod:`~pyro_lift.inference.gibbs.gaussian_reading` reads them, :mod:`~pyro_lift.inference.gibbs.exact_visit` draws.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["GaussianTasks", "Part"]


class Part(NamedTuple):
    """Where the coordinates of a local family lie in a task's vector: from ``begin`` to ``end``, around ``site``."""

    site: str
    family: str
    begin: int
    end: int


class GaussianTasks(NamedTuple):
    """Quadratic log likelihoods of all tasks; N tasks of D coordinates each, in float64.

    Attributes:
        parts: the families, in the order of a stored row.
        reference: r ``[N, D]``.
        gradient: kappa g ``[N, D]``.
        curvature: kappa H, ``[N, D]`` where no two coordinates are tied, else ``[N, D, D]``.
        prior_mean: m_0 of phi's own prior ``[D]``.
        prior_precision: 1/sigma^2 of it ``[D]``.
        log_likelihood: sum of c_i, without the power.
        power: kappa.
        tasks: 0 to N - 1.
    """

    parts: tuple[Part, ...]
    reference: Tensor
    gradient: Tensor
    curvature: Tensor
    prior_mean: Tensor
    prior_precision: Tensor
    log_likelihood: Tensor
    power: float
    tasks: tuple[int, ...]

    @property
    def tied(self) -> bool:
        """Whether coordinates of a task are tied by its likelihood."""
        return self.curvature.dim() == 3

    def times(self, rows: Tensor) -> Tensor:
        """Return kappa H_i times a vector for each task ``[N, D]``."""
        if self.tied:
            return torch.einsum("nij,nj->ni", self.curvature, rows)
        return self.curvature * rows

    def gradients(self, theta: Tensor) -> Tensor:
        """Return the gradients of kappa times the log likelihoods at some theta ``[N, D]``."""
        return self.gradient - self.times(theta - self.reference)

    def value(self, theta: Tensor, gradients: Tensor) -> Tensor:
        """Return the log likelihood of all tasks, without the power, from theta and the gradients there."""
        apart = theta - self.reference
        return self.log_likelihood + 0.5 * (apart * (self.gradient + gradients)).sum() / self.power

r"""The linear-Gaussian toy of Appendix A: a program, and its exact posterior.

.. math:: \phi \sim \mathcal N(0, \sigma^2 I_d),\quad \theta_i \sim \mathcal N(\phi, \beta^2 I_d),\quad
          y_{ij} \sim \mathcal N(x_{ij}^\top \theta_i, \alpha^2)
"""

from __future__ import annotations

from typing import NamedTuple

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

__all__ = ["Gaussian", "LinearGaussian", "fit", "gaussian_kl"]


class Gaussian(NamedTuple):
    """Mean ``[d]`` and covariance ``[d, d]``."""

    mean: Tensor
    covariance: Tensor


class LinearGaussian:
    """The toy as a Pyro program with its data bound in, in float64.

    Args:
        num_tasks: N.
        num_data: n, points a task.
        dim: d.
        sigma: standard deviation of phi.
        beta: standard deviation of theta_i around phi.
        alpha: standard deviation of the observation noise.
        block_size: tasks the plate takes at a time; None takes all, for NUTS and full SGLD.
        seed: of the data, drawn from the program itself with standard normal inputs.

    Example:
        >>> toy = LinearGaussian(num_tasks=10, seed=0)
        >>> toy.posterior().mean.shape
        torch.Size([2])
    """

    def __init__(
        self,
        num_tasks: int,
        num_data: int = 20,
        dim: int = 2,
        *,
        sigma: float = 1.0,
        beta: float = 0.5,
        alpha: float = 0.5,
        block_size: int | None = 1,
        seed: int = 0,
    ) -> None:
        self.num_tasks, self.num_data, self.dim = num_tasks, num_data, dim
        self.sigma, self.beta, self.alpha = sigma, beta, alpha
        self.block_size = block_size
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        self.phi = sigma * normal(dim)
        self.theta = self.phi + beta * normal(num_tasks, dim)
        self.x = normal(num_tasks, num_data, dim)
        self.y = torch.einsum("tnd,td->tn", self.x, self.theta) + alpha * normal(num_tasks, num_data)

    def to(self, device: torch.device | str) -> LinearGaussian:
        """Move the data to a device and return self."""
        self.x, self.y = self.x.to(device), self.y.to(device)
        return self

    def __call__(self) -> None:
        """Run the program."""
        zero = torch.zeros(self.dim, dtype=torch.float64, device=self.x.device)
        phi = pyro.sample("phi", dist.Normal(zero, self.sigma).to_event(1))
        with pyro.plate("tasks", self.num_tasks, subsample_size=self.block_size) as index:
            theta = pyro.sample("theta", dist.Normal(phi, self.beta).to_event(1))
            mean = torch.einsum("tnd,td->tn", self.x[index], theta)
            pyro.sample("y", dist.Normal(mean, self.alpha).to_event(1), obs=self.y[index])

    def posterior(self) -> Gaussian:
        r"""Compute p(phi | D) in closed form (Eq. 22-26, in information form).

        With the least-squares estimate :math:`\hat\theta_i` and :math:`C_i = \beta^2 I + \alpha^2 (X_i^\top X_i)^{-1}`
        its covariance around phi,

        .. math:: \Lambda = I/\sigma^2 + \sum_i C_i^{-1},\qquad m = \Lambda^{-1} \sum_i C_i^{-1} \hat\theta_i

        The gain ``C_i^{-1} = X_i^T (beta^2 X_i X_i^T + alpha^2 I)^{-1} X_i`` is used instead, which also holds where
        a task has fewer points than dimensions.
        """
        eye_n = torch.eye(self.num_data, dtype=torch.float64, device=self.x.device)
        marginal = self.beta**2 * self.x @ self.x.mT + self.alpha**2 * eye_n
        precision = torch.eye(self.dim, dtype=torch.float64, device=self.x.device) / self.sigma**2
        precision = precision + (self.x.mT @ torch.linalg.solve(marginal, self.x)).sum(0)
        shift = (self.x.mT @ torch.linalg.solve(marginal, self.y.unsqueeze(-1))).sum(0).squeeze(-1)
        covariance = torch.linalg.inv(precision)
        return Gaussian(covariance @ shift, covariance)

    def task_posterior(self, task: int) -> Gaussian:
        """Compute p(theta_i | D) in closed form, phi integrated out against all tasks."""
        others = self.posterior()
        P = self.x[task].mT @ self.x[task] / self.alpha**2
        h = self.x[task].mT @ self.y[task] / self.alpha**2
        eye = torch.eye(self.dim, dtype=torch.float64, device=self.x.device)
        # theta_i | phi, D_i is linear in phi: average it over p(phi | D).
        conditional = torch.linalg.inv(P + eye / self.beta**2)
        gain = conditional / self.beta**2
        return Gaussian(conditional @ h + gain @ others.mean, conditional + gain @ others.covariance @ gain.mT)


def gaussian_kl(p: Gaussian, q: Gaussian) -> float:
    r"""Compute the KL divergence of two Gaussians, in nats.

    .. math:: \mathrm{KL}(p\,\|\,q) = \tfrac12 \bigl\{\operatorname{tr}(\Sigma_q^{-1} \Sigma_p)
              + (\mu_q - \mu_p)^\top \Sigma_q^{-1} (\mu_q - \mu_p) - d
              + \log\det \Sigma_q - \log\det \Sigma_p\bigr\}
    """
    d = p.mean.shape[-1]
    solved = torch.linalg.solve(q.covariance, p.covariance)
    delta = q.mean - p.mean
    maha = delta @ torch.linalg.solve(q.covariance, delta)
    value = 0.5 * (solved.trace() + maha - d - torch.logdet(solved))
    return float(value)


def fit(draws: Tensor) -> Gaussian:
    """Fit a Gaussian to draws ``[S, d]`` by their mean and covariance."""
    return Gaussian(draws.mean(0), torch.cov(draws.T))

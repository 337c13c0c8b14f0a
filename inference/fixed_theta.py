r"""The posterior of phi given fixed theta_i: exact, and by the paper's chain.

.. math:: \phi \sim \mathcal N(m_0, \sigma^2 I), \qquad \theta_i \mid \phi \sim \mathcal N(\phi, \beta^2 I)
          \quad\text{with } \theta_1, \dots, \theta_N \text{ given}
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from pyro_lift.inference.sgld import euler, gaussian_noise
from pyro_lift.models.priors import LocalGaussian

__all__ = ["FixedThetaPosterior", "Scale", "exact_draws", "exact_prior", "phi_chain", "random_order"]

Scale = Literal["N", "1"]


@dataclass(frozen=True)
class FixedThetaPosterior:
    r"""The target of the chain over phi.

    Attributes:
        thetas: the fixed :math:`\theta_i`, ``[N, D]``.
        centre: prior mean :math:`m_0` of phi, ``[D]``.
        beta: standard deviation of a task's weights around phi.
        sigma: standard deviation of phi around its prior mean.
        scale: the factor c on one task's gradient: ``"N"`` is unbiased, ``"1"`` is the paper's text.
        temperature: multiplies the noise's variance.
    """

    thetas: Tensor
    centre: Tensor
    beta: float
    sigma: float
    scale: Scale = "N"
    temperature: float = 1.0

    @property
    def factor(self) -> int:
        """The factor c as a number."""
        return len(self.thetas) if self.scale == "N" else 1

    @property
    def step_limit(self) -> float:
        r"""The stability limit :math:`4 / (c / \beta^2 + 1 / \sigma^2)` of the chain's step size."""
        return 4.0 / (self.factor / self.beta**2 + self.sigma**-2)


def random_order(num_tasks: int, generator: torch.Generator) -> Iterator[int]:
    """Yield task numbers at random for ever."""
    while True:
        yield int(torch.randint(num_tasks, (), generator=generator, device=generator.device))


def phi_chain(
    posterior: FixedThetaPosterior, order: Iterable[int], step_size: float, generator: torch.Generator
) -> Iterator[Tensor]:
    r"""Yield draws ``[D]`` of the paper's chain over phi, one fixed :math:`\theta_i` a step; from their mean (Eq. 9).

    .. math:: \phi \leftarrow \phi + \tfrac{\eta}{2}\Big(c\,\frac{\theta_i - \phi}{\beta^2}
              - \frac{\phi - m_0}{\sigma^2}\Big) + \sqrt{T\eta}\;\xi

    Args:
        posterior: the target.
        order: the tasks' numbers, one a step; the chain ends with it.
        step_size: eta.
        generator: of the noise.

    Raises:
        ValueError: a step size at or past the stability limit.
    """
    p = posterior
    if step_size >= p.step_limit:
        raise ValueError(
            f"step_size={step_size:g} is past its stability limit {p.step_limit:g} = 4 / (c / beta^2 + 1 / sigma^2)."
        )
    phi, prior = p.thetas.mean(0), LocalGaussian(p.centre, torch.full_like(p.centre, p.sigma**-2))
    for task in order:
        gradient = p.factor * (p.thetas[task] - phi) / p.beta**2
        noise = gaussian_noise(phi, generator)
        phi = euler(phi, gradient, prior, step_size=step_size, temperature=p.temperature, noise=noise)
        yield phi


def exact_prior(thetas: Tensor, beta: float, sigma: float, centre: Tensor | float = 0.0) -> tuple[Tensor, float]:
    r"""Return the mean ``[D]`` and the variance of :math:`\phi \mid \theta_{1..N}`.

    .. math:: v = \Big(\frac{N}{\beta^2} + \frac{1}{\sigma^2}\Big)^{-1}, \qquad
              m = v\,\Big(\frac{\sum_i \theta_i}{\beta^2} + \frac{m_0}{\sigma^2}\Big)
    """
    v = 1.0 / (len(thetas) / beta**2 + 1.0 / sigma**2)
    return (v / beta**2 * thetas.double().sum(0) + v / sigma**2 * centre).to(thetas.dtype), v


def exact_draws(posterior: FixedThetaPosterior, generator: torch.Generator) -> Iterator[Tensor]:
    """Yield independent exact draws ``[D]`` of phi for ever."""
    mean, variance = exact_prior(posterior.thetas, posterior.beta, posterior.sigma, posterior.centre)
    while True:
        yield mean + (posterior.temperature * variance) ** 0.5 * gaussian_noise(mean, generator)

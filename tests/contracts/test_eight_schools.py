"""The textbook's model as it is written, against its exact posterior by a grid."""

from __future__ import annotations

import arviz as az
import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from scipy import stats

from pyro_lift import MCMC, SGLDGibbs

Y = torch.tensor([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0], dtype=torch.float64)
SD = torch.tensor([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0], dtype=torch.float64)


def schools() -> None:
    mu = pyro.sample("mu", dist.Normal(torch.tensor(0.0).double(), 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(torch.tensor(5.0).double()))
    with pyro.plate("tasks", 8) as index:
        theta = pyro.sample("theta", dist.Normal(mu, tau))
        pyro.sample("y", dist.Normal(theta, SD[index]), obs=Y[index])


def exact() -> dict[str, tuple[float, float]]:
    """Mean and sd of mu and tau, theta and mu integrated out in closed form."""
    grid = np.linspace(-9.0, 6.0, 6_001)
    tau, y = np.exp(grid)[:, None], Y.numpy()
    variance = SD.numpy() ** 2 + tau**2
    precision = (1.0 / variance).sum(1) + 1.0 / 25.0
    mean = (y / variance).sum(1) / precision
    quadratic = (y**2 / variance).sum(1) - mean**2 * precision
    density = -0.5 * (np.log(variance).sum(1) + np.log(precision) + quadratic)
    density = density + stats.halfcauchy(scale=5.0).logpdf(tau[:, 0]) + grid
    weight = np.exp(density - density.max())
    weight = weight / weight.sum()
    of_mu, of_tau = (weight * mean).sum(), (weight * tau[:, 0]).sum()
    mu_square = (weight * (1.0 / precision + mean**2)).sum()
    tau_square = (weight * tau[:, 0] ** 2).sum()
    return {
        "mu": (float(of_mu), float((mu_square - of_mu**2) ** 0.5)),
        "tau": (float(of_tau), float((tau_square - of_tau**2) ** 0.5)),
    }


@pytest.mark.slow
def test_the_default_step_gives_the_exact_posterior_within_monte_carlo_error() -> None:
    mcmc = MCMC(SGLDGibbs(schools, seed=1, translation="saga"), 3_000, warmup_steps=300, disable_progbar=True)
    mcmc.run()
    for site, (mean, sd) in exact().items():
        draws = mcmc.get_samples()[site].numpy()[None]
        assert float(az.ess(draws)) > 300.0
        assert abs(float(draws.mean()) - mean) < 4.0 * float(az.mcse(draws, method="mean"))
        assert abs(float(draws.std()) - sd) < 4.0 * float(az.mcse(draws, method="sd"))

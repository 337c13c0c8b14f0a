"""Simulated truths: a thousand hierarchies of unknown scale at once, each a coordinate of one program.

Truth and data are drawn together. A chain that begins at the truth must stay in the prior's law, however few visits it
makes; one that begins elsewhere must, after its warm-up, put the truth at a uniform rank among its draws.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from scipy import stats
from torch import Tensor

from pyro_lift import MCMC, SGLDGibbs

TASKS, COPIES, ROWS = 5, 1_000, 4


def number(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)


class Truth(NamedTuple):
    """Drawn from the prior, and data drawn from that; a column a copy."""

    phi: Tensor
    tau: Tensor
    theta: Tensor
    y: Tensor


#: Prior of the site, and the standard deviation of theta that it stands for.
SCALES: dict[str, tuple[Any, Any]] = {
    "half normal": (dist.HalfNormal(number(1.0)), lambda t: t),
    "half Cauchy": (dist.HalfCauchy(number(0.5)), lambda t: t),
    "inverse gamma of the variance": (dist.InverseGamma(number(3.0), number(2.0)), lambda t: t.sqrt()),
    "gamma of the precision": (dist.Gamma(number(3.0), number(2.0)), lambda t: t.rsqrt()),
}


def truths(name: str) -> Truth:
    """Quantiles of the priors, shuffled, so that the truths themselves are exactly their law; the rest is drawn."""
    source = np.random.default_rng(4)
    share = (np.arange(COPIES) + 0.5) / COPIES
    laws = {
        "half normal": stats.halfnorm(),
        "half Cauchy": stats.halfcauchy(scale=0.5),
        "inverse gamma of the variance": stats.invgamma(3.0, scale=2.0),
        "gamma of the precision": stats.gamma(3.0, scale=0.5),
    }
    tau = torch.tensor(laws[name].ppf(source.permutation(share)))
    phi = torch.tensor(stats.norm.ppf(source.permutation(share)))
    theta = phi + SCALES[name][1](tau) * torch.tensor(source.standard_normal((TASKS, COPIES)))
    y = theta + torch.tensor(source.standard_normal((TASKS, COPIES))) / ROWS**0.5
    return Truth(phi, tau, theta, y)


def chain(name: str, truth: Truth, block: int | None, step_size: float) -> SGLDGibbs:
    fn, root = SCALES[name]

    def model() -> None:
        phi = pyro.sample("phi", dist.Normal(torch.zeros(COPIES).double(), 1.0).to_event(1))
        tau = pyro.sample("tau", fn.expand([COPIES]).to_event(1))
        with pyro.plate("tasks", TASKS, subsample_size=block) as index:
            theta = pyro.sample("theta", dist.Normal(phi, root(tau)).to_event(1))
            pyro.sample("y", dist.Normal(theta, 1.0 / ROWS**0.5).to_event(1), obs=truth.y[index])

    return SGLDGibbs(model, step_size=step_size, seed=3)


def put_at_truth(kernel: SGLDGibbs, truth: Truth, block: int) -> None:
    """Begin the chain at the truth, all tasks visited once."""
    for _ in range(TASKS // block):
        kernel.sample(kernel.initial_params)
    state = kernel.state
    phi = {"phi": truth.phi, "tau": truth.tau.log()}
    kernel.chain.store.write(range(TASKS), list(truth.theta))
    squares = {"phi": (truth.theta - truth.phi).square().sum(0)}
    kernel.state = state._replace(phi=phi, sums={"phi": truth.theta.sum(0)}, squares=squares)


@pytest.mark.parametrize(
    ("name", "block"),
    [
        ("half normal", None),
        ("gamma of the precision", 1),
        *(pytest.param(k, 1, marks=pytest.mark.slow) for k in SCALES),
    ],
)
def test_a_chain_that_begins_at_the_truth_stays_in_the_law_of_the_prior(name: str, block: int | None) -> None:
    truth = truths(name)
    kernel = chain(name, truth, block, step_size=0.02)
    kernel.setup(0)
    put_at_truth(kernel, truth, block or TASKS)
    for _ in range(30 * TASKS // (block or TASKS)):
        kernel.sample(kernel.initial_params)
    tau = kernel.state.phi["tau"]
    assert float((tau - truth.tau.log()).abs().median()) > 0.2  # it has moved
    fresh = truths(name)
    pvalues = {
        "tau": stats.ks_2samp(tau.numpy(), fresh.tau.log().numpy()).pvalue,
        "phi": stats.kstest(kernel.state.phi["phi"].numpy(), "norm").pvalue,
        "theta": stats.ks_2samp(kernel.theta(2)["theta"].numpy(), fresh.theta.numpy().reshape(-1)).pvalue,
    }
    assert min(pvalues.values()) > 0.01 / len(pvalues), pvalues


@pytest.mark.slow
@pytest.mark.parametrize("name", SCALES)
def test_the_truth_has_a_uniform_rank_among_a_thousand_data_sets(name: str) -> None:
    truth = truths(name)
    kernel = chain(name, truth, None, step_size=0.02)
    kernel.thinning = 60
    mcmc = MCMC(kernel, 19, warmup_steps=600, disable_progbar=True)
    mcmc.run()
    draws = mcmc.get_samples()
    pvalues = {}
    for site, value in (("phi", truth.phi), ("tau", truth.tau)):
        ranks = (draws[site] < value).sum(0)
        counts = torch.bincount(ranks, minlength=20).numpy()
        pvalues[site] = float(stats.chisquare(counts.reshape(10, 2).sum(1)).pvalue)
    assert min(pvalues.values()) > 0.01 / (len(pvalues) * len(SCALES)), pvalues

"""What new users of the sampler met with in their first hours, each as a program that now gives the right answer, or
says in words what is wrong."""

from __future__ import annotations

import logging
import math
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from programs import vectorised
from pyro.infer import NUTS, Predictive
from pyro.infer import mcmc as pyro_mcmc
from pyro.ops.streaming import StatsOfDict
from torch import Tensor
from zoo_programs import COUNTS, COUNTY, EXPOSURE, FLOOR, GROUPS, RADON, U, schools, schools_raw

from pyro_lift import (
    MCMC,
    SGLD,
    OnlineGaussianMixture,
    SGLDGibbs,
    StreamingMCMC,
    from_mcmc,
    summarise,
    whole,
)

TABLE: dict[str, Any] = {"phi_update": "langevin", "accumulator": "table"}


def run(kernel: Any, draws: int, warmup: int, **options: Any) -> MCMC:
    mcmc = MCMC(kernel, draws, warmup_steps=warmup, disable_progbar=True, **options)
    mcmc.run()
    return mcmc


# ---------------------------------------------------------------------------------------- a scale in a logistic model

LOGIT_X = torch.tensor([[1.0, -1.0], [1.0, 1.0]]).repeat(8, 10, 1)
LOGIT_Y = (torch.arange(8 * 20).view(8, 20) * 7 % 11 < 5).float()


def logistic() -> None:
    """Hierarchical logistic regression with one unknown scale, one task a visit."""
    mu = pyro.sample("mu", dist.Normal(torch.zeros(2), 2.0).to_event(1))
    tau = pyro.sample("tau", dist.HalfNormal(1.0))
    with pyro.plate("tasks", 8, subsample_size=1) as index:
        w = pyro.sample("w", dist.Normal(mu, tau).to_event(1))
        logits = torch.einsum("gnd,gd->gn", LOGIT_X[index], w)
        pyro.sample("y", dist.Bernoulli(logits=logits).to_event(1), obs=LOGIT_Y[index])


def rates(block: int | None) -> Any:
    def model() -> None:
        a = pyro.sample("a", dist.Gamma(2.0, 1.0))
        b = pyro.sample("b", dist.Gamma(2.0, 1.0))
        with pyro.plate("tasks", 20, subsample_size=block) as index:
            rate = pyro.sample("rate", dist.Gamma(a, b))
            pyro.sample("y", dist.Poisson(rate * EXPOSURE[index]), obs=COUNTS[index])

    return model


def test_the_table_steps_far_below_its_limit_when_no_step_is_given() -> None:
    for model in (logistic, rates(1)):
        kernel = SGLDGibbs(model, seed=0, **TABLE)
        kernel.setup(10)
        chosen = kernel.chain.settings.phi_eta(0)
        larger = SGLDGibbs(model, seed=0, phi_step_size=50.0 * chosen, **TABLE)
        larger.setup(10)  # the limit is fifty times as far
        assert 0.0 < chosen < 0.01


def test_a_short_run_of_the_table_says_that_it_cannot_be_trusted(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="pyro_lift"):
        run(SGLDGibbs(logistic, seed=0, step_size=0.01, **TABLE), 100, 5)
    assert "this run cannot be trusted yet" in caplog.text and "independent ones" in caplog.text


def test_a_scale_of_logistic_weights_is_drawn_exactly_and_rates_are_moved_whole() -> None:
    exact, together = SGLDGibbs(logistic, seed=0), SGLDGibbs(rates(1), seed=0)
    exact.setup(4)
    together.setup(4)
    assert set(exact.chain.structure.scales) == {"tau"} and exact.chain.settings.phi_update == "gibbs"
    assert together.chain.settings.phi_update == "nuts" and together.chain.structure.block_size == 20


# ---------------------------------------------------------------------------------------- eight schools


@pytest.mark.parametrize("kernel", [SGLDGibbs, SGLD])
@pytest.mark.parametrize("model", [schools, schools_raw])
def test_eight_schools_start_at_a_finite_point_and_move(model: Any, kernel: Any) -> None:
    chosen = kernel(model, seed=0)
    draws = run(chosen, 4, 4).get_samples()
    assert all(bool(torch.isfinite(x).all()) for x in draws.values())
    assert float(draws["tau"].std()) > 0.0


# ---------------------------------------------------------------------------------------- what was silently wrong


def one_task_a_visit() -> None:
    """The first program of the README of then."""
    phi = pyro.sample("phi", dist.Normal(torch.zeros(2), 2.0).to_event(1))
    with pyro.plate("tasks", 20, subsample_size=1):
        theta = pyro.sample("theta", dist.Normal(phi, 0.5).to_event(1))
        pyro.sample("y", dist.Normal(theta.unsqueeze(-2), 1.0).to_event(2), obs=torch.ones(1, 30, 2))


def test_a_chain_that_has_not_moved_is_not_let_pass(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="pyro_lift"):
        mcmc = run(SGLDGibbs(one_task_a_visit, step_size=0.002, seed=0), 100, 20)
    assert "this run cannot be trusted yet" in caplog.text
    doubts = " ".join(summarise(mcmc).doubts)
    assert "larger subsample_size" in doubts and "relaxation times" in doubts


def test_the_same_program_runs_under_nuts_once_its_subsampling_is_taken_out() -> None:
    with pytest.raises(NotImplementedError):
        pyro_mcmc.MCMC(NUTS(one_task_a_visit), 1, 1, disable_progbar=True).run()

    def full() -> None:
        phi = pyro.sample("phi", dist.Normal(torch.zeros(1), 1.0).to_event(1))
        with pyro.plate("tasks", 3, subsample_size=1) as index:
            theta = pyro.sample("theta", dist.Normal(phi, 0.5).to_event(1))
            pyro.sample("y", dist.Normal(theta, 1.0).to_event(1), obs=torch.ones(3, 1)[index])

    mcmc = pyro_mcmc.MCMC(NUTS(whole(full)), 2, 2, disable_progbar=True)
    mcmc.run()
    assert mcmc.get_samples()["theta"].shape == (2, 3, 1)


def test_the_visited_tasks_log_likelihood_goes_by_another_name_and_theta_is_kept_when_asked_for() -> None:
    mcmc = run(SGLDGibbs(vectorised(None), step_size=0.1, seed=0, keep_theta=True), 6, 4)
    data = from_mcmc(mcmc)
    assert "log_likelihood" not in data["sample_stats"] and "visit_log_likelihood" in data["sample_stats"]
    draws = mcmc.get_samples()
    assert draws["theta"].shape == (6, 6, 2)
    free = pyro.poutine.uncondition(vectorised(None))
    again = Predictive(free, draws)()["y"]
    # New rows of the same tasks: as far from their theta as the noise of the rows says.
    assert float((again - draws["theta"].unsqueeze(-2)).std()) == pytest.approx(1.0, abs=0.2)


# ---------------------------------------------------------------------------------------- radon, written in three ways


def in_a_loop() -> None:
    """Ragged tasks in a loop, unknown scales and noise."""
    a = pyro.sample("a", dist.Normal(0.0, 5.0))
    sd = pyro.sample("sd", dist.HalfCauchy(1.0))
    sigma = pyro.sample("sigma", dist.HalfCauchy(1.0))
    for i in pyro.plate("tasks", 4):
        rows = RADON[i == COUNTY]
        alpha = pyro.sample(f"alpha_{i}", dist.Normal(a, sd))
        with pyro.plate(f"rows_{i}", len(rows)):
            pyro.sample(f"y_{i}", dist.Normal(alpha, sigma), obs=rows)


def outside() -> None:
    """The same tasks, their rows in a plate of their own."""
    a = pyro.sample("a", dist.Normal(0.0, 5.0))
    sd = pyro.sample("sd", dist.HalfCauchy(1.0))
    sigma = pyro.sample("sigma", dist.HalfCauchy(1.0))
    own = COUNTY < 4
    with pyro.plate("tasks", 4):
        alpha = pyro.sample("alpha", dist.Normal(a, sd))
    with pyro.plate("rows", int(own.sum())):
        pyro.sample("y", dist.Normal(alpha[COUNTY[own]], sigma), obs=RADON[own])


def test_a_loop_over_ragged_tasks_and_rows_outside_the_plate_are_one_posterior() -> None:
    densities = []
    for model in (in_a_loop, outside):
        kernel = SGLDGibbs(model, seed=0)
        kernel.setup(4)
        assert kernel.chain.settings.phi_update == "nuts"
        kernel.sample(kernel.initial_params)
        run = kernel.chain.program.run({}, {}, torch.arange(4), None, want_grad=False)
        seen = sum(float(site.log_prob()) for site in run.observed)
        densities.append(seen + float(run.log_prior(run.latents)))
    assert densities[0] == pytest.approx(densities[1], rel=1e-5)


def three_levels() -> None:
    """Regions of tasks: a task's mean is its region's, and regions are around a mean of their own."""
    mu = pyro.sample("mu", dist.Normal(0.0, 2.0))
    spread = pyro.sample("spread", dist.HalfNormal(1.0))
    region = pyro.sample("region", dist.Normal(mu, spread).expand([4]).to_event(1))
    with pyro.plate("tasks", 12) as index:
        theta = pyro.sample("theta", dist.Normal(region[index % 4], 0.5))
        pyro.sample("y", dist.Normal(theta, 0.3), obs=torch.linspace(-1.0, 3.0, 12)[index])


def test_three_levels_are_moved_whole() -> None:
    kernel = SGLDGibbs(three_levels, seed=0)
    kernel.setup(4)
    assert kernel.chain.settings.phi_update == "nuts"
    assert len(U) == GROUPS and len(FLOOR) == len(COUNTY)


# ---------------------------------------------------------------------------------------- options and containers


def test_names_of_the_users_own_reach_arviz() -> None:
    mcmc = run(SGLDGibbs(vectorised(None), step_size=0.1, seed=0), 4, 2)
    data = from_mcmc(mcmc, coords={"side": ["left", "right"]}, dims={"phi": ["side"]})
    assert data["posterior"]["phi"].sel(side="left").shape == (1, 4)


def test_a_mixture_as_the_statistics_of_a_run_is_told_to_be_of_each_site() -> None:
    kernel = SGLDGibbs(vectorised(None), step_size=0.1, seed=0)
    with pytest.raises(TypeError, match=r"StatsOfDict\(default=lambda: OnlineGaussianMixture"):
        StreamingMCMC(kernel, 4, statistics=OnlineGaussianMixture(2))
    streaming = StreamingMCMC(
        kernel, 4, 2, statistics=StatsOfDict(default=lambda: OnlineGaussianMixture(1)), disable_progbar=True
    )
    streaming.run()


def test_a_step_of_phi_that_is_not_used_is_said(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="pyro_lift"):
        SGLDGibbs(vectorised(1), step_size=0.1, phi_step_size=0.01, seed=0).setup(2)
    assert "phi_step_size is not used: phi is drawn exactly" in caplog.text


def test_diagnostics_are_short_enough_to_be_printed() -> None:
    mcmc = run(SGLDGibbs(vectorised(None), step_size=0.1, seed=0), 200, 2)
    assert len(str(mcmc.diagnostics())) < 100_000


# ---------------------------------------------------------------------------------------- right answers, slowly


@pytest.mark.slow
def test_rates_have_the_posterior_of_a_grid() -> None:
    """Rates integrate out of the likelihood: counts are negative binomial given a and b."""
    log_a, log_b = torch.meshgrid(
        torch.linspace(-2.0, 4.0, 300).double(), torch.linspace(-3.0, 4.0, 300).double(), indexing="ij"
    )
    a, b = log_a.exp(), log_b.exp()
    density = dist.Gamma(2.0, 1.0).log_prob(a) + log_a + dist.Gamma(2.0, 1.0).log_prob(b) + log_b
    for count, exposure in zip(COUNTS.double(), EXPOSURE.double(), strict=True):
        density = density + a * b.log() - (a + count) * (b + exposure).log() + torch.lgamma(a + count) - torch.lgamma(a)
    weight = (density - density.max()).exp()
    weight = weight / weight.sum()
    draws = run(SGLDGibbs(rates(None), seed=1), 1_000, 500).get_samples()
    for site, value in (("a", a), ("b", b)):
        mean = float((weight * value).sum())
        sd = math.sqrt(float((weight * value.square()).sum()) - mean**2)
        x: Tensor = draws[site].double()
        assert abs(float(x.mean()) - mean) < 0.2 * sd and float(x.std()) == pytest.approx(sd, rel=0.2)

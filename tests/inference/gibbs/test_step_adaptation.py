"""Steps that nobody chose: by family, to the stated bias, by the curvature where the chain is, frozen in the end."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from programs import vectorised

from pyro_lift import MCMC, SGLDGibbs
from pyro_lift.inference.stability import DEFAULT_SHARE


def run(kernel: SGLDGibbs, num_samples: int = 4, warmup: int = 12, **options: Any) -> MCMC:
    mcmc = MCMC(kernel, num_samples, warmup, disable_progbar=True, **options)
    mcmc.run()
    return mcmc


def families(first: float, second: float, rows: Callable[[int], int] = lambda i: 4) -> Callable[[], None]:
    """Two families of tasks' own, seen apart, with noise of two sizes, and a head that both hang on the rows of."""

    def model() -> None:
        phi = pyro.sample("phi", dist.Normal(torch.zeros(2).double(), 1.0).to_event(1))
        for i in pyro.plate("tasks", 6, subsample_size=1):
            theta = pyro.sample(f"theta_{i}", dist.Normal(phi, 1.0).to_event(1))
            head = pyro.sample(f"head_{i}", dist.Normal(torch.zeros(3).double(), 1.0).to_event(1))
            n = rows(i)
            pyro.sample(f"y_{i}", dist.Normal(theta, first).expand([n, 2]).to_event(2), obs=torch.ones(n, 2).double())
            pyro.sample(f"z_{i}", dist.Normal(head, second).expand([n, 3]).to_event(2), obs=torch.ones(n, 3).double())

    return model


def test_each_family_has_the_step_of_its_own_curvature() -> None:
    """Curvature 4 / 0.1^2 of theta's likelihood and 4 of the head's: neither is slowed by the other."""
    kernel = SGLDGibbs(families(0.1, 1.0), seed=0)
    run(kernel)
    report = kernel.report()
    assert report["step_size (theta)"] == pytest.approx(4 * DEFAULT_SHARE / 400.0, rel=1e-6)
    assert report["step_size (head)"] == pytest.approx(4 * DEFAULT_SHARE / 4.0, rel=1e-6)
    assert report["a_theta (phi)"] == pytest.approx(4 * DEFAULT_SHARE / 400.0 / 2.0, rel=1e-6)


@pytest.mark.parametrize("integrator", ["euler", "exponential"])
def test_the_stiffest_direction_of_all_families_together_is_as_much_too_wide_as_is_said(integrator: Any) -> None:
    """Two families seen by their sum alone: priors of precision 1 and 4, and a likelihood of 4 in each and between.

    Euler's variance is 1 / (1 - 5 %) of the exact one along the stiffest direction, with the priors; the exponential
    integrator's is held to the likelihood's.
    """

    def model() -> None:
        phi = pyro.sample("phi", dist.Normal(torch.zeros(()).double(), 1.0))
        for i in pyro.plate("tasks", 3, subsample_size=1):
            theta = pyro.sample(f"theta_{i}", dist.Normal(phi, 1.0))
            head = pyro.sample(f"head_{i}", dist.Normal(torch.zeros(()).double(), 0.5))
            pyro.sample(f"y_{i}", dist.Normal(theta + head, 0.5), obs=torch.ones(()).double())

    kernel = SGLDGibbs(model, integrator=integrator, seed=0)
    run(kernel)
    hessian = torch.tensor([[4.0, 4.0], [4.0, 4.0]]).double()
    hessian = hessian + (torch.diag(torch.tensor([1.0, 4.0]).double()) if integrator == "euler" else 0.0)
    root = torch.tensor([float(kernel.report()[f"step_size ({name})"]) for name in ("theta", "head")]).double().sqrt()
    stiffest = float(torch.linalg.eigvalsh(root[:, None] * hessian * root).max())
    assert 0.25 * stiffest == pytest.approx(DEFAULT_SHARE, rel=1e-6)


def poisson(start: float) -> Callable[[], None]:
    """Rates near e^3, from a start whose rates are far smaller: the curvature there is no guide."""

    def model() -> None:
        phi = pyro.sample("phi", dist.Normal(torch.tensor(start).double(), 3.0))
        with pyro.plate("tasks", 8, subsample_size=2) as index:
            theta = pyro.sample("theta", dist.Normal(phi, 0.5))
            pyro.sample("y", dist.Poisson(theta.exp()), obs=torch.full((8,), 20.0).double()[index])

    return model


def test_the_step_follows_the_curvature_to_where_the_chain_goes() -> None:
    kernel = SGLDGibbs(poisson(0.0), seed=2)
    kernel.setup(400)
    begin = kernel.report()["step_size"]
    mcmc = run(kernel, 10, 400)
    assert float(mcmc.get_samples()["phi"].mean()) > 2.0
    assert float(kernel.report()["step_size"]) < 0.5 * float(begin)
    assert 12.0 < float(kernel.report()["curvature"]) < 60.0


def test_a_start_that_curves_more_than_the_posterior_is_forgotten() -> None:
    kernel = SGLDGibbs(poisson(4.5), seed=2)
    kernel.setup(400)
    begin = kernel.report()["step_size"]
    run(kernel, 10, 400)
    assert float(kernel.report()["step_size"]) > 1.3 * float(begin)


def test_steps_are_frozen_after_the_warm_up_and_one_that_was_chosen_stands() -> None:
    kernel = SGLDGibbs(poisson(3.0), seed=0)
    stats = run(kernel, 30, 20).diagnostics()["sample_stats"]["chain 0"]
    assert len(set(stats["step_size"])) == 1
    chosen = SGLDGibbs(poisson(3.0), step_size=0.01, seed=0)
    assert run(chosen, 5, 20).diagnostics()["sample_stats"]["chain 0"]["step_size"] == [0.01] * 5
    assert not chosen.state.tuned


def test_a_task_of_many_rows_is_measured_at_its_first_visit() -> None:
    """Five tasks of two rows, one of 400: at the steps of the others it would leave the finite numbers."""
    kernel = SGLDGibbs(families(1.0, 1.0, lambda i: 400 if i == 4 else 2), seed=0)
    mcmc = run(kernel, 12, 60)
    assert float(kernel.report()["curvature"]) == pytest.approx(400.0, rel=1e-6)
    assert bool(torch.isfinite(mcmc.get_samples()["phi"]).all())


def test_such_a_task_is_refused_by_its_number_where_the_warm_up_did_not_see_it() -> None:
    with pytest.raises(
        ValueError, match=r"task 4: it is visited first after the warm-up, .* pass a value for step_size"
    ):
        run(SGLDGibbs(families(1.0, 1.0, lambda i: 400 if i == 4 else 2), seed=0), 12, 2)


def test_an_adapted_chain_goes_on_from_a_checkpoint_as_it_would_have(tmp_path: Any) -> None:
    whole = run(SGLDGibbs(vectorised(), seed=3), 6, 10).get_samples()["phi"]
    with_folder = SGLDGibbs(vectorised(), seed=3)
    mcmc = MCMC(with_folder, 6, 10, disable_progbar=True)
    mcmc.run(checkpoint=tmp_path / "run", checkpoint_every=5)
    assert torch.equal(mcmc.get_samples()["phi"], whole)
    again = MCMC(SGLDGibbs(vectorised(), seed=3), 9, 10, disable_progbar=True)
    again.run(resume=tmp_path / "run")
    assert torch.equal(again.get_samples()["phi"], run(SGLDGibbs(vectorised(), seed=3), 9, 10).get_samples()["phi"])


@pytest.mark.parametrize("precision", [1.0, 1e4])
def test_a_narrow_prior_slows_no_exponential_step_and_the_bias_is_below_what_is_said(precision: float) -> None:
    """The step's own law: x' = c + e (x - c) - K h (x - m) + noise of variance (1 - e^2) / p, in closed form."""

    def model() -> None:
        phi = pyro.sample("phi", dist.Normal(torch.zeros(()).double(), 1.0))
        with pyro.plate("tasks", 4, subsample_size=1) as index:
            theta = pyro.sample("theta", dist.Normal(phi, precision**-0.5))
            pyro.sample("y", dist.Normal(theta, 0.5), obs=torch.ones(4).double()[index])

    kernel = SGLDGibbs(model, seed=0)
    run(kernel)
    eta, h, p = float(kernel.report()["step_size"]), 4.0, precision
    assert eta == pytest.approx(4 * DEFAULT_SHARE / max(h, 0.01 * p), rel=1e-6)
    decay = math.exp(-eta * p / 2)
    variance = (1 - decay**2) / p / (1 - (decay - (1 - decay) / p * h) ** 2)
    assert 1.0 <= variance * (p + h) <= 1.0 / (1.0 - DEFAULT_SHARE)
    assert variance * (p + h) == pytest.approx(1.0 / (1.0 - h / p * math.tanh(eta * p / 4)), rel=1e-9)


def test_data_that_say_nothing_let_theta_be_drawn_afresh() -> None:
    def model() -> None:
        phi = pyro.sample("phi", dist.Normal(torch.zeros(()).double(), 1.0))
        with pyro.plate("tasks", 4, subsample_size=1) as index:
            theta = pyro.sample("theta", dist.Normal(phi, 0.1))
            pyro.sample("y", dist.Normal(theta, 1e6), obs=torch.ones(4).double()[index])

    kernel = SGLDGibbs(model, seed=0)
    run(kernel)
    assert float(kernel.report()["a_theta (phi)"]) == pytest.approx(10.0, rel=1e-6)


def test_an_unknown_scale_of_theta_does_not_hold_its_step() -> None:
    """Eight groups alike with HalfCauchy: the step is of the likelihood's curvature, 4, wherever the scale wanders."""

    def model() -> None:
        phi = pyro.sample("phi", dist.Normal(torch.zeros(()).double(), 1.0))
        tau = pyro.sample("tau", dist.HalfCauchy(torch.ones(()).double()))
        with pyro.plate("tasks", 8, subsample_size=1) as index:
            theta = pyro.sample("theta", dist.Normal(phi, tau))
            pyro.sample("y", dist.Normal(theta, 0.5), obs=torch.ones(8).double()[index])

    kernel = SGLDGibbs(model, seed=0)
    run(kernel, 10, 120)
    assert float(kernel.report()["step_size"]) == pytest.approx(4 * DEFAULT_SHARE / 4.0, rel=0.5)

"""Families of correlated coordinates: phi, theta, scales and correlations against closed forms and the prior."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

from pyro_lift import MCMC, SGLDGibbs
from pyro_lift.inference.gibbs.dense import draw_mean

Model = Callable[[], None]
N, D = 5, 2
Y = torch.linspace(-2.0, 3.0, N * 4 * D, dtype=torch.float64).view(N, 4, D).sin()
KNOWN = torch.tensor([[1.0, 0.3], [0.3, 0.5]]).double()


def double(*values: float) -> Tensor:
    return torch.tensor(values[0] if len(values) == 1 else values, dtype=torch.float64)


def correlated(
    block: int = 1, data: bool = True, loop: bool = False, written: str = "scale_tril", tasks: int = N
) -> Model:
    """Scales by coordinate and correlations, both unknown; ``written`` says how."""

    def law(phi: Tensor, tau: Tensor, L: Tensor) -> Any:
        if written == "covariance":
            return dist.MultivariateNormal(phi, (tau.diag() @ L) @ (tau.diag() @ L).T)
        if written == "known":
            return dist.MultivariateNormal(phi, KNOWN)
        if written == "known correlations":
            root = torch.linalg.cholesky(torch.tensor([[1.0, 0.4], [0.4, 1.0]]).double())
            return dist.MultivariateNormal(phi, scale_tril=tau.unsqueeze(-1) * root)
        return dist.MultivariateNormal(phi, scale_tril=tau.unsqueeze(-1) * L)

    def model() -> None:
        phi = pyro.sample("phi", dist.Normal(double(0.5, -1.0), 1.0).to_event(1))
        tau, L = double(1.0, 1.0), torch.eye(2).double()
        if written != "known":
            tau = pyro.sample("tau", dist.LogNormal(double(-0.5, 0.0), 0.4).to_event(1))
        if written in ("scale_tril", "covariance"):
            L = pyro.sample("L", dist.LKJCholesky(2, double(2.0)))
        if loop:
            for i in pyro.plate("tasks", tasks, subsample_size=block):
                theta = pyro.sample(f"theta_{i}", law(phi, tau, L))
                if data:
                    pyro.sample(f"y_{i}", dist.Normal(theta.expand(4, D), 1.0).to_event(2), obs=Y[i])
            return
        with pyro.plate("tasks", tasks, subsample_size=block) as index:
            theta = pyro.sample("theta", law(phi, tau, L))
            if data:
                pyro.sample("y", dist.Normal(theta.unsqueeze(-2), 1.0).to_event(2), obs=Y[index])

    return model


PROGRAMS = {
    "scale_tril": (correlated(), {"tau", "L"}),
    "covariance": (correlated(2, written="covariance"), {"tau", "L"}),
    "in a loop": (correlated(2, loop=True), {"tau", "L"}),
    "known": (correlated(2, written="known"), set()),
    "known correlations": (correlated(written="known correlations"), {"tau"}),
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_the_scatter_is_that_of_the_stored_theta(name: str) -> None:
    model, free = PROGRAMS[name]
    kernel = SGLDGibbs(model, step_size=0.05, seed=1)
    kernel.setup(0)
    structure = kernel.chain.structure
    assert set(structure.scales) == free and list(structure.pairs) == ["phi"] and not structure.reasons
    for _ in range(4 * N):
        kernel.sample(kernel.initial_params)
    rest = torch.stack([kernel.theta(i)["theta"] for i in range(N)])
    torch.testing.assert_close(kernel.state.sums["phi"], rest.sum(0), rtol=1e-9, atol=1e-9)
    rest = rest - kernel.state.phi["phi"]
    if free:
        torch.testing.assert_close(kernel.state.squares["phi"], rest.T @ rest, rtol=1e-8, atol=1e-9)


def test_phi_given_theta_is_the_closed_form_multivariate_normal() -> None:
    S, noise = double(3.0, -2.0), torch.zeros(2).double()
    A = torch.eye(2).double() / 4.0 + 7 * torch.linalg.inv(KNOWN)
    mean = torch.linalg.solve(A, double(1.0, 2.0) / 4.0 + torch.linalg.inv(KNOWN) @ S)
    args = (double(1.0, 2.0), double(0.25), KNOWN, S, 7)
    torch.testing.assert_close(draw_mean(*args, noise), mean)
    roots = torch.stack([draw_mean(*args, row) - mean for row in torch.eye(2).double()], 1)
    torch.testing.assert_close(roots @ roots.T, torch.linalg.inv(A))


def batches(z: Tensor) -> tuple[float, float]:
    """Mean and its Monte-Carlo error, from 25 batches longer than the memory of the chain."""
    parts = z.view(25, -1).mean(1)
    return float(parts.mean()), float(parts.std()) / 5.0


@pytest.mark.parametrize("visits", [600, pytest.param(5_000, marks=pytest.mark.slow)])
def test_a_chain_without_data_has_the_prior_for_its_law(visits: int) -> None:
    """Theta's step is exact under its prior for any step size, and everything else is drawn exactly."""
    kernel = SGLDGibbs(correlated(2, data=False, tasks=2), step_size=50.0, seed=2, check_stability=False)
    mcmc = MCMC(kernel, visits, warmup_steps=20, disable_progbar=True)
    mcmc.run()
    draws = mcmc.get_samples()
    z = (draws["tau"].log() - double(-0.5, 0.0)) / 0.4
    r = draws["L"][:, 1, 0]
    # The correlation under LKJ(eta) in two dimensions is 2 Beta(eta, eta) - 1, of variance 1 / (2 eta + 1).
    wanted = {"tau 0": (z[:, 0], 0.0), "tau 1": (z[:, 1], 0.0), "tau 0 squared": (z[:, 0] ** 2, 1.0)}
    wanted |= {"correlation": (r, 0.0), "correlation squared": (r**2, 0.2)}
    for name, (values, truth) in wanted.items():
        mean, error = batches(values)
        assert abs(mean - truth) < 4.0 * error < 0.8, (name, mean, truth, error)


@pytest.mark.parametrize(("option", "value"), [("integrator", "euler"), ("preconditioner", "rms")])
def test_options_that_correlated_coordinates_do_not_allow_are_refused(option: str, value: str) -> None:
    kernel = SGLDGibbs(correlated(), step_size=0.05, **{option: value})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="multivariate normal"):
        kernel.setup(0)


def test_correlations_that_hang_on_the_scale_are_refused() -> None:
    def model() -> None:
        phi = pyro.sample("phi", dist.Normal(torch.zeros(2).double(), 1.0).to_event(1))
        tau = pyro.sample("tau", dist.HalfNormal(double(1.0)))
        with pyro.plate("tasks", N, subsample_size=1) as index:
            covariance = tau * KNOWN + torch.eye(2).double()
            theta = pyro.sample("theta", dist.MultivariateNormal(phi, covariance))
            pyro.sample("y", dist.Normal(theta.unsqueeze(-2), 1.0).to_event(2), obs=Y[index])

    with pytest.raises(ValueError, match="correlations of the local site 'theta'"):
        SGLDGibbs(model, step_size=0.05).setup(0)

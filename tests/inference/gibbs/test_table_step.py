"""The default step of phi with the table of gradients: 2 % of the limit, measured for programs without pairs."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from programs import vectorised

from pyro_lift import SGLDGibbs


def default_of(model: object, **options: object) -> float:
    kernel = SGLDGibbs(model, step_size=0.05, phi_update="langevin", accumulator="table", seed=0, **options)  # type: ignore[arg-type]
    kernel.setup(0)
    return kernel.chain.settings.phi_eta(0)


@pytest.mark.parametrize("block", [1, 2])
def test_for_normal_pairs_it_is_two_per_cent_of_the_limit_in_closed_form(block: int) -> None:
    assert default_of(vectorised(block)) == pytest.approx(0.02 * math.pi**2 * 0.25 * block / 36, rel=1e-3)


@pytest.mark.parametrize("tau", [0.3, 2.0])
def test_for_a_program_without_pairs_the_limit_is_that_of_its_conditional_at_the_start(tau: float) -> None:
    """One task pulls phi with curvature 1/tau^2, the logarithm of tau with 2, and both together with 2/tau one off."""
    y = torch.linspace(-1.0, 1.0, 30, dtype=torch.float64).view(6, 5)

    def model() -> None:
        phi = pyro.sample("phi", dist.Normal(torch.tensor(0.0).double(), 1e3))
        scale = pyro.sample("tau", dist.LogNormal(torch.tensor(math.log(tau) - 0.5).double(), 1.0))
        with pyro.plate("tasks", 6, subsample_size=2) as index:
            theta = pyro.sample("theta", dist.Normal(phi, scale))
            pyro.sample("y", dist.Normal(theta.unsqueeze(-1), 1.0).to_event(1), obs=y[index])

    hessian = torch.tensor([[1.0 / tau**2, 2.0 / tau], [2.0 / tau, 2.0]], dtype=torch.float64)
    largest = float(torch.linalg.eigvalsh(hessian).max())
    assert default_of(model) == pytest.approx(0.02 * math.pi**2 * 2 / (36 * largest), rel=0.01)


def test_a_step_of_ones_own_is_taken_as_it_is() -> None:
    assert default_of(vectorised(1), phi_step_size=1e-4) == 1e-4

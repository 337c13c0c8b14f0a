"""Blocks of tasks: the theta_i are independent given phi, so a block of any size samples the same law."""

from __future__ import annotations

import math
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from programs import Model
from torch import Tensor

from pyro_lift import SGLDGibbs

N, COLUMNS, K = 6, 2_500, 4.5
BETA, SIGMA, NOISE = 0.5, 1.0, 0.4
Y = torch.tensor([1.0, 0.2, -0.5, 0.9, 1.7, 0.1], dtype=torch.float64)


def columns(block: int) -> Model:
    """The same data in thousands of columns: every visit of one chain is a visit of as many independent chains."""
    zero = torch.zeros(COLUMNS, dtype=torch.float64)

    def model() -> None:
        phi = pyro.sample("phi", dist.Normal(zero, SIGMA).to_event(1))
        with pyro.plate("tasks", N, subsample_size=block) as index:
            theta = pyro.sample("theta", dist.Normal(phi, BETA).to_event(1))
            y = Y[index].unsqueeze(-1).expand(-1, COLUMNS)
            pyro.sample("y", dist.Normal(theta, NOISE).to_event(1), obs=y)

    return model


def exact() -> tuple[Tensor, Tensor]:
    """Mean and covariance of (phi, theta_1..N)."""
    precision = torch.zeros(N + 1, N + 1, dtype=torch.float64)
    precision[0, 0] = 1 / SIGMA**2 + N / BETA**2
    precision[1:, 1:] = torch.eye(N) * (1 / BETA**2 + 1 / NOISE**2)
    precision[0, 1:] = precision[1:, 0] = -1 / BETA**2
    covariance = torch.linalg.inv(precision)
    return covariance @ torch.cat([torch.zeros(1).double(), Y / NOISE**2]), covariance


@pytest.mark.parametrize(
    ("block", "options"),
    [(1, {}), (2, {}), (3, {}), (6, {}), (2, {"scan": "random"}), (3, {"theta_steps_per_visit": 2})],
    ids=str,
)
def test_a_block_of_any_size_has_the_law_of_one(block: int, options: dict[str, Any]) -> None:
    # A step of 4 % of the largest stable one: theta's variance is 2 % too wide, half a standard error below.
    step = 0.04 * 4 / (1 / BETA**2 + 1 / NOISE**2)
    kernel = SGLDGibbs(columns(block), step_size=step, **options)
    pyro.set_rng_seed(block)
    kernel.setup(0)
    params = kernel.initial_params
    sweeps = 50 if "theta_steps_per_visit" in options else 90
    with pyro.validation_enabled(False):
        for _ in range(sweeps * N // block):
            params = kernel.sample(params)
    values = torch.stack([params["phi"], *(kernel.theta(i)["theta"] for i in range(N))])
    mean, covariance = exact()
    spread = covariance.diagonal()
    assert ((values.mean(1) - mean).abs() / (spread / COLUMNS).sqrt()).max() < K
    found = torch.cov(values)
    error = ((spread[:, None] * spread + covariance.square()) / COLUMNS).sqrt() + 0.02 * covariance.abs()
    assert ((found - covariance).abs() / error).max() < K
    assert math.isclose(float(values.std(1)[0]), float(spread[0].sqrt()), rel_tol=0.06)

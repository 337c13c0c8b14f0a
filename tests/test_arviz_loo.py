"""What ArviZ makes of our draws beside NUTS's: the same leave-one-out score, ranks and errors; on both majors."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable
from typing import Any

import arviz as az
import pyro
import pyro.distributions as dist
import pytest
import torch
from conftest import ROOT
from pyro.infer import NUTS
from torch import Tensor

from pyro_lift import MCMC, SGLDGibbs, from_mcmc, whole

TASKS, ROWS = 8, 6
Model = Callable[[Tensor], None]


def hierarchy(scale: Callable[[Tensor], dist.Distribution], of: Callable[[Tensor], dist.Distribution]) -> Model:
    """Tasks normal around phi with an unknown spread, of a prior, and rows with a distribution given their task's."""

    def model(y: Tensor) -> None:
        phi = pyro.sample("phi", dist.Normal(torch.zeros((), dtype=torch.float64), 2.0))
        tau = pyro.sample("tau", scale(torch.ones((), dtype=torch.float64)))
        with pyro.plate("tasks", TASKS, dim=-2):
            theta = pyro.sample("theta", dist.Normal(phi, tau))
            with pyro.plate("rows", ROWS, dim=-1):
                pyro.sample("y", of(theta), obs=y)

    return model


def rates(exposure: float) -> Model:
    """Counts of tasks, by their log rates."""
    return hierarchy(dist.HalfNormal, lambda theta: dist.Poisson(exposure * theta.exp()))


def numbers(spread: float) -> Model:
    """Normal data of tasks, whose draws are all exact."""
    return hierarchy(dist.HalfCauchy, lambda theta: dist.Normal(theta, spread))


PROGRAMS: dict[str, tuple[Callable[[Tensor], None], dict[str, Any]]] = {
    "counts": (rates(3.0), {"theta_update": "hmc", "leapfrog_steps": 3}),
    "normal": (numbers(1.0), {}),
}


def data_of(name: str) -> Tensor:
    stream = torch.Generator().manual_seed(5)
    theta = 0.4 + 0.6 * torch.randn(TASKS, 1, generator=stream, dtype=torch.float64)
    if name == "counts":
        return torch.poisson(3.0 * theta.exp().expand(TASKS, ROWS), generator=stream)
    return theta + torch.randn(TASKS, ROWS, generator=stream, dtype=torch.float64)


def elpd(data: Any) -> tuple[float, float]:
    loo = az.loo(data)
    return float(loo.elpd_loo if hasattr(loo, "elpd_loo") else loo.elpd), float(loo.se)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("name", PROGRAMS)
def test_loo_is_that_of_nuts_draws_well_within_its_standard_error(name: str) -> None:
    model, options = PROGRAMS[name]
    y = data_of(name)
    ours = MCMC(SGLDGibbs(model, keep_theta=True, seed=1, **options), 800, 200, disable_progbar=True)
    ours.run(y)
    pyro.set_rng_seed(0)
    nuts = MCMC(NUTS(whole(model)), 400, 200, disable_progbar=True)
    nuts.run(y)
    (found, error), (expected, _) = (elpd(from_mcmc(run, log_likelihood=True)) for run in (ours, nuts))
    assert abs(found - expected) < 0.2 * error


@pytest.mark.slow
@pytest.mark.skipif(not az.__version__.startswith("0."), reason="this is that environment")
def test_the_tests_of_what_arviz_gets_pass_on_arviz_1() -> None:
    """In an environment of its own, which is made on the first run (some minutes, some gigabytes)."""
    make = shutil.which("make")
    if make is None:
        pytest.skip("make is not installed")
    ran = subprocess.run([make, "test-arviz1"], cwd=ROOT, capture_output=True, text=True)
    if ran.returncode and "ArviZ 1.x needs Python" in ran.stdout:
        pytest.skip("ArviZ 1.x needs Python 3.12 or newer, and there is none")
    assert ran.returncode == 0, ran.stdout[-4_000:] + ran.stderr[-2_000:]

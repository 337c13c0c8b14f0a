"""The task plate need not be called ``tasks``: the only plate with latent sites inside is taken."""

from __future__ import annotations

import logging
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

from pyro_lift import MCMC, SGLDGibbs, from_mcmc

Y = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))


def schools(y: Tensor, plate: str = "schools") -> None:
    phi = pyro.sample("phi", dist.Normal(torch.tensor(0.0), 1.0))
    with pyro.plate(plate, 5, dim=-2) as index:
        theta = pyro.sample("theta", dist.Normal(phi, 0.5))
        with pyro.plate("rows", 4, dim=-1):
            pyro.sample("y", dist.Normal(theta, 1.0), obs=y[index])


def skewed(y: Tensor, plate: str = "schools") -> None:
    """A program without exact draws, which is moved as a whole; its upper scale bounded."""
    phi = pyro.sample("phi", dist.Gamma(torch.tensor(2.0), 1.0))
    with pyro.plate(plate, 5, dim=-2):
        theta = pyro.sample("theta", dist.Gamma(2.0, phi))
        with pyro.plate("rows", 4, dim=-1):
            pyro.sample("y", dist.Normal(theta, 1.0), obs=y)


def looped(y: Tensor, plate: str = "schools") -> None:
    phi = pyro.sample("phi", dist.Normal(torch.tensor(0.0), 1.0))
    for i in pyro.plate(plate, 5, subsample_size=2):
        theta = pyro.sample(f"theta_{i}", dist.Normal(phi, 0.5))
        pyro.sample(f"y_{i}", dist.Normal(theta, 1.0).expand([4]).to_event(1), obs=y[i])


def nested(y: Tensor) -> None:
    phi = pyro.sample("phi", dist.Normal(torch.tensor(0.0), 1.0))
    with pyro.plate("regions", 5, dim=-2):
        region = pyro.sample("region", dist.Normal(phi, 0.5))
        with pyro.plate("schools", 4, dim=-1):
            pyro.sample("y", dist.Normal(pyro.sample("theta", dist.Normal(region, 1.0)), 1.0), obs=y)


def run(model: Any, chains: int = 1, **options: Any) -> MCMC:
    kernel = SGLDGibbs(model, seed=1, keep_theta=True, **options)
    mcmc = MCMC(kernel, num_samples=6, warmup_steps=4, num_chains=chains, mp_context="fork", disable_progbar=True)
    mcmc.run(Y)
    return mcmc


@pytest.mark.parametrize("model", [schools, skewed, looped])
def test_the_only_plate_with_latent_sites_is_the_task_plate(model: Any, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "pyro_lift"):
        found = run(model)
    assert caplog.text.count("the plate 'schools' is the task plate: no other holds latent sites.") == 1
    named = run(lambda y: model(y, plate="tasks"))
    for name, draws in found.get_samples().items():
        assert torch.equal(draws, named.get_samples()[name])
    assert found.kernel.plate == "schools" and named.kernel.plate == "tasks"
    assert from_mcmc(found)["posterior"]["theta"].dims[2] == "schools"


@pytest.mark.parametrize("model", [schools, skewed])
def test_chains_in_processes_of_their_own_take_it_too(model: Any) -> None:
    found, named = run(model, 2), run(model, 2, plate="schools")
    for name, draws in found.get_samples().items():
        assert torch.equal(draws, named.get_samples()[name])


def test_a_name_that_was_given_is_kept_to_and_two_plates_are_no_one() -> None:
    with pytest.raises(ValueError, match=r"no plate named 'tasks' .*'schools'"):
        run(schools, plate="tasks")
    with pytest.raises(ValueError, match=r"no plate named 'tasks' \(its plates: 'regions', 'schools'\)"):
        run(nested)
    assert run(nested, plate="regions").get_samples()["region"].shape == (6, 5, 1)

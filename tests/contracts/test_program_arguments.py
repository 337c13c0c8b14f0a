"""What a program is called with: what is missing, and data that are no tensors, are named at the door."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_lift import MCMC, SGLD, SGLDGibbs, whole

Y = np.linspace(-1.0, 1.0, 12).reshape(4, 3)


def model(y: Any, scale: float = 1.0) -> None:
    phi = pyro.sample("phi", dist.Normal(torch.tensor(0.0), 1.0))
    with pyro.plate("tasks", 4, dim=-2):
        theta = pyro.sample("theta", dist.Normal(phi, 0.5))
        with pyro.plate("rows", 3, dim=-1):
            pyro.sample("y", dist.Normal(theta, scale), obs=y)


def converting(y: Any) -> None:
    model(torch.as_tensor(y))


def of_a_dict(data: dict[str, Any]) -> None:
    model(data["y"].unsqueeze(0).squeeze(0))


def run(kernel: Any, *args: Any, **kwargs: Any) -> MCMC:
    mcmc = MCMC(kernel, num_samples=2, warmup_steps=0, disable_progbar=True)
    mcmc.run(*args, **kwargs)
    return mcmc


@pytest.mark.parametrize("kernel", [SGLDGibbs, SGLD])
def test_a_run_without_the_programs_arguments_says_which(kernel: type) -> None:
    with pytest.raises(TypeError, match=r"model\(y, scale=1.0\) cannot .* no arguments: missing .*'y'.*run\(y\)"):
        run(kernel(model))
    with pytest.raises(TypeError, match=r"with Tensor, x=\.\.\.: got an unexpected .*'x'"):
        run(kernel(whole(model)), torch.tensor(Y), x=1)


@pytest.mark.parametrize("kernel", [SGLDGibbs, SGLD])
def test_arrays_are_named_with_the_way_out(kernel: type) -> None:
    with pytest.raises(TypeError, match=r"'y' is a numpy ndarray of shape \[4, 3\].*torch\.as_tensor\(y\)"):
        run(kernel(model), Y)
    with pytest.raises(TypeError, match=r"'y' is a list.*torch\.as_tensor\(y\)"):
        run(kernel(model), y=Y.tolist())
    with pytest.raises(TypeError, match=r"data\['y'\] is a numpy ndarray.*failed with AttributeError: .*unsqueeze"):
        run(kernel(of_a_dict), {"y": Y})


def test_arrays_from_outside_the_program_are_named_by_their_site() -> None:
    with pytest.raises(TypeError, match=r"the site 'y' observes a numpy ndarray of shape \[4, 3\].*as_tensor"):
        run(SGLDGibbs(lambda: model(Y)))
    with pytest.raises(TypeError, match=r"the site 'y' observes a float"):
        run(SGLDGibbs(lambda: model(0.5)))


def test_a_program_that_takes_arrays_gets_them_as_they_are() -> None:
    given = run(SGLDGibbs(converting, seed=0), Y).get_samples()["phi"]
    assert torch.equal(given, run(SGLDGibbs(model, seed=0), torch.as_tensor(Y)).get_samples()["phi"])


def test_errors_of_a_program_with_tensors_are_its_own() -> None:
    with pytest.raises(ValueError, match="do not fit"):
        run(SGLDGibbs(model), torch.zeros(3, 4))

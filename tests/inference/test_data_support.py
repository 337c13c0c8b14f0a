"""Data that their law does not allow are refused at set-up, by name, value and place; masked rows may hold anything."""

from __future__ import annotations

import math
import re
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

from pyro_lift import MCMC, SGLD, SGLDGibbs
from pyro_lift.inference.data_support import DataOutsideSupportError, values_outside
from pyro_lift.inference.sgld import DivergedError

NAN, INF = math.nan, math.inf
ROW = torch.tensor([True, False, True])


def law(kind: str) -> Any:
    return {
        "poisson": dist.Poisson(torch.ones(3)),
        "binomial": dist.Binomial(torch.tensor([5.0, 2.0, 9.0]), logits=torch.zeros(3)),
        "bernoulli": dist.Bernoulli(logits=torch.zeros(3)),
        "categorical": dist.Categorical(logits=torch.zeros(3, 4)),
        "lognormal": dist.LogNormal(torch.zeros(3), 1.0),
        "beta": dist.Beta(torch.ones(3), 2.0),
        "dirichlet": dist.Dirichlet(torch.ones(2, 3)),
        "normal": dist.Normal(torch.zeros(3), 1.0),
        "event": dist.Normal(torch.zeros(2, 3), 1.0).to_event(1),
        "mvn": dist.MultivariateNormal(torch.zeros(2, 2), torch.eye(2)),
        "masked": dist.Poisson(torch.ones(3)).mask(ROW),
        "masked inside": dist.Normal(torch.zeros(2, 3), 1.0).mask(ROW).to_event(1),
        "masked outside": dist.Normal(torch.zeros(3, 2), 1.0).to_event(1).mask(ROW),
        "mixture": dist.MixtureSameFamily(
            dist.Categorical(torch.ones(3, 2)), dist.Gamma(torch.ones(3, 2), torch.ones(3, 2))
        ),
    }[kind]


@pytest.mark.parametrize(
    ("kind", "value", "words"),
    [
        ("poisson", [1.0, -2.0, -3.0], r"observes -2 at \[1\], and Poisson allows whole numbers from 0"),
        ("poisson", [1.0, 2.0, 2.5], r"observes 2\.5 at \[2\]"),
        ("binomial", [3.0, 3.0, 3.0], r"observes 3 at \[1\], and Binomial allows whole numbers from 0 to 2\."),
        ("bernoulli", [0.0, 1.0, 0.3], r"observes 0\.3 at \[2\], and Bernoulli allows 0 and 1.*pyro\.factor\('y'"),
        ("categorical", [3, 0, 4], r"observes 4 at \[2\], and Categorical allows whole numbers from 0 to 3"),
        ("lognormal", [1.0, 1.0, -0.5], r"observes -0\.5 at \[2\], and LogNormal allows numbers above 0"),
        ("beta", [0.2, 0.3, 1.7], r"observes 1\.7 at \[2\], and Beta allows numbers from 0 to 1"),
        ("dirichlet", [[0.2, 0.3, 0.5], [0.2, 0.3, 0.9]], r"at \[1\], and Dirichlet allows shares that add up to one"),
        ("normal", [0.0, NAN, INF], r"not finite, the first at \[1\] \(nan\).*mask"),
        ("normal", [0.0, 0.0, -INF], r"not finite, the first at \[2\] \(-inf\)"),
        ("event", [[0.0, 0.0, 0.0], [0.0, NAN, 0.0]], r"the first at \[1, 1\]"),
        ("mvn", [[0.0, 0.0], [NAN, 0.0]], r"the first at \[1\]"),
        ("masked", [1.0, -2.0, -3.0], r"observes -3 at \[2\]"),
        ("masked inside", [[0.0, NAN, 0.0], [NAN, NAN, 0.0]], r"the first at \[1, 0\]"),
        ("masked outside", [[0.0, 0.0], [NAN, NAN], [0.0, NAN]], r"the first at \[2, 1\]"),
        ("mixture", [1.0, 2.0, -1.0], r"observes -1 at \[2\]"),
    ],
)
def test_the_first_value_outside_is_told_with_its_place(kind: str, value: Any, words: str) -> None:
    assert re.search(words, values_outside("y", law(kind), torch.tensor(value)))


@pytest.mark.parametrize(
    ("kind", "value", "mask"),
    [
        ("masked", [1.0, -2.0, 3.0], None),
        ("masked inside", [[0.0, NAN, 0.0], [0.0, INF, 0.0]], None),
        ("masked outside", [[0.0, 0.0], [NAN, NAN], [0.0, 1.0]], None),
        ("poisson", [1.0, -2.0, 3.0], ROW),
        ("event", [[0.0, 0.0, NAN], [0.0, 1.0, 0.0]], torch.tensor([False, True])),
        ("poisson", [-1.0, -2.0, -3.0], False),
        ("dirichlet", [[0.2, 0.3, 0.50001], [1.0, 0.0, 0.0]], None),
        ("bernoulli", [True, False, True], None),
        ("beta", [0.0, 0.5, 1.0], None),
        ("categorical", [3, 0, 0], None),
    ],
)
def test_what_is_masked_or_within_rounding_is_let_pass(kind: str, value: Any, mask: Any) -> None:
    assert values_outside("y", law(kind), torch.tensor(value), mask) == ""


@pytest.mark.parametrize("kind", ["poisson", "binomial", "categorical", "lognormal", "normal", "event"])
def test_draws_of_a_law_are_inside_it(kind: str) -> None:
    torch.manual_seed(0)
    assert values_outside("y", law(kind), law(kind).sample((50,))) == ""


def test_a_support_that_moves_with_a_latent_site_is_not_held_against_the_data() -> None:
    top = torch.tensor(1.0, requires_grad=True)
    assert values_outside("y", dist.Uniform(0.0, top), torch.tensor([0.5, 3.0])) == ""
    assert "observes 3 at [1]" in values_outside("y", dist.Uniform(0.0, top.detach()), torch.tensor([0.5, 3.0]))


def counts(y: Tensor) -> None:
    phi = pyro.sample("phi", dist.Normal(0.0, 1.0))
    with pyro.plate("tasks", 3):
        theta = pyro.sample("theta", dist.Normal(phi, 1.0))
        pyro.sample("y", dist.Poisson(theta.exp()), obs=y)


def classes(y: Tensor) -> None:
    phi = pyro.sample("phi", dist.Normal(torch.zeros(4), 1.0).to_event(1))
    with pyro.plate("tasks", 3):
        theta = pyro.sample("theta", dist.Normal(phi, 1.0).to_event(1))
        pyro.sample("y", dist.Categorical(logits=theta), obs=y)


@pytest.mark.parametrize("model", [counts, classes])
@pytest.mark.parametrize(
    "kernel",
    [
        lambda m: SGLDGibbs(m, seed=0),
        lambda m: SGLDGibbs(m, seed=0, phi_update="gibbs"),
        lambda m: SGLDGibbs(m, seed=0, phi_update="nuts"),
        lambda m: SGLD(m, seed=0),
    ],
)
def test_every_kernel_refuses_such_data_at_set_up(model: Any, kernel: Any) -> None:
    with pytest.raises(ValueError, match=r"the site 'y' observes -1 at \[1\]") as refused:
        MCMC(kernel(model), 2, 0, disable_progbar=True).run(torch.tensor([1, -1, 3]))
    assert isinstance(refused.value, DataOutsideSupportError) and "step_size" not in str(refused.value)


def test_a_value_without_a_density_at_the_start_is_named() -> None:
    def model() -> None:
        phi = pyro.sample("phi", dist.Normal(0.0, 1.0))
        with pyro.plate("tasks", 3):
            theta = pyro.sample("theta", dist.Normal(phi, 1.0))
            pyro.sample("y", dist.Beta(2.0 + 0.0 * theta, 2.0), obs=torch.tensor([0.2, 0.0, 0.5]))

    with pytest.raises(DivergedError, match=r"at the start: the site 'y' observes 0 at \[1\], where Beta has a log"):
        MCMC(SGLDGibbs(model, seed=0, phi_update="gibbs"), 2, 0, disable_progbar=True).run()


def test_no_data_at_all_are_said_to_be_empty() -> None:
    with pytest.raises(ValueError, match=r"the site 'y': values of shape \[0\] are none at all.*the data are empty"):
        MCMC(SGLDGibbs(counts, seed=0), 2, 0, disable_progbar=True).run(torch.zeros(0))

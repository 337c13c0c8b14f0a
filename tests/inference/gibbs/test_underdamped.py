"""Theta moved with momentum: the law of the discretised chain in closed form, what is kept, and refusals."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from programs import constrained, sequential, vectorised
from scipy.linalg import solve_discrete_lyapunov
from torch import Tensor

from pyro_lift import MCMC, SGLDGibbs

TASKS = 1_500


def alike(precision: float, likelihood: float, paired: bool = True) -> Callable[[], None]:
    """Tasks alike around a phi that is all but known, of a prior's and a likelihood's precision."""

    def model() -> None:
        phi = pyro.sample("phi", dist.Normal(torch.zeros((), dtype=torch.float64), 1e-6))
        with pyro.plate("tasks", TASKS):
            if paired:
                theta = pyro.sample("theta", dist.Normal(phi, precision**-0.5))
            else:
                pyro.sample("other", dist.Normal(phi, 1.0))
                theta = pyro.sample("theta", dist.Normal(torch.zeros(()).double(), precision**-0.5))
            pyro.sample("y", dist.Normal(theta, likelihood**-0.5), obs=torch.ones(TASKS, dtype=torch.float64))

    return model


def run(kernel: SGLDGibbs, draws: int = 4, warmup: int = 4, **options: Any) -> MCMC:
    mcmc = MCMC(kernel, draws, warmup, disable_progbar=True, **options)
    mcmc.run()
    return mcmc


def law(total: float, eta: float, c: float, T: float) -> np.ndarray[Any, Any]:
    """Covariance of theta and velocity that ABOBA leaves: of (x, v) -> M (x, v) + R xi, from the parts' matrices."""
    h = math.sqrt(eta)
    A = np.array([[1.0, h / 2], [0.0, 1.0]])
    B = np.array([[1.0, 0.0], [-h / 2 * total, 1.0]])
    O = np.diag([1.0, c])  # noqa: E741 - the part's name
    R = A @ B @ np.array([[0.0], [math.sqrt(T * (1 - c * c))]])
    covariance: np.ndarray[Any, Any] = solve_discrete_lyapunov(A @ B @ O @ B @ A, R @ R.T)
    return covariance


#: Precision of the prior and of the likelihood, eta, c, T, whether the family is paired.
CASES = {
    "a long step": (1.0, 4.0, 0.5, 0.8, 1.0, True),
    "a prior that is narrower than the step": (30.0, 2.0, 0.5, 0.7, 1.0, True),
    "cold": (1.0, 4.0, 0.3, 0.5, 0.3, True),
    "a family that is not paired": (1.0, 4.0, 0.3, 0.8, 1.0, False),
}


@pytest.mark.parametrize("name", CASES)
def test_theta_and_velocity_have_the_law_of_the_discretised_chain(name: str) -> None:
    """Of all tasks at once, after the start is forgotten; each bound is passed once in 30,000."""
    p, H, eta, c, T, paired = CASES[name]
    model = alike(p, H, paired)
    options: dict[str, Any] = {"step_size": eta, "momentum": c, "temperature": T, "check_stability": False}
    kernel = SGLDGibbs(model, theta_update="underdamped", seed=1, **options)
    run(kernel, 1, 60)
    theta = torch.stack([kernel.theta(i)["theta"] for i in range(TASKS)])
    assert kernel.chain.momenta is not None
    speed = torch.stack([row[-1] for row in kernel.chain.momenta.read(range(TASKS))])
    expected = law(p + H, min(eta, 1.0 / p), c, T)
    assert expected[0, 0] == pytest.approx(T / (p + H))
    assert expected[1, 1] == pytest.approx(T / (1.0 - min(eta, 1.0 / p) * (p + H) / 4.0))
    assert abs(float(theta.mean()) - H / (p + H)) < 4.2 * math.sqrt(expected[0, 0] / TASKS)
    sample = np.cov(theta.numpy(), speed.numpy())
    spread = np.sqrt((np.outer(np.diag(expected), np.diag(expected)) + expected**2) / TASKS)
    assert bool((np.abs(sample - expected) < 4.2 * spread).all()), (sample, expected)


def test_wide_directions_relax_faster_than_by_langevin_steps() -> None:
    """At one eta, set by the stiff coordinate; theta begins at phi = 0, far from where the wide one's data are."""
    scale = torch.tensor([0.1, 3.0]).double()

    def model() -> None:
        phi = pyro.sample("phi", dist.Normal(torch.zeros(2).double(), 1e-6).to_event(1))
        with pyro.plate("tasks", 200):
            theta = pyro.sample("theta", dist.Normal(phi, 100.0).to_event(1))
            pyro.sample("y", dist.Normal(theta, scale).to_event(1), obs=torch.full((200, 2), 5.0).double())

    def come(update: Any) -> float:
        kernel = SGLDGibbs(model, theta_update=update, step_size=0.002, momentum=0.9, seed=0)
        run(kernel, 1, 150)
        return float(torch.stack([kernel.theta(i)["theta"][1] for i in range(200)]).mean())

    assert come("sgld") < 0.25 < 1.0 < come("underdamped")


@pytest.mark.parametrize("model", [sequential, lambda: vectorised(3)], ids=["loop", "block"])
@pytest.mark.parametrize("store", ["device", "disk"])
def test_a_resumed_chain_is_the_whole_one_to_the_bit(model: Callable[[], Any], store: str, tmp_path: Path) -> None:
    options: dict[str, Any] = {"theta_update": "underdamped", "step_size": 0.02, "store": store, "seed": 4}
    whole = run(SGLDGibbs(model(), **options), 8, 5).get_samples()["phi"]
    begun = MCMC(SGLDGibbs(model(), **options), 3, warmup_steps=5, disable_progbar=True)
    begun.run(checkpoint=tmp_path / "run")
    rest = MCMC(SGLDGibbs(model(), **options), 8, warmup_steps=5, disable_progbar=True)
    rest.run(resume=tmp_path / "run")
    assert torch.equal(whole, rest.get_samples()["phi"])


def test_constrained_sites_move_too() -> None:
    kernel = SGLDGibbs(
        constrained(3),
        theta_update="underdamped",
        phi_update="langevin",
        accumulator="table",
        step_size=0.01,
        phi_step_size=1e-3,
        seed=0,
    )
    draws: dict[str, Tensor] = run(kernel, 5, 5).get_samples()
    assert all(bool(torch.isfinite(value).all()) for value in draws.values())


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "rms": ({"preconditioner": "rms"}, 'preconditioner="rms": it has one mass; use site_step_scale'),
    "a translation": ({"translation": "saga"}, 'translation="saga"'),
    "an unstable step": ({"step_size": 5.0}, "step_size"),
    "no momentum": ({"momentum": 1.0}, "momentum=1.0"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_it_does_not_go_with_is_refused_by_name(name: str) -> None:
    options, words = REFUSED[name]
    with pytest.raises(ValueError, match=words):
        run(SGLDGibbs(vectorised(3), theta_update="underdamped", **{"step_size": 0.02, **options}))

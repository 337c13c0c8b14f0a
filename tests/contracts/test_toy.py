"""The linear-Gaussian toy: its exact posterior, and every update of phi against it."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pyro
import pytest
import torch
from pyro.infer import MCMC, NUTS
from torch import Tensor

from pyro_lift import SGLD, SGLDGibbs
from pyro_lift.inference.gibbs.accumulator import literal_update
from pyro_lift.inference.sgld import euler
from pyro_lift.models.linear_gaussian import Gaussian, LinearGaussian, fit, gaussian_kl


def joint_posterior(toy: LinearGaussian) -> Gaussian:
    """Mean and covariance of (phi, theta_1..N) from the full joint precision matrix, block by block."""
    N, d = toy.num_tasks, toy.dim
    eye = torch.eye(d, dtype=torch.float64)
    precision = torch.zeros((N + 1) * d, (N + 1) * d, dtype=torch.float64)
    shift = torch.zeros((N + 1) * d, dtype=torch.float64)
    precision[:d, :d] = eye / toy.sigma**2 + N * eye / toy.beta**2
    for i in range(N):
        rows = slice((i + 1) * d, (i + 2) * d)
        precision[rows, rows] = eye / toy.beta**2 + toy.x[i].mT @ toy.x[i] / toy.alpha**2
        precision[rows, :d] = precision[:d, rows] = -eye / toy.beta**2
        shift[rows] = toy.x[i].mT @ toy.y[i] / toy.alpha**2
    covariance = torch.linalg.inv(precision)
    return Gaussian(covariance @ shift, covariance)


@pytest.mark.parametrize("num_data", [1, 20])
def test_the_closed_form_equals_the_joint_gaussian(num_data: int) -> None:
    toy = LinearGaussian(7, num_data, 3, sigma=1.3, beta=0.4, alpha=0.6, seed=2)
    joint, phi = joint_posterior(toy), toy.posterior()
    torch.testing.assert_close(phi.mean, joint.mean[:3])
    torch.testing.assert_close(phi.covariance, joint.covariance[:3, :3])
    for task in (0, 6):
        part = slice(3 * (task + 1), 3 * (task + 2))
        theta = toy.task_posterior(task)
        torch.testing.assert_close(theta.mean, joint.mean[part])
        torch.testing.assert_close(theta.covariance, joint.covariance[part, part])


def test_kl_and_fit() -> None:
    generator = torch.Generator().manual_seed(0)
    root = torch.randn(2, 3, 3, generator=generator, dtype=torch.float64)
    means = torch.randn(2, 3, generator=generator, dtype=torch.float64)
    p, q = (Gaussian(m, r @ r.mT + torch.eye(3).double()) for m, r in zip(means, root, strict=True))
    first, second = (torch.distributions.MultivariateNormal(g.mean, g.covariance) for g in (p, q))
    assert gaussian_kl(p, q) == pytest.approx(float(torch.distributions.kl_divergence(first, second)))
    assert gaussian_kl(p, p) == pytest.approx(0.0, abs=1e-12)
    draws = torch.randn(50, 3, generator=generator, dtype=torch.float64)
    np.testing.assert_allclose(fit(draws).covariance.numpy(), np.cov(draws.numpy().T))


def draws_of(kernel: Any, iterations: int, seed: int = 0) -> Tensor:
    pyro.set_rng_seed(seed)
    with pyro.validation_enabled(False):  # a third of the time; the draws are the same
        mcmc = MCMC(kernel, num_samples=iterations, warmup_steps=0, disable_progbar=True)
        mcmc.run()
    return mcmc.get_samples()["phi"]  # type: ignore[no-any-return]


def kl_of(toy: LinearGaussian, draws: Tensor) -> float:
    return gaussian_kl(fit(draws[len(draws) // 10 :]), toy.posterior())


def test_gibbs_reaches_the_exact_posterior() -> None:
    toy = LinearGaussian(10, seed=0)
    assert kl_of(toy, draws_of(SGLDGibbs(toy, step_size=0.005), 1_600)) <= 0.03


@pytest.mark.slow
def test_gibbs_with_100_tasks_within_40_000_visits() -> None:
    found = []
    for seed in range(5):
        toy = LinearGaussian(100, seed=seed)
        found.append(kl_of(toy, draws_of(SGLDGibbs(toy, step_size=0.005), 40_000, seed)))
    assert np.median(found) <= 0.01, found


@pytest.mark.slow
@pytest.mark.parametrize("accumulator", ["exact", "table"])
def test_langevin_updates_reach_the_exact_posterior_at_small_steps(accumulator: str) -> None:
    toy = LinearGaussian(5, seed=0)
    limit = math.pi**2 * toy.beta**2 / 25
    kernel = SGLDGibbs(
        toy,
        step_size=0.004,
        phi_update="langevin",
        accumulator=accumulator,  # type: ignore[arg-type]
        phi_step_size=0.03 * limit,
    )
    assert kl_of(toy, draws_of(kernel, 40_000)) <= 0.02


def moments(draws: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Mean, standard deviation, and the Monte-Carlo error of both, of draws ``[chain, draw, d]``."""
    import arviz as az

    values = np.asarray(draws)
    ess_mean = np.array([az.ess(values[..., k], method="mean") for k in range(values.shape[-1])])
    ess_sd = np.array([az.ess(values[..., k], method="sd") for k in range(values.shape[-1])])
    sd = values.std((0, 1), ddof=1)
    return values.mean((0, 1)), sd, sd / np.sqrt(ess_mean), sd / np.sqrt(2 * ess_sd)


@pytest.mark.slow
def test_gibbs_and_pyros_nuts_agree_within_monte_carlo_error() -> None:
    data = LinearGaussian(10, seed=3)
    whole = LinearGaussian(10, seed=3, block_size=None)
    pyro.set_rng_seed(0)
    nuts = MCMC(NUTS(whole), num_samples=1_000, warmup_steps=200, disable_progbar=True)
    nuts.run()
    # Step 0.001 is a fortieth of the largest stable one: theta's variance is 2 % too wide, phi's 0.1 %.
    ours = draws_of(SGLDGibbs(data, step_size=0.001), 22_000)[2_000:]
    a = moments(nuts.get_samples()["phi"][None])
    b = moments(ours[None])
    assert np.abs((a[0] - b[0]) / np.hypot(a[2], b[2])).max() < 4.0
    assert np.abs((a[1] - b[1]) / np.hypot(a[3], b[3])).max() < 4.0


def test_the_tasks_own_draws_have_their_posterior() -> None:
    toy = LinearGaussian(2, seed=1)
    kernel = SGLDGibbs(toy, step_size=0.004)
    pyro.set_rng_seed(0)
    kernel.setup(0)
    params, kept = kernel.initial_params, []
    with pyro.validation_enabled(False):
        for visit in range(1_600):
            params = kernel.sample(params)
            if visit >= 200 and visit % 2 == 1:
                kept.append(kernel.theta(1)["theta"])
    exact, found = toy.task_posterior(1), torch.stack(kept)
    scale = exact.covariance.diagonal().sqrt()
    # Seven hundred draws with a correlation of about 1 - 0.17 from one to the next: some 60 of them count.
    assert ((found.mean(0) - exact.mean) / scale).abs().max() < 4.0 / math.sqrt(60)
    assert (found.std(0) / scale - 1.0).abs().max() < 4.0 / math.sqrt(2 * 60)


# --------------------------------------------------------------------------------------------- stability limits


def growth(accumulator: str, share: float, block: int, visits: int) -> float:
    """By how much a noiseless phi's distance to its fixed point grows over the second half of some visits.

    The data pin theta_i (alpha is tiny), so that the loop over phi stands alone, as in the derivation of the limits.
    """
    N = 10
    toy = LinearGaussian(N, alpha=0.01, seed=0, block_size=block)
    curvature = float(torch.linalg.eigvalsh(toy.x.mT @ toy.x / toy.alpha**2).max())
    limit = 4 / (N / toy.beta**2 + 1) if accumulator == "exact" else math.pi**2 * toy.beta**2 * block / N**2
    kernel = SGLDGibbs(
        toy,
        step_size=2.0 / curvature,
        phi_update="langevin",
        accumulator=accumulator,  # type: ignore[arg-type]
        phi_step_size=share * limit,
        integrator="euler",
        temperature=0.0,
        check_stability=False,
    )
    draws = draws_of(kernel, visits)
    distance = (draws - toy.posterior().mean).norm(dim=-1)
    window = visits // 8
    return float(distance[-window:].max() / distance[visits // 2 - window : visits // 2].max())


@pytest.mark.parametrize(("accumulator", "block", "visits"), [("exact", 1, 80), ("exact", 5, 80), ("table", 1, 480)])
def test_the_stability_limits_of_phi(accumulator: str, block: int, visits: int) -> None:
    assert growth(accumulator, 0.9, block, visits) < 0.7
    assert growth(accumulator, 1.1, block, visits) > 1.5


def test_eq_11_to_the_letter_runs_away_at_any_step_size() -> None:
    """Both gradients at the current phi: phi cancels from J, and nothing holds it back."""
    toy = LinearGaussian(10, seed=0)
    generator = torch.Generator().manual_seed(0)
    variance = torch.tensor(toy.beta**2, dtype=torch.float64)
    for share in (0.01, 0.1, 0.5):
        eta = share * math.pi**2 * toy.beta**2 / 100
        phi = J = torch.zeros(2, dtype=torch.float64)
        theta = torch.zeros(10, 2, dtype=torch.float64)
        # The drift of phi is J - phi / sigma^2 with J = S / beta^2: it grows at least as exp(eta (N / beta^2 - 1) / 2)
        # once the theta_i follow phi, which they do at the rate of their prior's share, here a twentieth.
        for visit in range(int(60.0 / (eta * 0.5 / variance))):
            i = visit % 10
            gradient = toy.x[i].mT @ (toy.y[i] - toy.x[i] @ theta[i]) / toy.alpha**2 - (theta[i] - phi) / variance
            noise = torch.randn(2, 2, generator=generator, dtype=torch.float64)
            moved = euler(theta[i], gradient, None, step_size=0.005, temperature=1.0, noise=noise[0])
            J = literal_update(J, theta[i], moved, phi, variance)
            theta[i] = moved
            phi = euler(phi, J - phi / toy.sigma**2, None, step_size=eta, temperature=1.0, noise=noise[1])
            if float(phi.norm()) > 100.0:
                break
        assert float(phi.norm()) > 100.0 * float(toy.posterior().covariance.diagonal().sqrt().max()), share


@pytest.mark.slow
def test_full_sgld_has_the_same_posterior() -> None:
    toy = LinearGaussian(3, seed=0, block_size=None)
    assert kl_of(toy, draws_of(SGLD(toy, step_size=0.005), 10_000)) <= 0.04

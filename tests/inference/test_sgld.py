"""SGLD against its own exact law: the discretised chain on a Gaussian is a Gaussian again, known in closed form."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import MCMC
from torch import Tensor

from pyro_lift import SGLD
from pyro_lift.inference import sgld
from pyro_lift.inference.schedules import as_schedule, constant, cyclical, polynomial
from pyro_lift.inference.sgld import Drift
from pyro_lift.models.priors import LocalGaussian, broadened, gaussian_at

CHAINS = 20_000
#: Standard errors that a statistical assertion allows; some fifty numbers in this file are held against it.
K = 4.5


def assert_law(draws: Tensor, mean: Tensor, covariance: Tensor) -> None:
    """Independent draws ``[C, d]`` of a Gaussian: every mean and every covariance within K standard errors."""
    C = len(draws)
    spread = covariance.diagonal()
    z_mean = (draws.mean(0) - mean) / (spread / C).sqrt()
    # Wishart: var of the (i, j) entry is (V_ii V_jj + V_ij^2) / C.
    error = ((spread[:, None] * spread + covariance.square()) / C).sqrt()
    z_cov = (torch.cov(draws.T) - covariance) / error
    assert z_mean.abs().max() < K, z_mean
    assert z_cov.abs().max() < K, z_cov


def run(density: Callable[[dict[str, Tensor]], Drift], d: int, steps: int, **options: Any) -> Tensor:
    """Last position of independent chains, all started at 3: ``[CHAINS, d]``."""
    state = sgld.init({"x": torch.full((CHAINS, d), 3.0, dtype=torch.float64)})
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        state, _ = sgld.step(state, density, sgld.SGLDSettings(**options), generator=generator)
    return state.position["x"]


def gaussian_target(P: Tensor, mean: Tensor) -> Callable[[dict[str, Tensor]], Drift]:
    def density(position: dict[str, Tensor]) -> Drift:
        gap = position["x"] - mean
        gradient = -gap @ P
        return Drift((0.5 * gap * gradient).sum(), {"x": gradient}, {"x": None})

    return density


P2 = torch.tensor([[2.0, 0.8], [0.8, 1.0]], dtype=torch.float64)
M2 = torch.tensor([0.5, -1.0], dtype=torch.float64)


@pytest.mark.parametrize(("eta", "T"), [(0.9, 1.0), (0.9, 0.3), (0.1, 2.0)])
def test_euler_has_its_own_stationary_law(eta: float, T: float) -> None:
    steps = 60 if eta > 0.5 else 400
    draws = run(gaussian_target(P2, M2), 2, steps, step_size=constant(eta), temperature=T)
    assert_law(draws, M2, T * torch.linalg.inv(P2 - 0.25 * eta * P2 @ P2))


def diagonal_target(prior: LocalGaussian, H: Tensor, centre: Tensor) -> Callable[[dict[str, Tensor]], Drift]:
    def density(position: dict[str, Tensor]) -> Drift:
        gradient = -H * (position["x"] - centre)
        return Drift(torch.zeros((), dtype=torch.float64), {"x": gradient}, {"x": prior})

    return density


@pytest.mark.parametrize(("integrator", "eta", "T"), [("exponential", 1.5, 0.4), ("euler", 0.6, 0.4)])
@pytest.mark.parametrize("preconditioned", [False, True])
def test_a_gaussian_prior_beside_a_likelihood(integrator: str, eta: float, T: float, preconditioned: bool) -> None:
    prior = LocalGaussian(torch.tensor([1.0, -2.0]).double(), torch.tensor([0.5, 2.0]).double())
    H, centre = torch.tensor([0.7, 0.3]).double(), torch.tensor([-1.0, 4.0]).double()
    state = sgld.SGLDState(0, {"x": torch.zeros(CHAINS, 2, dtype=torch.float64)}, {})
    P = torch.ones(2, dtype=torch.float64)
    if preconditioned:
        moment = torch.tensor([4.0, 0.25], dtype=torch.float64)
        P = 1.0 / (moment.sqrt() + 0.2 * moment.sqrt().mean())
        state = state._replace(second_moment={"x": moment})
    generator = torch.Generator().manual_seed(2)
    for _ in range(200):
        state, _ = sgld.step(
            state,
            diagonal_target(prior, H, centre),
            sgld.SGLDSettings(
                step_size=constant(eta),
                temperature=T,
                integrator=integrator,  # type: ignore[arg-type]
                decay=0.9 if preconditioned else None,
                damping=0.2,
            ),
            generator=generator,
        )
    # x' = A x + ... + N(0, Q) for each coordinate: variance Q / (1 - A^2), mean where the drift vanishes.
    p = prior.precision
    if integrator == "euler":
        A, Q = 1.0 - 0.5 * eta * P * (p + H), T * eta * P
    else:
        e = torch.exp(-0.5 * eta * P * p)
        A, Q = e - (1.0 - e) / p * H, T * (1.0 - e.square()) / p
    mean = (p * prior.mean + H * centre) / (p + H)
    assert_law(state.position["x"], mean, torch.diag(Q / (1.0 - A.square())))


@pytest.mark.parametrize("eta", [0.1, 5.0, 500.0])
def test_the_exponential_integrator_samples_a_prior_exactly_at_any_step(eta: float) -> None:
    prior = LocalGaussian(torch.tensor([1.0, -2.0]).double(), torch.tensor([0.5, 2.0]).double())
    zero = torch.zeros(2, dtype=torch.float64)
    steps = 400 if eta < 1.0 else 20
    draws = run(
        diagonal_target(prior, zero, zero),
        2,
        steps,
        step_size=constant(eta),
        temperature=0.25,
        integrator="exponential",
    )
    assert_law(draws, prior.mean, torch.diag(0.25 / prior.precision))


@pytest.mark.parametrize("T", [0.0, 1.7])
def test_both_integrators_agree_to_first_order(T: float) -> None:
    generator = torch.Generator().manual_seed(0)
    x, G, noise, c = torch.randn(4, 5, generator=generator, dtype=torch.float64)
    prior = LocalGaussian(c, torch.rand(5, generator=generator, dtype=torch.float64) + 0.5)
    gaps = []
    for eta in (1e-3, 1e-4):
        options: dict[str, Any] = {"step_size": eta, "temperature": T, "noise": noise, "preconditioner": 0.7}
        gap = sgld.euler(x, G, prior, **options) - sgld.exponential(x, G, prior, **options)
        gaps.append(float(gap.norm()))
    # The drifts differ by eta^2; the noise, sqrt(eta), by a relative eta.
    assert math.log10(gaps[0] / gaps[1]) == pytest.approx(2.0 if T == 0.0 else 1.5, abs=0.02)


def test_the_bias_shrinks_in_proportion_to_the_step() -> None:
    """Variance from the code's own affine map, by its Lyapunov fixed point, without any sampling."""

    def variance(eta: float) -> float:
        one, zero = torch.ones(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
        options: dict[str, Any] = {"step_size": eta, "temperature": 1.0}
        A = float(sgld.euler(one, -2.0 * one, None, noise=zero, **options))
        root_q = float(sgld.euler(zero, zero, None, noise=one, **options))
        return root_q**2 / (1.0 - A**2)

    excess = [variance(eta) - 0.5 for eta in (0.02, 0.01)]
    assert excess[0] / excess[1] == pytest.approx(2.0, rel=0.02)
    assert variance(1.0) == pytest.approx(1.0 / (2.0 - 0.25 * 4.0), rel=1e-12)


def test_without_noise_a_step_is_gradient_ascent_and_a_tiny_step_changes_nothing() -> None:
    x = {"x": torch.tensor([[1.0, 2.0]], dtype=torch.float64)}
    density = gaussian_target(P2, M2)
    state, info = sgld.step(sgld.init(x), density, sgld.SGLDSettings(constant(0.2), temperature=0.0))
    torch.testing.assert_close(state.position["x"], x["x"] + 0.1 * density(x).gradient["x"])
    assert info.step_size == 0.2 and not info.clipped
    still, _ = sgld.step(sgld.init(x), density, sgld.SGLDSettings(constant(1e-300)))
    torch.testing.assert_close(still.position["x"], x["x"], rtol=0, atol=1e-140)


# --------------------------------------------------------------------------------------------- through the kernel


def normal_program(n: int, observed: float, noise: float) -> Callable[[], None]:
    def model() -> None:
        with pyro.plate("coordinates", n):
            x = pyro.sample("x", dist.Normal(torch.tensor(1.0).double(), 1.0))
            pyro.sample("y", dist.Normal(x, noise), obs=torch.full((n,), observed).double())

    return model


@pytest.mark.parametrize(
    ("options", "law"),
    [
        # prior precision 1, likelihood precision 4 times n_inflate; eta away from the default
        ({"temperature": 0.5}, lambda eta, P: 0.5 / (P - 0.25 * eta * P * P)),
        ({"n_inflate": 1.5}, lambda eta, P: 1.0 / (P - 0.25 * eta * P * P)),
        (
            {"integrator": "exponential", "temperature": 2.0},
            lambda eta, P: (
                2.0 * (1 - math.exp(-eta)) / (1 - (math.exp(-eta / 2) - (1 - math.exp(-eta / 2)) * (P - 1.0)) ** 2)
            ),
        ),
    ],
    ids=["temperature", "n_inflate", "exponential"],
)
def test_the_kernel_has_the_exact_law_in_pyro(options: dict[str, Any], law: Callable[[float, float], float]) -> None:
    eta, n, y = 0.25, 4_000, 3.0
    H = 4.0 * options.get("n_inflate", 1.0)
    mcmc = MCMC(
        SGLD(normal_program(n, y, 0.5), step_size=eta, thinning=12, **options),
        num_samples=10,
        warmup_steps=30,
        disable_progbar=True,
    )
    mcmc.run()
    draws = mcmc.get_samples()["x"]  # twelve steps apart: correlation below 0.4^12
    count, variance, mean = draws.numel(), law(eta, 1.0 + H), (1.0 + H * y) / (1.0 + H)
    assert (draws.mean() - mean).abs() < K * math.sqrt(variance / count)
    assert (draws.var() / variance - 1.0).abs() < K * math.sqrt(2.0 / count)


def grid_law(eta: float, T: float, shape: float) -> tuple[Tensor, Tensor]:
    """Stationary law of the Euler chain in u = log x for x ~ Gamma(shape, 1), from its transition matrix."""
    u = torch.linspace(-8.0, 5.0, 1_500, dtype=torch.float64)
    centre = u + 0.5 * eta * (shape - u.exp())
    weight = torch.exp(-0.5 * (u[None] - centre[:, None]).square() / (T * eta))
    weight = weight / weight.sum(1, keepdim=True)
    law = torch.full((len(u),), 1.0 / len(u), dtype=torch.float64)
    for _ in range(400):
        law = law @ weight
    return u, law


def test_a_skewed_target_behind_a_transform() -> None:
    """A Gaussian hides errors of sign and of the Jacobian; x ~ Gamma(3, 1) is sampled in log x."""
    eta, T, n = 0.15, 0.6, 4_000

    def model() -> None:
        with pyro.plate("coordinates", n):
            pyro.sample("x", dist.Gamma(torch.tensor(3.0).double(), 1.0))

    kernel = SGLD(model, step_size=eta, temperature=T, thinning=30)
    mcmc = MCMC(kernel, num_samples=5, warmup_steps=80, disable_progbar=True)
    mcmc.run()
    draws = mcmc.get_samples()["x"].flatten()
    assert bool((draws > 0).all())
    u, law = grid_law(eta, T, 3.0)
    for statistic in (torch.log, lambda x: x, lambda x: torch.log(x) ** 3):
        exact = float((law * statistic(u.exp())).sum())
        values = statistic(draws)
        assert abs(float(values.mean()) - exact) < K * float(values.std()) / math.sqrt(len(values))


def test_the_preconditioner_adapts_in_the_warm_up_and_is_frozen_after() -> None:
    kernel = SGLD(normal_program(3, 2.0, 0.5), step_size=0.01, preconditioner="rms", decay=0.5)
    kernel.setup(4)
    params = kernel.initial_params
    seen = []
    for _ in range(8):
        params = kernel.sample(params)
        seen.append(kernel.state.second_moment["x"].clone())
    assert all(not torch.equal(a, b) for a, b in pairwise(seen[:4]))
    assert all(torch.equal(seen[3], later) for later in seen[4:])


# --------------------------------------------------------------------------------------------- priors and schedules


def test_no_coordinate_moves_further_than_the_limit_and_short_moves_are_left_alone() -> None:
    gradient = torch.tensor([0.5, -2.0, 400.0, -1e6])
    density = lambda position: Drift(torch.zeros(()), {"x": gradient}, {"x": None})  # noqa: E731
    state = sgld.SGLDState(0, {"x": torch.zeros(4)}, {"x": torch.ones(4)})
    eta, damping = 0.02, 0.1
    options: dict[str, Any] = {"step_size": constant(eta), "temperature": 0.0, "decay": 0.99, "damping": damping}
    after, info = sgld.step(state, density, sgld.SGLDSettings(**options, max_move=3.0))
    unlimited = gradient / (1.0 + damping)
    torch.testing.assert_close(after.position["x"], 0.5 * eta * unlimited.clamp(-3.0, 3.0))
    assert bool(info.clipped)
    after, info = sgld.step(state, density, sgld.SGLDSettings(**options, max_move=1e7))
    torch.testing.assert_close(after.position["x"], 0.5 * eta * unlimited)
    assert not bool(info.clipped)


def test_steps_that_the_limit_shortened_are_counted() -> None:
    def model() -> None:
        pyro.sample("x", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        pyro.factor("far", 50.0 * pyro.sample("y", dist.Normal(0.0, 1.0)))

    options: dict[str, Any] = {"step_size": 0.02, "preconditioner": "rms", "seed": 0}
    small = {"x": torch.full((3,), 1e-2), "y": torch.tensor(1e-2)}
    kernel = SGLD(model, **options, second_moment=small, max_move=3.0)
    MCMC(kernel, num_samples=4, warmup_steps=0, disable_progbar=True).run()
    assert kernel.diagnostics()["clipped"] == [0, 1, 2, 3]
    with pytest.raises(ValueError, match="max_move"):
        SGLD(model, **options, max_move=0.0)


def test_the_gaussian_that_touches_a_mixture_has_its_gradient() -> None:
    loc = torch.tensor([[0.0, 1.0], [2.0, -1.0], [4.0, 0.5]], dtype=torch.float64)
    scale = torch.tensor([[1.0, 0.5], [0.3, 2.0], [1.0, 1.0]], dtype=torch.float64)
    weights = dist.Categorical(probs=torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64))
    mixture = dist.MixtureSameFamily(weights, dist.Normal(loc, scale).to_event(1))
    x = torch.tensor([1.4, 0.2], dtype=torch.float64, requires_grad=True)
    for fn, K_ in ((mixture, 3), (broadened(mixture, 0.7), 3), (dist.Normal(loc[0], scale[0]).to_event(1), 1)):
        touching = gaussian_at(fn, x.detach())
        assert touching is not None
        (gradient,) = torch.autograd.grad(fn.log_prob(x), x)
        torch.testing.assert_close(-touching.precision * (x.detach() - touching.mean), gradient)
        if K_ == 1:
            torch.testing.assert_close(touching.mean, loc[0])


def test_a_broadened_mixture_is_the_convolution() -> None:
    """p(theta) = integral of N(theta; phi, beta^2) over the mixture, checked on a grid in one dimension."""
    weights = dist.Categorical(probs=torch.tensor([0.3, 0.7], dtype=torch.float64))
    base = dist.Normal(torch.tensor([[-1.0], [2.0]]).double(), torch.tensor([[0.5], [0.2]]).double())
    mixture = dist.MixtureSameFamily(weights, base.to_event(1))
    phi = torch.linspace(-6, 6, 4_001, dtype=torch.float64)
    theta = torch.tensor([[-1.3], [0.4], [2.2]], dtype=torch.float64)
    kernel = dist.Normal(phi, 0.6).log_prob(theta).exp()
    expected = (kernel * mixture.log_prob(phi.unsqueeze(-1)).exp()).sum(-1) * (phi[1] - phi[0])
    torch.testing.assert_close(broadened(mixture, 0.6).log_prob(theta).exp(), expected, rtol=1e-6, atol=0)


def test_a_site_has_a_step_and_a_temperature_of_its_own() -> None:
    def model() -> None:
        pyro.sample("a", dist.Normal(0.0, 1.0))
        pyro.sample("b", dist.Normal(0.0, 1.0))

    factors: dict[str, Any] = {"site_step_scale": {"b": 3.0}, "site_temperature": {"b": 0.0}}
    kernel = SGLD(model, step_size=0.1, **factors)
    pyro.set_rng_seed(0)
    kernel.initial_params = {"a": torch.tensor(1.0), "b": torch.tensor(1.0)}
    kernel.setup(0)
    moved = kernel.sample(kernel.initial_params)
    assert float(moved["b"]) == pytest.approx(1.0 - 0.5 * 3.0 * 0.1)
    assert abs(float(moved["a"]) - (1.0 - 0.5 * 0.1)) > 1e-3
    with pytest.raises(ValueError, match=r"site_temperature\['b'\]"):
        SGLD(model, site_temperature={"b": -1.0})


def test_schedules() -> None:
    assert constant(0.3)(10) == as_schedule(0.3)(0) == 0.3
    decreasing = polynomial(0.4, offset=10.0, power=0.5)
    assert decreasing(0) == 0.4 and decreasing(30) == pytest.approx(0.2)
    cycle = cyclical(1.0, period=4, floor=0.1)
    expected = [1.0, 0.5 * (1 + math.cos(math.pi / 4)), 0.5, 0.5 * (1 - math.cos(math.pi / 4)), 1.0]
    assert [cycle(t) for t in range(5)] == pytest.approx(expected)
    assert cyclical(1.0, period=100, floor=0.1)(99) == 0.1
    assert as_schedule(decreasing) is decreasing


@pytest.mark.parametrize("schedule", [polynomial(0.2, offset=3.0), cyclical(0.2, period=5, floor=0.1)])
def test_the_kernel_follows_the_schedule(schedule: Callable[[int], float]) -> None:
    kernel = SGLD(normal_program(2, 0.0, 1.0), step_size=schedule)
    MCMC(kernel, num_samples=6, warmup_steps=2, disable_progbar=True).run()
    assert kernel.diagnostics()["sample_stats"]["step_size"] == pytest.approx([schedule(t) for t in range(2, 8)])

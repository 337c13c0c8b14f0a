"""BMAML, ABML and the mixtures of starts against what they must reduce to."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch
from tiny_methods import FULL, SMALL, one_episode, spread, tiny_adapter, tiny_tasks
from torch.distributions import Gamma, Independent, Normal, kl_divergence

from pyro_lift.inference.adaptation.gradients import Weights
from pyro_lift.inference.adaptation.inner_loop import HeadPolicy, Hooks
from pyro_lift.inference.baselines.abml import ABML, GaussianWeights, divergence
from pyro_lift.inference.baselines.bmaml import BMAML, chaser_loss, stein, stein_terms, stein_width
from pyro_lift.inference.baselines.episodes import Heads
from pyro_lift.inference.baselines.episodic import InnerLoop, scattered
from pyro_lift.inference.baselines.finetune import loss_of
from pyro_lift.inference.baselines.imaml import ImplicitMAML
from pyro_lift.inference.baselines.maml import MAML
from pyro_lift.inference.baselines.maml_mix import MAMLMix, mixture_weights


def particles(number: int = 4, dim: int = 6) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(number)
    draw = torch.randn(2, number, dim, generator=generator, dtype=torch.float64)
    return draw[0], draw[1]


def test_one_particle_is_gradient_descent() -> None:
    theta, g = particles(1)
    assert torch.equal(stein(theta, g, 5.0), g)


def test_repulsion_sums_to_zero_and_is_the_gradient_of_the_kernel() -> None:
    theta, g = particles()
    attraction, repulsion = stein_terms(theta, g)
    torch.testing.assert_close(repulsion.sum(0), torch.zeros(6, dtype=torch.float64), rtol=0, atol=1e-14)
    assert repulsion.abs().max() > 1e-3
    squares = torch.cdist(theta, theta).square()
    h = squares[squares > 0].median() / torch.log(torch.tensor(4.0))
    torch.testing.assert_close(attraction, torch.exp(-squares / h) @ g / 4)
    for m in range(4):
        leaf = theta.clone().requires_grad_()
        k = torch.exp(-(leaf - theta[m]).square().sum(-1) / h).sum()
        torch.testing.assert_close(repulsion[m], torch.autograd.grad(k, leaf)[0].sum(0) / 4)


def test_stein_particles_find_a_gaussian_posterior() -> None:
    # Mean loss of 10 rows of N(theta; c, 1 / 10): the posterior is N(c, 1); particles spread about its mean.
    theta, _ = particles(12, 1)
    for _ in range(3000):
        theta = theta - 0.5 * stein(theta, (theta - 2.0) / 10.0, 10.0)
    assert float(theta.mean()) == pytest.approx(2.0, abs=0.02)
    assert float(theta.std()) == pytest.approx(1.0, abs=0.2)


def test_chaser() -> None:
    adapter, task = tiny_adapter(), tiny_tasks(1)[0]
    episode, heads = one_episode(task), Heads(adapter, [task], FULL, 0.1)
    starts = scattered(spread(adapter), 3, 0.1, seed=0)
    method = BMAML(adapter, FULL, particles=3, inner_learning_rate=0.7)
    still = replace(method, lead_steps=0).gradient(starts, episode, heads, torch.Generator())
    assert torch.equal(still, torch.zeros_like(starts))
    # Against finite differences, the leader and the kernel's width held where they are.
    width = stein_width(starts)
    found = method.gradient(starts, episode, heads, torch.Generator())

    def follow_support(x: torch.Tensor) -> torch.Tensor:
        hooks = Hooks(kernel=partial(stein, width=width))
        inner = InnerLoop(adapter, FULL, 1, 0.7, hooks=hooks, effective_rows=float(len(task.train)))
        return inner.run(episode, heads.weights(0, x), torch.Generator()).theta

    at = heads.weights(0, follow_support(starts))
    leader = method.leader(len(task.train)).run(episode, at, torch.Generator(), rows=task.train).theta
    v = torch.randn(starts.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    up, down = (float(chaser_loss(follow_support(starts + e * v), leader)) for e in (1e-5, -1e-5))
    assert float((found * v).sum()) == pytest.approx((up - down) / 2e-5, rel=1e-6)


def test_bmaml_keeps_particles_apart_and_refuses_what_does_not_fit() -> None:
    adapter, tasks = tiny_adapter(), tiny_tasks(3)
    state = BMAML(adapter, SMALL, particles=3).meta_train(tasks)
    assert state.phi.shape == (3, adapter.dim)
    assert torch.cdist(state.phi, state.phi)[0, 1] > 0
    assert len(BMAML(adapter, SMALL, particles=3).adapt(state, tasks[0]).thetas) == 3
    with pytest.raises(MemoryError, match="Use fewer particles"):
        BMAML(adapter, replace(SMALL, memory_limit=1000), particles=3).meta_train(tasks)
    with pytest.raises(ValueError, match="jitter"):
        BMAML(adapter, SMALL, jitter=0.0)


def test_divergence_is_torchs_and_flat_at_the_prior() -> None:
    q, p = torch.randn(2, 10, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def normal(x: torch.Tensor) -> Independent:  # type: ignore[type-arg]
        return Independent(Normal(x[:5], x[5:].exp()), 1)

    torch.testing.assert_close(divergence(q, p), kl_divergence(normal(q), normal(p)))
    leaf = p.clone().requires_grad_()
    torch.testing.assert_close(torch.autograd.grad(divergence(leaf, p), leaf)[0], torch.zeros_like(p))


def test_abml_without_spread_and_without_steps_is_the_query_gradient() -> None:
    adapter, task = tiny_adapter(), tiny_tasks(1)[0]
    episode, heads, phi = one_episode(task), Heads(adapter, [task], FULL, 0.1), spread(adapter)
    method = ABML(adapter, FULL, inner_steps=1, inner_learning_rate=1e-18, samples=2)
    omega = torch.cat([phi, torch.full_like(phi, -14.0)])
    found = method.gradient(omega, episode, heads, torch.Generator().manual_seed(0))
    leaf = phi.clone().requires_grad_()
    value = loss_of(adapter, task, FULL)(Weights(leaf), episode.query)
    torch.testing.assert_close(found[: adapter.dim], torch.autograd.grad(value, leaf)[0], rtol=1e-3, atol=1e-5)


def test_first_order_abml_tends_to_abml_as_its_steps_do_to_zero() -> None:
    adapter, task = tiny_adapter(), tiny_tasks(1)[0]
    episode, heads, phi = one_episode(task), Heads(adapter, [task], FULL, 0.1), spread(adapter)
    omega = torch.cat([phi, torch.full_like(phi, -1.5)])

    def gap(rate: float) -> float:
        method = ABML(adapter, FULL, inner_learning_rate=rate)
        both = [
            replace(method, first_order=first).gradient(omega, episode, heads, torch.Generator().manual_seed(7))
            for first in (False, True)
        ]
        return float((both[0] - both[1]).norm())

    assert 1e-6 < gap(1e-3) < 0.11 * gap(1e-2)


def test_abml_gradient_equals_finite_differences() -> None:
    adapter, task = tiny_adapter(), tiny_tasks(1)[0]
    episode, heads, phi = one_episode(task), Heads(adapter, [task], FULL, 0.1), spread(adapter)
    omega = torch.cat([phi, torch.full_like(phi, -1.5)])
    method = ABML(adapter, FULL, inner_steps=2, inner_learning_rate=0.1, samples=2)

    def seeded() -> torch.Generator:
        return torch.Generator().manual_seed(7)

    found = method.gradient(omega, episode, heads, seeded())

    def objective(x: torch.Tensor) -> float:
        generator, form = seeded(), GaussianWeights(x, 2)
        hooks, rows = Hooks(reparametrisation=form), float(len(task.train))
        inner = InnerLoop(adapter, FULL, 2, 0.1, hooks=hooks, effective_rows=rows)
        q = inner.run(episode, heads.weights(0, x), generator)
        draws = [q._replace(theta=form.sample(q.theta, generator)) for _ in range(2)]
        losses = [loss_of(adapter, task, FULL)(draw, episode.query) for draw in draws]
        return float(torch.stack(losses).mean() + form.penalty(q.theta) / len(task.train))

    v = torch.randn(omega.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    numeric = (objective(omega + 1e-5 * v) - objective(omega - 1e-5 * v)) / 2e-5
    assert float(found @ v) == pytest.approx(numeric, rel=1e-5)


def test_hyper_prior_is_that_of_torchs_distributions() -> None:
    method = ABML(tiny_adapter(), prior_scale=0.2, gamma_shape=2.5)
    centre = torch.randn(4, dtype=torch.float64)
    omega = torch.randn(8, dtype=torch.float64).requires_grad_()
    mean, log_sd = omega.chunk(2)
    precision = (-2.0 * log_sd).exp()
    log_p = Normal(centre, 1.0).log_prob(mean).sum() + Gamma(2.5, 2.5 * 0.04).log_prob(precision).sum()
    expected = torch.autograd.grad(log_p, omega)[0]
    torch.testing.assert_close(method.hyper_gradient(omega.detach(), centre), expected)


def test_abml_draws_from_its_posterior() -> None:
    adapter, tasks = tiny_adapter(), tiny_tasks(3)
    method = ABML(adapter, SMALL)
    state = method.meta_train(tasks)
    assert state.phi.shape == (2 * adapter.dim,)
    assert method.adapt(state, tasks[0]).thetas.shape == (SMALL.draws, adapter.dim)


def test_weights_of_a_mixture() -> None:
    losses = torch.tensor([1.0, 0.5, 2.0])
    assert torch.equal(mixture_weights(losses, 0.0), torch.tensor([0.0, 1.0, 0.0]))
    torch.testing.assert_close(mixture_weights(losses, 0.5), torch.softmax(-2.0 * losses, 0))


@pytest.mark.parametrize("base", [MAML, ImplicitMAML])
def test_a_mixture_of_one_is_its_base(base: type[MAML] | type[ImplicitMAML]) -> None:
    adapter, tasks = tiny_adapter(), tiny_tasks(3)
    alone = base(adapter, SMALL).meta_train(tasks)
    mixed = MAMLMix(adapter, SMALL, base=base, components=1, jitter=0.0).meta_train(tasks)
    torch.testing.assert_close(mixed.phi[0], alone.phi, rtol=0, atol=0)
    assert mixed.meta_steps == alone.meta_steps


def test_a_soft_mixture_weighs_the_gradients_of_its_starts() -> None:
    adapter, task = tiny_adapter(), tiny_tasks(1)[0]
    episode, heads = one_episode(task), Heads(adapter, [task], FULL, 0.1)
    method = MAMLMix(adapter, FULL, components=2, temperature=0.3, inner_learning_rate=0.7)
    starts = scattered(spread(adapter), 2, 0.5, seed=0)
    weights = method.weights(starts, episode, heads, torch.Generator())
    found = method.weighted_gradient(starts, weights, episode, heads, torch.Generator())
    for k in range(2):
        one = method.method.gradient(starts[k], episode, heads, torch.Generator())
        torch.testing.assert_close(found[k], weights[k] * one)


def test_a_new_task_takes_the_start_that_suits_it() -> None:
    adapter, tasks = tiny_adapter(), tiny_tasks(2)
    method = MAMLMix(adapter, FULL, components=2)
    good = MAML(adapter, replace(FULL, warm_up=200, warm_up_learning_rate=0.02)).meta_train(tasks).phi
    bad = adapter.initial + torch.randn_like(adapter.initial)
    for starts, best in ((torch.stack([good, bad]), 0), (torch.stack([bad, good]), 1)):
        assert method.choose(starts, tasks[0]) == best


def test_mixtures_work_with_heads_of_the_tasks_own() -> None:
    adapter, tasks = tiny_adapter(), tiny_tasks(3)
    budget = replace(SMALL, heads=HeadPolicy(scale=1.0, update="step"))
    method = MAMLMix(adapter, budget, components=2, temperature=0.5)
    state = method.meta_train(tasks)
    assert sum(state.taken) == state.meta_steps * method.tasks_per_step
    assert method.adapt(state, tasks[0]).heads is not None

"""Estimators of the gradient against autograd by hand, and the wrappers against what they compose."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pyro_lift.inference.adaptation.gradients import (
    Weights,
    differentiate,
    mixed,
    per_particle,
    per_task,
    reparametrised,
    value_and_gradient,
)
from pyro_lift.inference.baselines.abml import GaussianWeights, divergence

M, D = 3, 4


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def loss(weights: Weights, batch: Tensor) -> Tensor:
    """A loss that is not linear in anything, over the last dimension; of a head, where there is one, too."""
    value = (weights.theta.sin() * batch).square().sum(-1)
    return value if weights.head is None else value + (weights.head.cos() * weights.theta[..., :2].unsqueeze(-1)).sum()


def particles(with_heads: bool) -> Weights:
    return Weights(draw(M, D), draw(M, 2, 2, seed=1) if with_heads else None)


@pytest.mark.parametrize("with_head", [False, True])
def test_value_and_gradient_are_those_of_autograd_and_leave_no_graph(with_head: bool) -> None:
    weights = Weights(draw(D), draw(2, 2, seed=1) if with_head else None)
    batch = draw(D, seed=2)
    value, gradient = value_and_gradient(loss)(weights, batch)
    leaves = weights.leaves()
    expected = differentiate(loss(leaves, batch), leaves)
    assert float(value) == float(loss(weights, batch))
    assert torch.equal(gradient.theta, expected.theta)
    assert (gradient.head is None) == (not with_head)
    if gradient.head is not None and expected.head is not None:
        assert torch.equal(gradient.head, expected.head)
    assert not value.requires_grad and not gradient.theta.requires_grad


def test_with_its_graph_the_gradient_can_be_differentiated_again() -> None:
    theta, batch = draw(D).requires_grad_(), draw(D, seed=2)
    _, gradient = value_and_gradient(loss, create_graph=True)(Weights(theta), batch)
    v = draw(D, seed=3)
    (product,) = torch.autograd.grad(gradient.theta @ v, theta)
    hessian = torch.autograd.functional.hessian(lambda x: loss(Weights(x), batch), theta.detach())
    torch.testing.assert_close(product, hessian @ v)
    _, still = value_and_gradient(loss)(Weights(theta), batch)
    assert not still.theta.requires_grad


@pytest.mark.parametrize("with_heads", [False, True])
def test_particles_are_each_alone_on_one_minibatch(with_heads: bool) -> None:
    weights, batch = particles(with_heads), draw(D, seed=2)
    single = value_and_gradient(loss)
    value, gradient = per_particle(single)(weights, batch)
    values = []
    for m in range(M):
        head = None if weights.head is None else weights.head[m]
        alone, expected = single(Weights(weights.theta[m], head), batch)
        values.append(alone)
        assert torch.equal(gradient.theta[m], expected.theta)
        if gradient.head is not None and expected.head is not None:
            assert torch.equal(gradient.head[m], expected.head)
    assert (gradient.head is None) == (not with_heads)
    torch.testing.assert_close(value, torch.stack(values).mean())


def test_tasks_that_share_a_pass_have_each_its_own_gradient() -> None:
    thetas, batches = draw(M, D), draw(M, D, seed=2)
    value, gradient = per_task(loss)(Weights(thetas), batches)
    each = [value_and_gradient(loss)(Weights(thetas[k]), batches[k]) for k in range(M)]
    torch.testing.assert_close(gradient.theta, torch.stack([g.theta for _, g in each]))
    torch.testing.assert_close(value, torch.stack([v for v, _ in each]).mean())


def test_a_kernel_mixes_theta_and_not_the_heads() -> None:
    weights, batch = particles(with_heads=True), draw(D, seed=2)
    calls = []

    def kernel(theta: Tensor, gradients: Tensor, effective_rows: float) -> Tensor:
        calls.append((theta, effective_rows))
        return gradients.flip(0) / effective_rows

    plain = per_particle(value_and_gradient(loss))
    value, expected = plain(weights, batch)
    mixed_value, gradient = mixed(plain, kernel, 5.0)(weights, batch)
    assert torch.equal(mixed_value, value)
    assert torch.equal(gradient.theta, expected.theta.flip(0) / 5.0)
    assert gradient.head is not None and expected.head is not None and torch.equal(gradient.head, expected.head)
    assert torch.equal(calls[0][0], weights.theta) and calls[0][1] == 5.0


def test_a_reparametrised_loss_is_the_mean_over_draws_and_the_penalty_per_row() -> None:
    prior, q, batch = draw(2 * D, seed=4), draw(2 * D, seed=5), draw(D, seed=2)
    form = GaussianWeights(prior, samples=3)
    expected_loss = reparametrised(loss, form, 8.0, torch.Generator().manual_seed(6))(Weights(q), batch)
    generator = torch.Generator().manual_seed(6)
    draws = [form.sample(q, generator) for _ in range(3)]
    by_hand = sum(loss(Weights(theta), batch) for theta in draws) / 3 + divergence(q, prior) / 8.0
    torch.testing.assert_close(expected_loss, by_hand)
    assert len({float(theta.sum()) for theta in draws}) == 3


def test_the_reparametrised_gradient_of_a_quadratic_is_the_closed_form() -> None:
    # E_q[(theta - a)^2 / 2] = ((mu - a)^2 + e^{2 rho}) / 2: gradients mu - a and e^{2 rho}, at the prior no penalty.
    q = torch.cat([draw(D, seed=7), torch.full((D,), -0.5, dtype=torch.float64)])
    target = draw(D, seed=8)
    samples = 40_000
    generator = torch.Generator().manual_seed(9)

    def quadratic(weights: Weights, batch: Tensor) -> Tensor:
        return 0.5 * (weights.theta - batch).square().sum(-1)

    class Many(GaussianWeights):
        """All draws at once, as one draw ``[L, D]`` whose losses are averaged."""

        def sample(self, theta: Tensor, generator: torch.Generator | None) -> Tensor:
            mean, log_sd = theta.chunk(2)
            return mean + log_sd.exp() * torch.randn(samples, D, dtype=torch.float64, generator=generator)

    def average(weights: Weights, batch: Tensor) -> Tensor:
        return quadratic(weights, batch).mean()

    _, gradient = value_and_gradient(reparametrised(average, Many(q), 8.0, generator))(Weights(q), target)
    mean_error = float(torch.exp(q[D:]).max()) / samples**0.5
    torch.testing.assert_close(gradient.theta[:D], q[:D] - target, rtol=0, atol=5 * mean_error)
    torch.testing.assert_close(gradient.theta[D:], (2 * q[D:]).exp(), rtol=0, atol=0.03)

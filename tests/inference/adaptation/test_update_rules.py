"""Update rules against torch's optimisers, against the formulas by hand, and on a Gaussian whose law is known."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.distributions import Independent, Normal

from pyro_lift.inference.adaptation.update_rules import LangevinState, Terms, UpdateRule, adam, langevin, sgd
from pyro_lift.models.priors import LocalGaussian, gaussian_at

RULES: dict[str, Callable[[], UpdateRule]] = {
    "sgd": lambda: sgd(0.1),
    "adam": lambda: adam(0.1),
    "adam with decay": lambda: adam(0.1, weight_decay=0.2, towards=1.0),
    "langevin": lambda: langevin(0.01, adapt_steps=2),
}


def vector(seed: int, size: int = 5) -> Tensor:
    return torch.randn(size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def loss(x: Tensor) -> Tensor:
    return (x.cos() + 0.3 * x.square()).sum()


def gradient(x: Tensor) -> Tensor:
    return -x.sin() + 0.6 * x


def run(rule: UpdateRule, x: Tensor, steps: int, terms: Terms | None = None) -> Tensor:
    state = rule.init(x)
    for _ in range(steps):
        x, state = rule.update(x, gradient(x), state, terms or Terms())
    return x


def run_torch(optimiser: Callable[[list[Tensor]], torch.optim.Optimizer], x: Tensor, steps: int) -> Tensor:
    leaf = x.clone().requires_grad_()
    stepper = optimiser([leaf])
    for _ in range(steps):
        stepper.zero_grad()
        loss(leaf).backward()
        stepper.step()
    return leaf.detach()


def test_sgd_is_that_of_torch() -> None:
    x = vector(0)
    expected = run_torch(lambda leaves: torch.optim.SGD(leaves, lr=0.1), x, 6)
    torch.testing.assert_close(run(sgd(0.1), x, 6), expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("momentum", [0.9, 0.0])
def test_adam_is_that_of_torch(momentum: float) -> None:
    x = vector(0)
    expected = run_torch(lambda leaves: torch.optim.Adam(leaves, lr=0.1, betas=(momentum, 0.99)), x, 8)
    torch.testing.assert_close(run(adam(0.1, momentum=momentum, decay=0.99), x, 8), expected, rtol=1e-10, atol=0)


def test_adam_with_decay_towards_zero_is_torchs_adamw() -> None:
    x = vector(0)
    expected = run_torch(lambda leaves: torch.optim.AdamW(leaves, lr=0.1, weight_decay=0.3), x, 8)
    torch.testing.assert_close(run(adam(0.1, weight_decay=0.3), x, 8), expected, rtol=1e-10, atol=0)


def test_decay_towards_a_point_is_decay_towards_zero_around_it() -> None:
    x, point = vector(0), vector(1)
    rule, shifted = adam(0.1, weight_decay=0.3), adam(0.1, weight_decay=0.3, towards=point)
    g = vector(2)
    at_zero, _ = rule.update(x, g, rule.init(x))
    at_point, _ = shifted.update(x + point, g, shifted.init(x))
    torch.testing.assert_close(at_point, at_zero + point)


@pytest.mark.parametrize("rule", [sgd(0.1), adam(0.1)], ids=["sgd", "adam"])
def test_the_prior_is_its_own_gradient_over_the_effective_rows(rule: UpdateRule) -> None:
    x, g, rows = vector(0), vector(1), 7.0
    leaf = x.clone().requires_grad_()
    density = Independent(Normal(vector(2), 0.3), 1)
    (pull,) = torch.autograd.grad(-density.log_prob(leaf) / rows, leaf)
    with_prior, _ = rule.update(x, g, rule.init(x), Terms(gaussian_at(density, x), rows))
    by_hand, _ = rule.update(x, g + pull, rule.init(x))
    torch.testing.assert_close(with_prior, by_hand)


@pytest.mark.parametrize("rule", [sgd(0.1), adam(0.1)], ids=["sgd", "adam"])
def test_effective_rows_of_a_block_are_those_of_each_task(rule: UpdateRule) -> None:
    x, g = torch.stack([vector(0), vector(1)]), torch.stack([vector(2), vector(3)])
    rows = torch.tensor([[4.0], [9.0]], dtype=torch.float64)
    prior = LocalGaussian(torch.zeros_like(x), torch.full_like(x, 5.0))
    together, _ = rule.update(x, g, rule.init(x), Terms(prior, rows))
    for k in range(2):
        local = LocalGaussian(prior.mean[k], prior.precision[k])
        alone, _ = rule.update(x[k], g[k], rule.init(x[k]), Terms(local, float(rows[k])))
        torch.testing.assert_close(together[k], alone)


def test_sgd_is_differentiable_in_its_start() -> None:
    x = vector(0).requires_grad_()
    rule = sgd(0.1)
    moved, _ = rule.update(x, gradient(x), rule.init(x))
    (slope,) = torch.autograd.grad(moved.sum(), x)
    torch.testing.assert_close(slope, 1.0 - 0.1 * (0.6 - x.detach().cos()))


@pytest.mark.parametrize("name", RULES)
def test_a_rule_is_pure_and_resumes_from_its_state(name: str) -> None:
    rule, x, g = RULES[name](), vector(0), vector(1)
    state = rule.init(x)
    for _ in range(3):
        before = [value.clone() for value in [x, *(s for s in state or () if isinstance(s, Tensor))]]
        calls = [rule.update(x, g, state, Terms(None, 3.0, torch.Generator().manual_seed(4))) for _ in range(2)]
        assert torch.equal(calls[0][0], calls[1][0])
        after = [x, *(s for s in state or () if isinstance(s, Tensor))]
        assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
        x, state = calls[0]


@pytest.mark.parametrize("name", RULES)
def test_a_rule_made_once_serves_many_tensors(name: str) -> None:
    rule, xs = RULES[name](), [vector(0), vector(1, 3)]
    states = [rule.init(x) for x in xs]
    interleaved = list(xs)
    generators = [torch.Generator().manual_seed(5) for _ in xs]
    for _ in range(3):
        for k in range(2):
            terms = Terms(None, 2.0, generators[k])
            interleaved[k], states[k] = rule.update(interleaved[k], gradient(interleaved[k]), states[k], terms)
    for k in range(2):
        alone = run(rule, xs[k], 3, Terms(None, 2.0, torch.Generator().manual_seed(5)))
        assert torch.equal(interleaved[k], alone)


def test_langevin_without_noise_and_prior_is_preconditioned_gradient_descent() -> None:
    x, g, rows, rate, damping = vector(0), vector(1), 11.0, 0.01, 0.1
    rule = langevin(rate, temperature=0.0, damping=damping)
    moved, state = rule.update(x, g, rule.init(x), Terms(None, rows))
    root = (rows * g).abs()  # the first mean square is the first square
    expected = x - rate * rows * g / (root + damping * root.mean())
    torch.testing.assert_close(moved, expected)
    assert isinstance(state, LangevinState) and state.step == 1


def test_langevin_freezes_its_preconditioner_after_the_adapting_steps() -> None:
    x, rule = vector(0), langevin(0.01, temperature=0.0, adapt_steps=2)
    state = rule.init(x)
    moments = []
    for step in range(4):
        x, state = rule.update(x, (1.0 + step) * vector(1), state, Terms(None, 3.0))
        moments.append(state.second_moment)
    assert not torch.equal(moments[0], moments[1])
    assert torch.equal(moments[1], moments[2]) and torch.equal(moments[2], moments[3])


def test_langevin_begins_with_the_second_moment_it_is_given() -> None:
    x, g, moment = vector(0), vector(1), torch.full((5,), 9.0, dtype=torch.float64)
    rule = langevin(0.01, temperature=0.0, second_moment=moment, damping=0.0)
    moved, state = rule.update(x, g, rule.init(x), Terms(None, 1.0))
    torch.testing.assert_close(moved, x - 0.01 * g / 3.0)
    assert torch.equal(state.second_moment, moment)


def test_langevin_under_a_prior_alone_samples_it_at_any_step_size() -> None:
    # Without a likelihood the exponential integrator is exact: N(c, 1 / p) after one long step from anywhere.
    size = 40_000
    x = torch.full((size,), 3.0, dtype=torch.float64)
    prior = LocalGaussian(torch.full_like(x, -1.0), torch.full_like(x, 4.0))
    rule = langevin(0.7)
    state, terms = rule.init(x), Terms(prior, 5.0, torch.Generator().manual_seed(0))
    for _ in range(12):
        x, state = rule.update(x, torch.zeros_like(x), state, terms)
    assert float(x.mean()) == pytest.approx(-1.0, abs=4.5 * 0.5 / size**0.5)
    assert float(x.var()) == pytest.approx(0.25, rel=4.5 * (2.0 / size) ** 0.5)


@pytest.mark.parametrize("make", [sgd, adam, langevin])
def test_a_negative_learning_rate_is_refused(make: Callable[[float], UpdateRule]) -> None:
    with pytest.raises(ValueError, match="learning_rate"):
        make(-0.1)


def test_a_rate_of_zero_stays_where_it_is() -> None:
    for rule in (sgd(0.0), adam(0.0)):
        assert torch.equal(run(rule, vector(0), 3), vector(0))

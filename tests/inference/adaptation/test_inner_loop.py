"""The adaptation loop: iterates against steps by hand, what is kept, what diverges, and how heads and priors enter."""

from __future__ import annotations

from dataclasses import replace
from itertools import islice

import pytest
import torch
from tiny_methods import SMALL, tiny_adapter, tiny_tasks
from torch import Tensor
from torch.distributions import Independent, Normal

from pyro_lift.inference.adaptation.gradients import Weights, per_task, value_and_gradient
from pyro_lift.inference.adaptation.inner_loop import (
    HeadPolicy,
    Hooks,
    WeightsRule,
    follow,
    iterates,
    mean_loss,
    minibatches,
)
from pyro_lift.inference.adaptation.update_rules import adam, sgd
from pyro_lift.inference.sgld import DivergedError

D = 4


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def quadratic(weights: Weights, batch: Tensor) -> Tensor:
    value = 0.5 * (weights.theta - batch).square().sum(-1)
    return value if weights.head is None else value + 0.5 * (weights.head - 2.0).square().sum()


def constant_batch() -> Tensor:
    return torch.ones(D, dtype=torch.float64)


def test_iterates_are_gradient_descent_and_losses_are_those_before_each_step() -> None:
    theta, rate = draw(D), 0.3
    steps = iterates(value_and_gradient(quadratic), WeightsRule(sgd(rate), 1.0), Weights(theta), constant_batch)
    for iterate in islice(steps, 5):
        assert iterate.loss == float(quadratic(Weights(theta), constant_batch()))
        theta = theta - rate * (theta - 1.0)
        torch.testing.assert_close(iterate.weights.theta, theta)


def test_a_gaussian_prior_moves_the_fixed_point_to_the_map_estimate() -> None:
    # Mean loss of N rows and a prior N(c, s^2): the mode is (N + c / s^2) / (N + 1 / s^2) where the data say 1.
    rows, scale, centre = 6.0, 0.5, -2.0
    prior = Independent(Normal(torch.full((D,), centre, dtype=torch.float64), scale), 1)
    rule = WeightsRule(sgd(0.3), rows, prior)
    last = follow(iterates(value_and_gradient(quadratic), rule, Weights(draw(D)), constant_batch), 200).last
    expected = (rows + centre / scale**2) / (rows + 1.0 / scale**2)
    torch.testing.assert_close(last.theta, torch.full((D,), expected, dtype=torch.float64))


def test_heads_have_a_rule_and_a_prior_of_their_own() -> None:
    rows, precision = 5.0, 3.0
    start = Weights(draw(D), draw(2, 3, seed=1))
    rule = WeightsRule(sgd(0.3), rows, head=sgd(0.2), head_prior=(0.0, precision))
    last = follow(iterates(value_and_gradient(quadratic), rule, start, constant_batch), 300).last
    torch.testing.assert_close(last.theta, torch.ones(D, dtype=torch.float64))
    assert last.head is not None
    expected = 2.0 * rows / (rows + precision)
    torch.testing.assert_close(last.head, torch.full((2, 3), expected, dtype=torch.float64))


def test_without_a_rule_of_its_own_a_head_stays() -> None:
    start = Weights(draw(D), draw(2, 3, seed=1))
    last = follow(iterates(value_and_gradient(quadratic), WeightsRule(sgd(0.3), 1.0), start, constant_batch), 5).last
    assert last.head is not None and start.head is not None and torch.equal(last.head, start.head)


def test_rows_of_each_task_of_a_block_weigh_its_own_prior() -> None:
    rows = torch.tensor([2.0, 8.0], dtype=torch.float64)
    prior = Independent(Normal(torch.zeros(D, dtype=torch.float64), 0.5), 1)
    start = Weights(draw(2, D), draw(2, 2, 3, seed=1))
    options = {"prior": prior, "head": sgd(0.2), "head_prior": (0.0, 3.0)}

    def losses(weights: Weights, batch: Tensor) -> Tensor:
        assert weights.head is not None
        return 0.5 * (weights.theta - batch).square().sum(-1) + 0.5 * (weights.head - 2.0).square().flatten(1).sum(-1)

    together = iterates(per_task(losses), WeightsRule(sgd(0.1), rows, **options), start, constant_batch)  # type: ignore[arg-type]
    block = follow(together, 9).last
    for k in range(2):
        assert start.head is not None and block.head is not None
        rule = WeightsRule(sgd(0.1), float(rows[k]), **options)  # type: ignore[arg-type]
        single = iterates(value_and_gradient(quadratic), rule, Weights(start.theta[k], start.head[k]), constant_batch)
        alone = follow(single, 9).last
        torch.testing.assert_close(block.theta[k], alone.theta)
        torch.testing.assert_close(block.head[k], alone.head)


def test_a_differentiable_loop_carries_the_jacobian_of_its_steps() -> None:
    start = draw(D).requires_grad_()
    estimator = value_and_gradient(quadratic, create_graph=True)
    last = follow(iterates(estimator, WeightsRule(sgd(0.3), 1.0), Weights(start), constant_batch), 3).last
    (slope,) = torch.autograd.grad(last.theta.sum(), start)
    torch.testing.assert_close(slope, torch.full((D,), 0.7**3, dtype=torch.float64))


@pytest.mark.parametrize(("steps", "keep", "kept"), [(10, 5, [6, 7, 8, 9, 10]), (20, 2, [15, 20]), (8, 3, [6, 7, 8])])
def test_iterates_kept_are_evenly_spaced_over_the_last_half(steps: int, keep: int, kept: list[int]) -> None:
    estimator = value_and_gradient(quadratic)
    everything = [
        iterate.weights.theta
        for iterate in islice(iterates(estimator, WeightsRule(sgd(0.1), 1.0), Weights(draw(D)), constant_batch), steps)
    ]
    called: list[int] = []
    path = follow(
        iterates(estimator, WeightsRule(sgd(0.1), 1.0), Weights(draw(D)), constant_batch),
        steps,
        keep=keep,
        on_step=lambda: called.append(1),
    )
    assert len(path.losses) == len(called) == steps
    assert torch.equal(torch.stack([w.theta for w in path.kept]), torch.stack([everything[k - 1] for k in kept]))
    assert torch.equal(path.last.theta, everything[-1])


def test_a_generator_draws_no_more_minibatches_than_steps_taken() -> None:
    drawn: list[int] = []

    def batch() -> Tensor:
        drawn.append(1)
        return constant_batch()

    steps = iterates(value_and_gradient(quadratic), WeightsRule(sgd(0.1), 1.0), Weights(draw(D)), batch)
    assert not drawn
    follow(steps, 3)
    assert len(drawn) == 3
    follow(steps, 2)  # the generator goes on where it stopped
    assert len(drawn) == 5


def test_too_few_steps_for_the_draws_are_refused() -> None:
    steps = iterates(value_and_gradient(quadratic), WeightsRule(sgd(0.1), 1.0), Weights(draw(D)), constant_batch)
    with pytest.raises(ValueError, match=r"steps=5: 3 iterates from the last half need at least 6 steps"):
        follow(steps, 5, keep=3)
    with pytest.raises(ValueError, match="at least one step"):
        follow(steps, 0)


def test_a_loss_that_is_not_finite_names_step_and_task() -> None:
    steps = iterates(
        value_and_gradient(quadratic), WeightsRule(sgd(1e200), 1.0), Weights(draw(D)), constant_batch, "the task"
    )
    with pytest.raises(
        DivergedError, match=r"step \d, task 'the task': the loss is (inf|nan). Use a smaller"
    ) as caught:
        follow(steps, 9)
    assert caught.value.step > 0 and caught.value.tasks == ("the task",)


def test_minibatches_are_without_replacement_and_never_more_than_the_rows() -> None:
    rows = tiny_tasks(1)[0].train
    sampler = minibatches(rows, 5, torch.Generator().manual_seed(0))
    for _ in range(6):
        batch = sampler()
        assert len(batch) == 5
        assert len(torch.unique(batch.inputs[""], dim=0)) == 5
    assert len(minibatches(rows, 100, torch.Generator())()) == len(minibatches(rows, None, torch.Generator())()) == 12


def test_the_mean_loss_is_that_of_torch() -> None:
    adapter, task = tiny_adapter(), tiny_tasks(1)[0]
    theta = adapter.initial + 0.3 * draw(adapter.dim)
    logits = adapter(task.train.inputs[""], theta=theta)
    expected = torch.nn.functional.cross_entropy(logits, task.train.target)
    torch.testing.assert_close(mean_loss(adapter, task, task.train, Weights(theta)), expected)


def test_hooks_compose_in_the_order_of_their_meaning() -> None:
    # Particles of variational parameters: draws inside each particle, the kernel outside of all.
    from pyro_lift.inference.baselines.abml import GaussianWeights, divergence

    form = GaussianWeights(draw(2 * D, seed=4))
    start, generator = draw(3, 2 * D, seed=5), torch.Generator().manual_seed(6)
    hooks = Hooks(kernel=lambda theta, g, rows: 2.0 * g, reparametrisation=form)
    _, gradient = hooks.estimator(quadratic, True, 7.0, generator)(Weights(start), constant_batch())
    again = torch.Generator().manual_seed(6)
    for m in range(3):
        q = start[m].clone().requires_grad_()
        value = quadratic(Weights(form.sample(q, again)), constant_batch()) + divergence(q, form.prior) / 7.0
        torch.testing.assert_close(gradient.theta[m], 2.0 * torch.autograd.grad(value, q)[0])


def test_a_head_policy_scales_learning_rates_and_takes_its_old_keyword_with_a_warning() -> None:
    with pytest.warns(FutureWarning, match="'rate' is now called 'lr_scale'"):
        old = HeadPolicy(scale=1.0, rate=3.0)  # type: ignore[call-arg]
    assert old == HeadPolicy(scale=1.0, lr_scale=3.0)
    assert replace(old, scale=None).lr_scale == 3.0
    assert old.prior == (0.0, 1.0) and HeadPolicy().prior is None
    task, like = tiny_tasks(1)[0], torch.zeros(1)
    fresh = old.fresh(task, 8, like)
    assert fresh is not None and fresh.shape == (3, 9) and not fresh.any()
    assert HeadPolicy().fresh(task, 8, like) is None
    with pytest.raises(ValueError, match="lr_scale"):
        HeadPolicy(lr_scale=0.0)


def test_fine_tuning_is_this_loop_with_adam() -> None:
    from pyro_lift.inference.baselines.finetune import finetune, loss_of

    adapter, task = tiny_adapter(), tiny_tasks(1)[0]
    ensemble = finetune(adapter, task, adapter.initial, SMALL)
    generator = torch.Generator().manual_seed(SMALL.seed)
    steps = iterates(
        value_and_gradient(loss_of(adapter, task, SMALL)),
        WeightsRule(adam(SMALL.learning_rate), float(len(task.train))),
        Weights(adapter.initial),
        minibatches(task.train, SMALL.batch_size, generator),
    )
    path = follow(steps, SMALL.steps, keep=SMALL.draws)
    assert torch.equal(ensemble.thetas, torch.stack([w.theta for w in path.kept]))
    assert ensemble.losses == tuple(path.losses)

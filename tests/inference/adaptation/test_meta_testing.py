"""Meta-testing: the program's density is the paper's (Eq. 15-17), and chains start at the component the data choose."""

from __future__ import annotations

import math

import pyro.distributions as dist
import pyro.poutine as poutine
import pytest
import torch
from tiny_methods import tiny_adapter, tiny_tasks
from torch import Tensor
from torch.nn.functional import cross_entropy

from pyro_lift.inference.adaptation.meta_testing import (
    UNTOUCHED,
    Start,
    Untouched,
    best_start,
    best_starts,
    meta_test_program,
)
from pyro_lift.models.adapters import RandomAdapter
from pyro_lift.models.flat import FlatBlock
from pyro_lift.models.task import Task


def mixture_of(means: Tensor, weights: list[float], scale: float = 0.1) -> dist.MixtureSameFamily:
    components = dist.Normal(means, torch.full_like(means, scale)).to_event(1)
    return dist.MixtureSameFamily(dist.Categorical(torch.tensor(weights, dtype=means.dtype)), components)


def fitted(adapter: RandomAdapter, task: Task, steps: int = 60) -> Tensor:
    """Weights that fit a task, by plain gradient descent on torch's own loss."""
    theta = (adapter.initial + 0.1).requires_grad_()
    for _ in range(steps):
        loss = cross_entropy(adapter(task.train.inputs[""], theta=theta), task.train.target)
        theta = (theta - 0.3 * torch.autograd.grad(loss, theta)[0]).detach().requires_grad_()
    return theta.detach()


def likelihood(adapter: RandomAdapter, task: Task, theta: Tensor) -> float:
    logits = adapter(task.train.inputs[""], theta=theta)
    return float(-cross_entropy(logits, task.train.target, reduction="sum"))


def test_the_density_is_the_broadened_mixture_times_the_likelihood() -> None:
    adapter, task, beta, scale = tiny_adapter(), tiny_tasks(1)[0], 0.4, 0.3
    generator = torch.Generator().manual_seed(0)
    means = adapter.initial + torch.randn(2, adapter.dim, generator=generator, dtype=torch.float64)
    program = meta_test_program(adapter, task, mixture_of(means, [0.3, 0.7], scale), beta=beta)
    theta = means[0] + 0.2 * torch.randn(adapter.dim, generator=generator, dtype=torch.float64)
    trace = poutine.trace(poutine.condition(program, data={"theta": theta})).get_trace()
    variance = scale**2 + beta**2
    each = torch.stack(
        [
            math.log(weight) - 0.5 * ((theta - mean).square() / variance + math.log(2 * math.pi * variance)).sum()
            for weight, mean in zip((0.3, 0.7), means, strict=True)
        ]
    )
    expected = float(each.logsumexp(0)) + likelihood(adapter, task, theta)
    assert float(trace.log_prob_sum()) == pytest.approx(expected, rel=1e-10)


def test_a_minibatch_is_scaled_to_all_rows_and_a_head_is_sampled_where_tasks_have_one() -> None:
    adapter, task = tiny_adapter(), tiny_tasks(1)[0]
    mixture = mixture_of(adapter.initial.unsqueeze(0), [1.0])
    program = meta_test_program(adapter, task, mixture, beta=0.1, batch_size=4, head_scale=0.5)
    trace = poutine.trace(program).get_trace()
    assert trace.nodes["head"]["value"].shape == (3, 4)
    assert trace.nodes["obs"]["scale"] == pytest.approx(12 / 4)
    assert "head" not in poutine.trace(meta_test_program(adapter, task, mixture, beta=0.1)).get_trace().nodes


def test_a_prior_of_another_adapter_is_refused() -> None:
    adapter = tiny_adapter()
    mixture = mixture_of(torch.zeros(1, adapter.dim + 1, dtype=torch.float64), [1.0])
    with pytest.raises(ValueError, match="different adapters"):
        meta_test_program(adapter, tiny_tasks(1)[0], mixture, beta=0.1)


@pytest.mark.parametrize("position", [0, 1, 2])
def test_the_start_is_the_mean_with_the_highest_likelihood_whatever_its_weight(position: int) -> None:
    adapter, task = tiny_adapter(), tiny_tasks(1)[0]
    good = fitted(adapter, task)
    means = good + torch.randn(3, adapter.dim, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    means[position] = good
    weights = [0.495, 0.495, 0.495]
    weights[position] = 0.01
    mixture = mixture_of(means, weights)
    start = best_start(meta_test_program(adapter, task, mixture, beta=0.1), mixture)
    values = [likelihood(adapter, task, mean) for mean in means]
    assert start.component == position == max(range(3), key=values.__getitem__)
    assert torch.equal(start.theta, means[position])
    assert start.log_likelihood == pytest.approx(values[position], rel=1e-10)


def test_ties_go_to_the_heavier_component() -> None:
    adapter, task = tiny_adapter(), tiny_tasks(1)[0]
    mixture = mixture_of(adapter.initial.expand(3, -1).clone(), [0.2, 0.5, 0.3])
    assert best_start(meta_test_program(adapter, task, mixture, beta=0.1), mixture).component == 1
    block = FlatBlock(adapter, [task, task], dist.Normal(adapter.initial, 1.0).to_event(1))
    assert [start.component for start in best_starts(block, mixture)] == [1, 1]


def test_the_starts_of_a_block_are_those_of_each_task() -> None:
    adapter, tasks = tiny_adapter(), tiny_tasks(3, rows=9)
    means = torch.stack([fitted(adapter, task) for task in tasks])
    mixture = mixture_of(means, [0.2, 0.3, 0.5])
    block = FlatBlock(adapter, tasks, dist.Normal(adapter.initial, 1.0).to_event(1))
    together = best_starts(block, mixture)
    alone = [best_start(meta_test_program(adapter, task, mixture, beta=0.1), mixture) for task in tasks]
    assert [start.component for start in together] == [start.component for start in alone]
    for one_of_block, single in zip(together, alone, strict=True):
        assert isinstance(one_of_block, Start)
        assert torch.equal(one_of_block.theta, single.theta)
        assert one_of_block.log_likelihood == pytest.approx(single.log_likelihood, rel=1e-10)
    assert len({start.component for start in together}) > 1


def test_choosing_a_start_keeps_no_graph() -> None:
    adapter, task = tiny_adapter(), tiny_tasks(1)[0]
    means = adapter.initial.unsqueeze(0).clone().requires_grad_()
    mixture = mixture_of(means, [1.0])
    start = best_start(meta_test_program(adapter, task, mixture, beta=0.1), mixture)
    assert start.theta.grad_fn is None


def test_a_task_that_the_untouched_network_explains_better_begins_there() -> None:
    adapter, task = tiny_adapter(), tiny_tasks(1, rows=12)[0]
    good = fitted(adapter, task)
    bad = good + 3.0 * torch.randn(adapter.dim, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    gain = likelihood(adapter, task, good) - likelihood(adapter, task, bad)
    assert gain > 1.0
    mixture = mixture_of(bad.unsqueeze(0), [1.0])
    program = meta_test_program(adapter, task, mixture, beta=0.1)
    block = FlatBlock(adapter, [task, task], dist.Normal(adapter.initial, 1.0).to_event(1))
    # The odds at which the choice turns are those that the rows' evidence makes up for.
    for shift, component in ((0.1, UNTOUCHED), (-0.1, 0)):
        untouched = Untouched(good, 1.0 / (1.0 + math.exp(gain - shift)))
        assert untouched.log_odds == pytest.approx(shift - gain)
        start = best_start(program, mixture, untouched)
        assert start.component == component
        assert start.log_likelihood == pytest.approx(likelihood(adapter, task, good if component else bad), rel=1e-10)
        assert [each.component for each in best_starts(block, mixture, untouched)] == [component] * 2


def test_the_prior_of_such_a_task_stands_at_the_untouched_weights_as_wide_as_the_heaviest_component() -> None:
    adapter = tiny_adapter()
    means = torch.stack([adapter.initial + 1.0, adapter.initial - 1.0])
    mixture = mixture_of(means, [0.3, 0.7])
    prior = Untouched(adapter.initial, 0.05).prior(mixture)
    assert prior.mixture_distribution.probs.tolist() == [1.0]
    assert torch.equal(prior.component_distribution.mean[0], adapter.initial)
    assert torch.allclose(prior.component_distribution.variance[0], mixture.component_distribution.variance[1])

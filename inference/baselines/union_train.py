"""Union Train: one adapter trained on all meta-training tasks together, the start for every new task.

It is also the warm-up of every other meta-learner here, as it is of LiFT's chain.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import Tensor

from pyro_lift.inference.adaptation.gradients import Weights, differentiate
from pyro_lift.inference.adaptation.inner_loop import mean_loss, minibatches
from pyro_lift.inference.adaptation.predict import Ensemble
from pyro_lift.inference.adaptation.update_rules import adam
from pyro_lift.inference.baselines.episodes import Heads, check_tasks
from pyro_lift.inference.baselines.finetune import finetune, finetune_each, rows_of_pass
from pyro_lift.inference.baselines.protocol import Budget, with_heads
from pyro_lift.inference.baselines.search_space import SearchSpace, adaptation, lengths, multiples
from pyro_lift.inference.sgld import DivergedError
from pyro_lift.inference.top_level import at_top_level
from pyro_lift.models.adapters import RandomAdapter
from pyro_lift.models.task import Task
from pyro_lift.support.options import check_number
from pyro_lift.watching.watch import tell

__all__ = ["UnionTrain", "UnionTrainState", "union_train", "warm_up"]


class UnionTrainState(NamedTuple):
    """The trained weights ``[D]``, and the steps it took."""

    theta: Tensor
    meta_steps: int


@dataclass(frozen=True)
class UnionTrain:
    """Joint training of one vector by Adam; each step takes a minibatch of one task, in turn (uniform over tasks).

    The warm-up and the visits of the budget are one run here, at the meta learning rate.
    """

    adapter: RandomAdapter
    budget: Budget = field(default_factory=Budget)

    @property
    def space(self) -> SearchSpace:
        """The rate of joint training, half of its length, and adaptation."""
        rates = multiples("meta_learning_rate", self.budget.meta_learning_rate, (0.1, 0.3, 3.0, 10.0))
        return SearchSpace({"meta rate": rates, "length": lengths(self.budget)}, adaptation(self.budget))

    @at_top_level()
    def meta_train(self, tasks: Sequence[Task], *, on_step: Callable[[], None] | None = None) -> UnionTrainState:
        """Train one vector on all tasks."""
        steps = self.budget.warm_up + self.budget.visits
        rate = self.budget.meta_learning_rate
        budget = replace(self.budget, warm_up=steps, warm_up_learning_rate=rate, warm_start=None)
        return UnionTrainState(warm_up(self.adapter, tasks, budget, on_step=on_step), steps)

    @at_top_level()
    def adapt(self, state: UnionTrainState, task: Task, *, seed: int | None = None) -> Ensemble:
        """Fine-tune from the joint weights."""
        return finetune(self.adapter, task, state.theta, self.budget, seed=seed)

    @at_top_level()
    def adapt_many(self, state: UnionTrainState, tasks: Sequence[Task]) -> list[Ensemble]:
        """Fine-tune several tasks in one pass, each from the joint weights."""
        return finetune_each(self.adapter, tasks, state.theta, self.budget)


def warm_up(
    adapter: RandomAdapter, tasks: Sequence[Task], budget: Budget, *, on_step: Callable[[], None] | None = None
) -> Tensor:
    """Train jointly by the budget's warm-up settings; return the adapter's own start where it has no steps."""
    if budget.warm_start is not None:
        return budget.warm_start.to(adapter.initial)
    if budget.warm_up == 0:
        return adapter.initial.clone()
    return union_train(
        adapter,
        tasks,
        budget,
        steps=budget.warm_up,
        learning_rate=budget.warm_up_learning_rate,
        on_step=on_step,
    )


def union_train(
    adapter: RandomAdapter,
    tasks: Sequence[Task],
    budget: Budget | None = None,
    *,
    steps: int = 600,
    learning_rate: float = 3e-3,
    start: Tensor | None = None,
    on_step: Callable[[], None] | None = None,
) -> Tensor:
    r"""Train one vector on all tasks by Adam, :math:`\min_\theta \tfrac1N \sum_i L_i(\theta)`.

    Args:
        adapter: the network as a function of theta.
        tasks: at least one.
        budget: rows of a minibatch, seed, head policy and noise scale; None takes the defaults.
        steps: gradient steps, each on a minibatch of one task.
        learning_rate: of Adam.
        start: the weights to begin from ``[D]``; None takes the adapter's own start.
        on_step: called after each step; :func:`pyro_lift.watching.watch` is told its loss too.

    Returns:
        The trained adapter weights ``[D]``.

    Raises:
        ValueError: no task.
        DivergedError: a loss that is not finite; names the task.
    """
    check_number("learning_rate", learning_rate)
    check_number("steps", steps, least=1, open_below=False, whole=True)
    budget = budget or Budget()
    tasks = check_tasks(tasks, adapter.initial.device)
    budget = with_heads(budget, adapter, tasks)
    generator = torch.Generator().manual_seed(budget.seed)
    start = adapter.initial if start is None else start
    solved = budget.heads.solved(adapter, tasks, start, budget.noise_scale)
    batches = [minibatches(task.train, rows_of_pass(task, budget, solved), generator) for task in tasks]
    heads = Heads(adapter, tasks, budget, learning_rate)
    rule = adam(learning_rate)
    theta = start.to(adapter.initial).clone()
    state = rule.init(theta)
    for step in range(steps):
        index = step % len(tasks)
        rows = batches[index]()
        weights = heads.weights(index, theta).leaves() if solved is None else Weights(theta).leaves()
        if solved is None:
            loss = mean_loss(adapter, tasks[index], rows, weights, noise_scale=budget.noise_scale)
        else:
            loss = -solved.log_prob_at(index, rows, weights.theta).mean()
        if not torch.isfinite(loss):
            name = tasks[index].name
            raise DivergedError(f"step {step}, task {name!r}: the loss is {float(loss)}.", step, (name,))
        gradient = differentiate(loss, weights)
        theta, state = rule.update(theta, gradient.theta, state)
        heads.update(index, gradient.head)
        tell(on_step, phase="joint", loss=loss.detach(), step_size=learning_rate, tasks=(tasks[index].name,))
    return theta

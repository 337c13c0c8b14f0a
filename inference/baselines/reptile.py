r"""Reptile: move the start towards where a few steps on each task lead.

.. math:: \phi \leftarrow \phi + \epsilon_t\,\tfrac1B \sum_i \bigl(\theta_i^{(k)} - \phi\bigr)

With k = 1 and plain gradient steps it is joint training with the step :math:`\epsilon\,\alpha`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import cycle, islice
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from pyro_lift.inference.adaptation.gradients import value_and_gradient
from pyro_lift.inference.adaptation.inner_loop import WeightsRule, follow, iterates, minibatches
from pyro_lift.inference.adaptation.predict import Ensemble
from pyro_lift.inference.adaptation.update_rules import UpdateRule, adam, sgd
from pyro_lift.inference.baselines.episodes import Heads, check_tasks
from pyro_lift.inference.baselines.finetune import finetune, loss_of
from pyro_lift.inference.baselines.protocol import Budget
from pyro_lift.inference.baselines.search_space import SearchSpace, adaptation, joint_shares, multiples, values
from pyro_lift.inference.baselines.union_train import warm_up
from pyro_lift.inference.top_level import at_top_level
from pyro_lift.models.adapters import RandomAdapter
from pyro_lift.models.task import Task
from pyro_lift.support.options import check_literal, check_number
from pyro_lift.watching.watch import tell

__all__ = ["Reptile", "ReptileState"]

InnerRule = Literal["adam", "sgd"]


class ReptileState(NamedTuple):
    """The start that was learned ``[D]``, and outer steps made."""

    phi: Tensor
    meta_steps: int


@dataclass(frozen=True)
class Reptile:
    """Reptile: a start that moves towards where a few steps on each task lead.

    Args:
        adapter: the network as a function of theta.
        budget: ``meta_learning_rate`` is the inner loop's; an outer step costs ``tasks_per_step * inner_steps``
            visits.
        inner_steps: k.
        tasks_per_step: B.
        outer_rate: epsilon at the start; it falls linearly to zero, as the authors' does.
        inner: the inner rule, ``"adam"`` (beta_1 = 0, the authors') or ``"sgd"``; its running means start afresh at
            every task.

    References:
        On first-order meta-learning algorithms, Nichol, Achiam and Schulman, 2018, arXiv:1803.02999.
    """

    adapter: RandomAdapter
    budget: Budget = field(default_factory=Budget)
    inner_steps: int = 5
    tasks_per_step: int = 4
    outer_rate: float = 1.0
    inner: InnerRule = "adam"

    def __post_init__(self) -> None:
        check_number("inner_steps", self.inner_steps, least=1, open_below=False, whole=True)
        check_number("tasks_per_step", self.tasks_per_step, least=1, open_below=False, whole=True)
        check_number("outer_rate", self.outer_rate)
        check_literal("inner", self.inner, InnerRule)

    @property
    def space(self) -> SearchSpace:
        """The inner rate and number of steps, the outer rate, the share of joint training, and adaptation."""
        meta = {
            "meta rate": multiples("meta_learning_rate", self.budget.meta_learning_rate, (0.3, 3.0)),
            "inner steps": values("inner_steps", self.inner_steps, (3, 5, 10)),
            "outer rate": multiples("outer_rate", self.outer_rate, (0.3,)),
            "joint": joint_shares(self.budget),
        }
        return SearchSpace(meta, adaptation(self.budget))

    @at_top_level()
    def meta_train(self, tasks: Sequence[Task], *, on_step: Callable[[], None] | None = None) -> ReptileState:
        """Joint training, then Reptile's outer steps."""
        tasks = check_tasks(tasks, self.adapter.initial.device)
        phi = warm_up(self.adapter, tasks, self.budget)
        steps = max(self.budget.visits // (self.tasks_per_step * self.inner_steps), 1)
        generator = torch.Generator().manual_seed(self.budget.seed)
        heads = Heads(self.adapter, tasks, self.budget, self.budget.meta_learning_rate)
        turn = cycle(range(len(tasks)))
        for step in range(steps):
            ends = [self.inner_loop(phi, i, tasks[i], heads, generator) for i in islice(turn, self.tasks_per_step)]
            rate = self.outer_rate * (1.0 - step / steps)
            phi = phi + rate * (torch.stack(ends).mean(0) - phi)
            tell(on_step, phase="meta", step_size=rate)
        return ReptileState(phi, steps)

    def inner_loop(self, phi: Tensor, index: int, task: Task, heads: Heads, generator: torch.Generator) -> Tensor:
        """Take k steps on one task and return where they lead; the task keeps its head."""
        rate = self.budget.meta_learning_rate
        rule = WeightsRule(
            self._rule(rate),
            float(len(task.train)),
            head=self._rule(heads.policy.lr_scale * rate),
            head_prior=heads.policy.prior,
        )
        estimator = value_and_gradient(loss_of(self.adapter, task, self.budget))
        batches = minibatches(task.train, self.budget.batch_size, generator)
        start = heads.weights(index, phi)
        last = follow(iterates(estimator, rule, start, batches, task.name), self.inner_steps).last
        heads.values[index] = last.head
        return last.theta

    def _rule(self, rate: float) -> UpdateRule:
        return sgd(rate) if self.inner == "sgd" else adam(rate, momentum=0.0)

    @at_top_level()
    def adapt(self, state: ReptileState, task: Task, *, seed: int | None = None) -> Ensemble:
        """Fine-tune from the learned start."""
        return finetune(self.adapter, task, state.phi, self.budget, seed=seed)

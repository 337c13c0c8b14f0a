r"""Prototypical networks: classify by the distance of features to class means; the adapter learns the features.

.. math:: c_k = \frac{1}{|S_k|} \sum_{x \in S_k} f_\theta(x), \qquad
          p(y = k \mid x) \propto \exp\bigl(-\lVert f_\theta(x) - c_k \rVert^2 / \tau\bigr)

Cost: two minibatches a task, support and query, in one graph; memory that of both. No head, no inner loop.

Our choices: tau is the square root of the number of features, since raw distances saturate; a query row whose class is
not among the support rows is left out of training; a new task is adapted to like by all methods, by its prototypical
loss, each minibatch being the query and (a minibatch of) the task's other rows the support, and its test rows are
judged by the prototypes of all its training rows. A class without any row takes the mean of all features: far from
nothing in particular.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from pyro_lift.inference.adaptation.gradients import Weights, value_and_gradient
from pyro_lift.inference.adaptation.inner_loop import WeightsRule, follow, iterates, minibatches
from pyro_lift.inference.adaptation.predict import rows_of
from pyro_lift.inference.adaptation.update_rules import adam
from pyro_lift.inference.baselines.episodes import Episode, Heads
from pyro_lift.inference.baselines.episodic import Episodic, EpisodicMethod, EpisodicState, meta_train
from pyro_lift.inference.baselines.peak_memory import PeakMemory
from pyro_lift.inference.baselines.protocol import Budget
from pyro_lift.inference.top_level import at_top_level
from pyro_lift.models.adapters import RandomAdapter
from pyro_lift.models.door import check_inputs, check_rows
from pyro_lift.models.features import all_features, features
from pyro_lift.models.task import Rows, Task
from pyro_lift.support.options import check_number

__all__ = [
    "ProtoNet",
    "PrototypePosterior",
    "Prototypical",
    "PrototypicalMethod",
    "adapt_prototypes",
    "all_features",
    "check_classes",
    "distances",
    "prototypes",
    "prototypical_loss",
]


class Prototypical(Episodic, Protocol):
    """The statements of a prototypical method: how it takes support rows, and their features."""

    @property
    def temperature(self) -> float | None:
        """Tau, the divisor of squared distances; None for the square root of the number of features."""
        ...

    def support(self, rows: Rows, generator: torch.Generator) -> Rows:
        """Choose the support rows of one step among those available."""
        ...

    def support_features(self, theta: Tensor, support: Rows, generator: torch.Generator) -> Tensor:
        """Compute the features ``[n, E]`` of the support rows."""
        ...


class PrototypicalMethod(EpisodicMethod):
    """Base of ProtoNet and its LITE form: episodes and adaptation by the prototypical loss."""

    @property
    def minibatches_per_task(self) -> int:
        """Minibatches drawn in one task of an outer step: support and query."""
        return 2

    @at_top_level()
    def meta_train(
        self: Prototypical, tasks: Sequence[Task], *, on_step: Callable[[], None] | None = None
    ) -> EpisodicState:
        """Train jointly, then by prototypical episodes; raise for a task without classes that its rows share."""
        for task in tasks:
            check_classes(task)
        return meta_train(self, tasks, on_step=on_step)

    def gradient(
        self: Prototypical, omega: Tensor, episode: Episode, heads: Heads, generator: torch.Generator
    ) -> Tensor:
        """Compute the gradient of one episode's prototypical loss."""
        del heads
        query = minibatches(episode.query, self.budget.batch_size, generator)()
        theta = omega.detach().requires_grad_()
        support = self.support(episode.support, generator)
        loss = prototypical_loss(self, theta, episode.task, support, query, generator)
        return torch.autograd.grad(loss, theta)[0]

    @at_top_level()
    def adapt(self: Prototypical, state: EpisodicState, task: Task, *, seed: int | None = None) -> PrototypePosterior:
        """Fine-tune the features by the prototypical loss of the task."""
        return adapt_prototypes(self, state.phi, task, seed)


@dataclass(frozen=True)
class PrototypePosterior:
    """Late iterates of the features' weights; each judges by its own prototypes of the task's training rows.

    Attributes:
        thetas: ``[S, D]``.
    """

    adapter: RandomAdapter
    task: Task
    thetas: Tensor
    temperature: float | None = None

    @torch.no_grad()
    def predict(self, inputs: Any) -> Tensor:
        """Compute probabilities ``[n, C]``, averaged over the iterates."""
        rows = rows_of(inputs, self.task)
        check_inputs(self.adapter, rows)
        rows = rows.to(self.thetas.device)
        total = []
        for theta in self.thetas:
            means, _ = prototypes(all_features(self.adapter, self.task.train, theta), self.task)
            logits = distances(all_features(self.adapter, rows, theta), means, self.temperature)
            total.append(logits.softmax(-1))
        return torch.stack(total).mean(0)


@dataclass(frozen=True)
class ProtoNet(PrototypicalMethod):
    """Prototypical networks (ProtoNet): a row gets the class whose mean is nearest to its features.

    Args:
        adapter: the network as a function of theta.
        budget: shared settings; an outer step draws ``2 * tasks_per_step`` of its minibatches.
        temperature: tau; None takes the square root of the number of features.
        tasks_per_step: B.

    Raises:
        ValueError: a task that is not a classification.

    References:
        Prototypical networks for few-shot learning, Snell, Swersky and Zemel, 2017, arXiv:1703.05175.
    """

    adapter: RandomAdapter
    budget: Budget = field(default_factory=Budget)
    temperature: float | None = None
    tasks_per_step: int = 4

    def __post_init__(self) -> None:
        check_number("tasks_per_step", self.tasks_per_step, least=1, open_below=False, whole=True)
        if self.temperature is not None:
            check_number("temperature", self.temperature)

    @property
    def memory(self) -> PeakMemory:
        """Peak memory: the graphs of a support and a query minibatch."""
        return PeakMemory(graphs=2.0, vectors=6.0, advice="Use a smaller batch_size, or LITE.")

    def support(self, rows: Rows, generator: torch.Generator) -> Rows:
        """Choose a minibatch of the rows."""
        return minibatches(rows, self.budget.batch_size, generator)()

    def support_features(self, theta: Tensor, support: Rows, generator: torch.Generator) -> Tensor:
        """Compute the features of all support rows, with their gradient."""
        del generator
        return features(self.adapter, support, theta)


def check_classes(task: Task) -> None:
    """Raise unless the task has classes that all its rows share."""
    if task.num_classes is None or (task.kind == "matching" and task.label_texts is None):
        raise ValueError(f"task {task.name!r}: prototypes need classes that all its rows share; it has none.")


def prototypes(embedded: Tensor, task: Task, target: Tensor | None = None) -> tuple[Tensor, Tensor]:
    r"""Average features by class, :math:`c_k = \frac{1}{|S_k|} \sum_{x \in S_k} f(x)`.

    Args:
        embedded: features of rows ``[n, E]``.
        task: says how many classes there are.
        target: classes of the rows; None takes those of the task's training rows.

    Returns:
        Class means ``[C, E]`` (a class without rows takes the mean of all), and which classes have rows ``[C]``.

    References:
        Prototypical networks for few-shot learning, Snell et al., 2017, arXiv:1703.05175, Eq. 1.
    """
    assert task.num_classes is not None
    target = task.train.target if target is None else target
    member = torch.nn.functional.one_hot(target, task.num_classes).to(embedded)
    count = member.sum(0)
    means = member.T @ embedded / count.clamp_min(1.0).unsqueeze(-1)
    present = count > 0
    return torch.where(present.unsqueeze(-1), means, embedded.mean(0)), present


def distances(embedded: Tensor, means: Tensor, temperature: float | None) -> Tensor:
    r"""Compute logits ``[n, C]``, :math:`-\lVert f(x) - c_k \rVert^2 / \tau`.

    Args:
        embedded: features ``[n, E]``.
        means: prototypes ``[C, E]``.
        temperature: tau; None takes the square root of E.

    References:
        Prototypical networks for few-shot learning, Snell et al., 2017, arXiv:1703.05175, Eq. 2.
    """
    tau = embedded.shape[-1] ** 0.5 if temperature is None else temperature
    return -(embedded.unsqueeze(1) - means).square().sum(-1) / tau


def prototypical_loss(
    method: Prototypical, theta: Tensor, task: Task, support: Rows, query: Rows, generator: torch.Generator
) -> Tensor:
    """Compute the mean cross entropy of the query rows whose class has a support row; zero where there is none."""
    means, present = prototypes(method.support_features(theta, support, generator), task, support.target)
    usable = present[query.target]
    if not usable.any():
        return theta.sum() * 0.0
    rows = query.take(usable)
    logits = distances(features(method.adapter, rows, theta), means, method.temperature)
    logits = logits.masked_fill(~present, torch.finfo(logits.dtype).min)
    return cross_entropy(logits, rows.target)


def adapt_prototypes(method: Prototypical, start: Tensor, task: Task, seed: int | None) -> PrototypePosterior:
    """Adapt the features to a task: each minibatch is the query, the task's other rows are the support."""
    check_classes(task)
    check_rows(method.adapter, [task])
    budget: Budget = method.budget
    task = task.to(start.device)
    generator = torch.Generator().manual_seed(budget.seed if seed is None else seed)
    rows = task.train
    size = max(min(budget.batch_size, len(rows) // 2), 1)

    def batches() -> tuple[Rows, Rows]:
        order = torch.randperm(len(rows), generator=generator).to(rows.target.device)
        return method.support(rows.take(order[size:]), generator), rows.take(order[:size])

    def loss(weights: Weights, batch: tuple[Rows, Rows]) -> Tensor:
        support, query = batch
        return prototypical_loss(method, weights.theta, task, support, query, generator)

    rule = WeightsRule(adam(budget.learning_rate), float(len(rows)))
    steps = iterates(value_and_gradient(loss), rule, Weights(start), batches, task.name)
    trajectory = follow(steps, budget.steps, keep=budget.draws)
    thetas = torch.stack([weights.theta for weights in trajectory.kept])
    return PrototypePosterior(method.adapter, task, thetas, method.temperature)

"""What all methods have in common: the budget they share, the protocol they answer, what adaptation returns."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from pyro_lift.inference.adapt import HeadPolicy, Weights
from pyro_lift.inference.baselines.finetune import finetune, finetune_block
from pyro_lift.inference.predict import predict
from pyro_lift.inference.rules import Rule, adam
from pyro_lift.models.adapters import RandomAdapter
from pyro_lift.models.hierarchical import agree
from pyro_lift.models.observation import check_width
from pyro_lift.models.task import Rows, Task, as_rows
from pyro_lift.support.options import check_number

__all__ = [
    "Baseline",
    "Budget",
    "Ensemble",
    "Episode",
    "Heads",
    "Posterior",
    "State",
    "adapt_all",
    "episodes",
    "finetuned",
    "finetuned_block",
]

OnStep = Callable[[], None] | None


@dataclass(frozen=True)
class Budget:
    """What every method is given alike; learning rates are tuned for each, on the same grid."""

    warm_up: int = field(default=300, metadata={"help": "joint training steps that every meta-learner begins with"})
    visits: int = field(default=900, metadata={"help": "minibatches drawn in meta-training after the warm-up"})
    warm_up_learning_rate: float = field(default=3e-3, metadata={"help": "of the warm-up, Adam"})
    meta_learning_rate: float = field(default=1e-3, metadata={"help": "of the outer loop, Adam"})
    steps: int = field(default=100, metadata={"help": "adaptation steps on a new task"})
    learning_rate: float = field(default=2e-3, metadata={"help": "of adaptation: move per step and weight"})
    batch_size: int = field(default=16, metadata={"help": "rows of a minibatch"})
    draws: int = field(default=10, metadata={"help": "late iterates or draws that a prediction averages over"})
    heads: HeadPolicy = field(default_factory=HeadPolicy)
    noise_scale: float = field(default=1.0, metadata={"help": "sd of the noise in regression"})
    seed: int = field(default=0, metadata={"help": "of everything random"})
    warm_start: Tensor | None = field(
        default=None, repr=False, metadata={"help": "what the warm-up led to, where it has been run already"}
    )
    memory_limit: int | None = field(
        default=None, metadata={"help": "bytes that meta-training may take; none: what the device has free"}
    )

    def __post_init__(self) -> None:
        for name in ("warm_up_learning_rate", "meta_learning_rate", "learning_rate", "noise_scale"):
            check_number(name, getattr(self, name))
        for name in ("visits", "steps", "batch_size", "draws"):
            check_number(name, getattr(self, name), least=1, open_below=False, whole=True)
        for name in ("warm_up", "seed"):
            check_number(name, getattr(self, name), open_below=False, whole=True)
        if self.memory_limit is not None:
            check_number("memory_limit", self.memory_limit, least=1, open_below=False, whole=True)
        if self.steps < 2 * self.draws:
            raise ValueError(f"steps={self.steps}: {self.draws} draws from the last half need {2 * self.draws} steps.")


class Posterior(Protocol):
    """What adaptation returns."""

    def predict(self, inputs: Any) -> Tensor:
        """Probabilities ``[n, C]`` (regression: means) for a tensor, a mapping of tensors, or ``Rows``."""
        ...


class State(Protocol):
    """What meta-training learned: a NamedTuple of the method's own."""

    @property
    def meta_steps(self) -> int:
        """Outer steps made, for costs per step."""
        ...


class Baseline(Protocol):
    """A method: a frozen dataclass of its settings. States are the method's own, so they are ``Any`` here."""

    @property
    def adapter(self) -> RandomAdapter:
        """The network as a function of theta."""
        ...

    @property
    def budget(self) -> Budget:
        """What all methods are given alike."""
        ...

    def meta_train(self, tasks: Sequence[Task], *, on_step: OnStep = None) -> Any:
        """Learn what the tasks share; ``on_step`` is called after every outer step."""
        ...

    def adapt(self, state: Any, task: Task, *, seed: int | None = None) -> Posterior:
        """Learn a new task from its training rows."""
        ...


@dataclass(frozen=True)
class Ensemble:
    """Draws or late iterates of one task's weights; predictions average their probabilities.

    Attributes:
        thetas: ``[S, D]``.
        heads: ``[S, C, width + 1]``, or None.
        losses: of the minibatches on the way, for a look at convergence.
    """

    adapter: RandomAdapter
    task: Task
    thetas: Tensor
    heads: Tensor | None = None
    losses: tuple[float, ...] = ()

    def predict(self, inputs: Any) -> Tensor:
        """Probabilities ``[n, C]``, averaged over the draws."""
        rows = rows_of(inputs, self.task).to(self.thetas.device)
        return predict(self.adapter, self.thetas, rows, self.task.kind, heads=self.heads)


def rows_of(inputs: Any, task: Task) -> Rows:
    """Inputs in any form as rows of a task; targets, where there are none, are zeros."""
    if isinstance(inputs, Rows):
        return inputs
    first = next(iter(inputs.values())) if isinstance(inputs, dict) else inputs
    return replace(as_rows((inputs, torch.zeros(len(first))), "inputs"), shared=task.train.shared)


def finetuned(
    adapter: RandomAdapter, task: Task, start: Tensor, budget: Budget, seed: int | None = None, **options: Any
) -> Ensemble:
    """The adaptation that all point-estimate methods share, with the budget's settings."""
    settings = {**_adaptation(budget), "seed": budget.seed if seed is None else seed}
    found = finetune(adapter, task, start, **{**settings, **options})
    thetas, heads = found.thetas, found.heads
    if start.dim() == 2:  # particles: one ensemble of all of them
        thetas, heads = thetas.flatten(0, 1), None if heads is None else heads.flatten(0, 1)
    return Ensemble(adapter, task, thetas, heads, tuple(found.losses))


def finetuned_block(adapter: RandomAdapter, tasks: Sequence[Task], start: Tensor, budget: Budget) -> list[Posterior]:
    """:func:`finetuned` of several tasks in one pass, from the budget's seed; one by one where they cannot share it."""
    if not agree(tasks, budget.heads.scale):
        return [finetuned(adapter, task, start, budget) for task in tasks]
    found = finetune_block(adapter, tasks, start, **_adaptation(budget))
    return [
        Ensemble(adapter, task, one.thetas, one.heads, tuple(one.losses))
        for task, one in zip(tasks, found, strict=True)
    ]


def _adaptation(budget: Budget) -> dict[str, Any]:
    """What fine-tuning takes from the budget."""
    names = ("steps", "learning_rate", "batch_size", "draws", "heads", "noise_scale", "seed")
    return {name: getattr(budget, name) for name in names}


def adapt_all(method: Baseline, state: Any, tasks: Sequence[Task], *, block_size: int = 8) -> list[Posterior]:
    """The method's posterior for each task, ``block_size`` of them at a time where the method knows how."""
    many = getattr(method, "adapt_many", None)
    if many is None:
        return [method.adapt(state, task) for task in tasks]
    blocks = [tasks[first : first + block_size] for first in range(0, len(tasks), block_size)]
    return [posterior for block in blocks for posterior in many(state, block)]


class Episode(NamedTuple):
    """One visit: the task, and disjoint random halves of its training rows."""

    number: int
    task: Task
    support: Rows
    query: Rows


def episodes(tasks: Sequence[Task], generator: torch.Generator) -> Iterator[Episode]:
    """Tasks in turn for ever, halved anew at each visit. A query row that was also support would reward memorising.

    Raises:
        ValueError: a task with a single row.
    """
    for task in tasks:
        if len(task.train) < 2:
            raise ValueError(
                f"task {task.name!r} has one training row: an episode needs one to learn, one to judge by."
            )
    while True:
        for index, task in enumerate(tasks):
            order = torch.randperm(len(task.train), generator=generator).to(task.train.target.device)
            half = (len(order) + 1) // 2
            yield Episode(index, task, task.train.take(order[:half]), task.train.take(order[half:]))


class Heads:
    """The heads that meta-training tasks keep for themselves: none of what is learned about the family."""

    def __init__(self, adapter: RandomAdapter, tasks: Sequence[Task], budget: Budget, learning_rate: float) -> None:
        self.policy = budget.heads
        self.rule: Rule = adam(self.policy.rate * learning_rate)
        width = check_width(adapter, tasks, self.policy.scale)
        self.values = [self.policy.fresh(task, width, adapter.initial) for task in tasks]
        self._states = [None if head is None else self.rule.init(head) for head in self.values]
        self._rows = [len(task.train) for task in tasks]

    def weights(self, index: int, theta: Tensor) -> Weights:
        """Shared adapter weights with one task's own head."""
        return Weights(theta, self.values[index])

    def move(self, index: int, gradient: Tensor | None) -> None:
        """One step of one task's head, its prior included."""
        head = self.values[index]
        if head is None or gradient is None or self.policy.prior is None:
            return
        mean, precision = self.policy.prior
        g = gradient + precision * (head - mean) / self._rows[index]
        self.values[index], self._states[index] = self.rule.move(head, g, None, self._states[index], 1.0, None)


def check_tasks(tasks: Sequence[Task], device: torch.device) -> list[Task]:
    """The tasks on the adapter's device; refuses an empty list."""
    if not tasks:
        raise ValueError("tasks is empty: there is nothing to train on.")
    return [task.to(device) for task in tasks]

"""The protocol of all methods: the budget they share, training and adaptation, and the posterior they return."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Protocol, TypeVar, runtime_checkable

from torch import Tensor

from pyro_lift.inference.adaptation.early_stopping import EarlyStopping
from pyro_lift.inference.adaptation.inner_loop import HeadPolicy
from pyro_lift.models.adapters import RandomAdapter
from pyro_lift.models.task import Task
from pyro_lift.support.moved import names_moved_from
from pyro_lift.support.options import check_number

__all__ = ["AdaptsMany", "Baseline", "Budget", "OnStep", "Posterior", "State", "adapt_all", "with_heads"]

OnStep = Callable[[], None] | None


@dataclass(frozen=True)
class Budget:
    """The settings that every method is given alike; learning rates are tuned for each, on the same grid."""

    warm_up: int = field(default=300, metadata={"help": "joint training steps that every meta-learner begins with"})
    visits: int = field(default=900, metadata={"help": "minibatches drawn in meta-training after the warm-up"})
    warm_up_learning_rate: float = field(default=3e-3, metadata={"help": "of the warm-up, Adam"})
    meta_learning_rate: float = field(default=1e-3, metadata={"help": "of the outer loop, Adam"})
    steps: int = field(default=100, metadata={"help": "adaptation steps on a new task"})
    learning_rate: float = field(default=2e-3, metadata={"help": "of adaptation: move per step and weight"})
    batch_size: int = field(default=16, metadata={"help": "rows of a minibatch"})
    draws: int = field(default=10, metadata={"help": "late iterates or draws that a prediction averages over"})
    heads: HeadPolicy = field(default_factory=HeadPolicy)
    noise_scale: float = field(default=1.0, metadata={"help": "standard deviation of the noise in regression"})
    seed: int = field(default=0, metadata={"help": "of everything random"})
    warm_start: Tensor | None = field(
        default=None, repr=False, metadata={"help": "weights after the warm-up, if it has been run already"}
    )
    stopping: EarlyStopping | None = field(
        default=None, metadata={"help": "when fine-tuning looks at a task's dev rows, and ends; none: never"}
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


def with_heads(budget: Budget, adapter: RandomAdapter, tasks: Sequence[Task]) -> Budget:
    """Fill in the heads that a budget leaves to the network (:meth:`HeadPolicy.fitted`)."""
    heads = budget.heads.fitted(adapter, tasks)
    return budget if heads is budget.heads else replace(budget, heads=heads)


class Posterior(Protocol):
    """The result of adaptation: a predictive distribution for one task."""

    def predict(self, inputs: Any) -> Tensor:
        """Probabilities ``[n, C]`` (regression: means) for a tensor, a mapping of tensors, or ``Rows``."""
        ...


class State(Protocol):
    """The result of meta-training: a NamedTuple of the method's own."""

    @property
    def meta_steps(self) -> int:
        """Outer steps made, for costs per step."""
        ...


S = TypeVar("S", bound=State)
S_contra = TypeVar("S_contra", bound=State, contravariant=True)


class Baseline(Protocol[S]):
    """A method, a frozen dataclass of its settings, generic in the state that its meta-training returns."""

    @property
    def adapter(self) -> RandomAdapter:
        """The network as a function of theta."""
        ...

    @property
    def budget(self) -> Budget:
        """The settings that all methods are given alike."""
        ...

    def meta_train(self, tasks: Sequence[Task], *, on_step: OnStep = None) -> S:
        """Learn what the tasks share; ``on_step`` is called after every outer step."""
        ...

    def adapt(self, state: S, task: Task, *, seed: int | None = None) -> Posterior:
        """Learn a new task from its training rows."""
        ...


@runtime_checkable
class AdaptsMany(Protocol[S_contra]):
    """A method that can adapt to several tasks in one pass."""

    def adapt_many(self, state: S_contra, tasks: Sequence[Task]) -> Sequence[Posterior]:
        """Learn several new tasks, each from its training rows."""
        ...


def adapt_all(method: Baseline[S], state: S, tasks: Sequence[Task], *, block_size: int = 8) -> list[Posterior]:
    """Adapt a method to each task, ``block_size`` of them at a time where the method can share a pass."""
    if not isinstance(method, AdaptsMany):
        return [method.adapt(state, task) for task in tasks]
    blocks = [tasks[first : first + block_size] for first in range(0, len(tasks), block_size)]
    return [posterior for block in blocks for posterior in method.adapt_many(state, block)]


if not TYPE_CHECKING:
    __getattr__ = names_moved_from(__name__)

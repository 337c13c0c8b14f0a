"""What all methods have in common: the budget they share, the protocol they answer, what adaptation returns."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor

from pyro_lift.inference.adaptation.inner_loop import HeadPolicy
from pyro_lift.models.adapters import RandomAdapter
from pyro_lift.models.task import Task
from pyro_lift.support.options import check_number

__all__ = ["Baseline", "Budget", "Posterior", "State", "adapt_all"]

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


def adapt_all(method: Baseline, state: Any, tasks: Sequence[Task], *, block_size: int = 8) -> list[Posterior]:
    """The method's posterior for each task, ``block_size`` of them at a time where the method knows how."""
    many = getattr(method, "adapt_many", None)
    if many is None:
        return [method.adapt(state, task) for task in tasks]
    blocks = [tasks[first : first + block_size] for first in range(0, len(tasks), block_size)]
    return [posterior for block in blocks for posterior in many(state, block)]

"""No Meta Train: fine-tune each new task from the adapter's own start."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from torch import Tensor

from pyro_lift.inference.adaptation.predict import Ensemble
from pyro_lift.inference.baselines.finetune import finetune, finetune_each
from pyro_lift.inference.baselines.protocol import Budget
from pyro_lift.inference.baselines.search_space import SearchSpace, adaptation
from pyro_lift.inference.top_level import at_top_level
from pyro_lift.models.adapters import RandomAdapter
from pyro_lift.models.task import Task

__all__ = ["NoMetaTrain", "NoMetaTrainState"]

#: Rates of adaptation that tuning tries, over the given one: where nothing is learned before, they are all there is.
RATES = (0.05, 0.1, 0.25, 0.5, 2.0, 4.0, 10.0)


class NoMetaTrainState(NamedTuple):
    """The adapter's own weights ``[D]``; nothing was learned."""

    theta: Tensor
    meta_steps: int = 0


@dataclass(frozen=True)
class NoMetaTrain:
    """Fine-tuning without meta-training: the row that a meta-learner has to beat."""

    adapter: RandomAdapter
    budget: Budget = field(default_factory=Budget)

    @property
    def space(self) -> SearchSpace:
        """Rates over three decades, and fewer steps: there is nothing else to tune."""
        return SearchSpace(adapt=adaptation(self.budget, RATES, (0.5, 0.25)))

    @at_top_level()
    def meta_train(self, tasks: Sequence[Task], *, on_step: Callable[[], None] | None = None) -> NoMetaTrainState:
        """Learn nothing."""
        del tasks, on_step
        return NoMetaTrainState(self.adapter.initial.clone())

    @at_top_level()
    def adapt(self, state: NoMetaTrainState, task: Task, *, seed: int | None = None) -> Ensemble:
        """Fine-tune from the adapter's own start."""
        return finetune(self.adapter, task, state.theta, self.budget, seed=seed)

    @at_top_level()
    def adapt_many(self, state: NoMetaTrainState, tasks: Sequence[Task]) -> list[Ensemble]:
        """Fine-tune several tasks in one pass, each from the adapter's own start."""
        return finetune_each(self.adapter, tasks, state.theta, self.budget)

r"""MAML: a start from which a few gradient steps on a task do well on its other rows; first order as an option.

.. math:: \theta_i^{(k)} = \phi - \alpha \sum_{t<k} \nabla L_i^{\mathrm{sup}}(\theta_i^{(t)}), \qquad
          g_i = \nabla_\phi\, L_i^{\mathrm{query}}\bigl(\theta_i^{(k)}(\phi)\bigr)

First order (FO-MAML) takes the gradient at the adapted weights themselves, which drops the Hessians,
:math:`g_i = \nabla L_i^{\mathrm{query}}(\theta_i^{(k)})`.

Cost: k + 1 minibatches a task; second order about 2 (k + 1) backward passes, k of whose graphs are alive at once;
first order k + 1 and one graph. Second order needs attention with a double backward and sets it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from pyro_lift.inference.adaptation.inner_loop import Weights
from pyro_lift.inference.adaptation.predict import Ensemble
from pyro_lift.inference.baselines.episodes import Episode, Heads
from pyro_lift.inference.baselines.episodic import (
    EpisodicState,
    inner_loop,
    outer_loop,
    query_gradient,
    query_loss,
    twice_differentiable,
)
from pyro_lift.inference.baselines.finetune import finetuned
from pyro_lift.inference.baselines.memory import BACKWARD_GRAPH, check_memory
from pyro_lift.inference.baselines.protocol import Budget
from pyro_lift.models.adapters import RandomAdapter
from pyro_lift.models.task import Task
from pyro_lift.support.options import check_number

__all__ = ["MAML"]


@dataclass(frozen=True)
class MAML:
    """MAML, and FO-MAML.

    Args:
        adapter: the network as a function of theta.
        budget: shared settings; an outer step draws ``tasks_per_step * (inner_steps + 1)`` of its minibatches.
        inner_steps: k; the paper's tables have 1, 2, 3 and 5.
        inner_learning_rate: alpha, of plain gradient steps. With LoRA's B at zero it has to be far larger than a
            fine-tuning rate for the inner loop to move at all.
        tasks_per_step: B.
        first_order: FO-MAML.

    Raises:
        MemoryError: in meta-training, when the k graphs cannot fit; with numbers.

    References:
        Model-agnostic meta-learning for fast adaptation of deep networks, Finn, Abbeel and Levine, 2017,
        arXiv:1703.03400.
    """

    adapter: RandomAdapter
    budget: Budget = field(default_factory=Budget)
    inner_steps: int = 1
    inner_learning_rate: float = 0.05
    tasks_per_step: int = 4
    first_order: bool = False

    def __post_init__(self) -> None:
        check_number("inner_steps", self.inner_steps, least=1, open_below=False, whole=True)
        check_number("inner_learning_rate", self.inner_learning_rate)
        check_number("tasks_per_step", self.tasks_per_step, least=1, open_below=False, whole=True)

    def meta_train(self, tasks: Sequence[Task], *, on_step: Callable[[], None] | None = None) -> EpisodicState:
        """Joint training, then MAML's outer steps."""
        self.needed_bytes(tasks)
        with twice_differentiable(not self.first_order):
            return outer_loop(
                self.gradient,
                self.adapter,
                tasks,
                self.budget,
                tasks_per_step=self.tasks_per_step,
                minibatches_per_task=self.inner_steps + 1,
                on_step=on_step,
            )

    def needed_bytes(self, tasks: Sequence[Task]) -> int:
        """Peak memory of meta-training; refused where it cannot fit."""
        return check_memory(
            self.adapter,
            tasks,
            self.budget,
            graphs=2.0 if self.first_order else BACKWARD_GRAPH * self.inner_steps + 1.0,
            vectors=6.0 + self.inner_steps,
            way_out="Use first_order=True, fewer inner_steps, a smaller batch_size, or Reptile.",
        )

    def gradient(self, phi: Tensor, episode: Episode, heads: Heads, generator: torch.Generator) -> Tensor:
        """Of one task's query loss after adaptation, with respect to the start; moves that task's head."""
        start = heads.weights(episode.number, phi).leaves()
        adapted = self._adapted(start, episode, generator, create_graph=not self.first_order)
        if self.first_order:
            start = adapted = adapted.leaves()
        g = query_gradient(self.adapter, self.budget, episode, adapted, start, generator)
        heads.move(episode.number, g.head)
        return g.theta

    def query_loss(self, phi: Tensor, episode: Episode, heads: Heads, generator: torch.Generator) -> Tensor:
        """Of one query minibatch after adaptation, without a graph."""
        adapted = self._adapted(heads.weights(episode.number, phi), episode, generator, create_graph=False)
        return query_loss(self.adapter, self.budget, episode, adapted, generator).detach()

    def _adapted(self, start: Weights, episode: Episode, generator: torch.Generator, create_graph: bool) -> Weights:
        return inner_loop(
            self.adapter,
            self.budget,
            episode,
            start,
            generator,
            steps=self.inner_steps,
            learning_rate=self.inner_learning_rate,
            create_graph=create_graph,
        )

    def adapt(self, state: EpisodicState, task: Task, *, seed: int | None = None) -> Ensemble:
        """Fine-tune from the learned start, by the budget that all methods have."""
        return finetuned(self.adapter, task, state.phi, self.budget, seed)

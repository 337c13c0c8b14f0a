r"""MAML: a start from which a few gradient steps on a task do well on its other rows; first order as an option.

.. math:: \theta_i^{(k)} = \phi - \alpha \sum_{t<k} \nabla L_i^{\mathrm{sup}}(\theta_i^{(t)}), \qquad
          g_i = \nabla_\phi\, L_i^{\mathrm{query}}\bigl(\theta_i^{(k)}(\phi)\bigr)

First order (FO-MAML) takes the gradient at the adapted weights themselves, which drops the Hessians,
:math:`g_i = \nabla L_i^{\mathrm{query}}(\theta_i^{(k)})`.

Cost: k + 1 minibatches a task; second order about 2 (k + 1) backward passes, k of whose graphs are alive at once;
first order k + 1 and one graph. Second order needs attention with a double backward and sets it.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from pyro_lift.inference.adaptation.predict import Ensemble
from pyro_lift.inference.baselines.episodes import Episode, Heads
from pyro_lift.inference.baselines.episodic import (
    EpisodicMethod,
    EpisodicState,
    InnerLoop,
    query_gradient,
    query_loss,
)
from pyro_lift.inference.baselines.finetune import finetune
from pyro_lift.inference.baselines.peak_memory import BACKWARD_GRAPH, PeakMemory
from pyro_lift.inference.baselines.protocol import Budget
from pyro_lift.inference.top_level import at_top_level
from pyro_lift.models.adapters import RandomAdapter
from pyro_lift.models.task import Task
from pyro_lift.support.options import check_number

__all__ = ["MAML"]


@dataclass(frozen=True)
class MAML(EpisodicMethod):
    """MAML, a start from which few gradient steps suit a task; with ``first_order=True``, FO-MAML.

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

    @property
    def minibatches_per_task(self) -> int:
        """Minibatches drawn in one task of an outer step: k of support rows and one of query rows."""
        return self.inner_steps + 1

    @property
    def second_order(self) -> bool:
        """Whether the whole run needs attention with a double backward."""
        return not self.first_order

    @property
    def memory(self) -> PeakMemory:
        """Peak memory: the graphs of all inner steps, or one of them in first order."""
        return PeakMemory(
            graphs=2.0 if self.first_order else BACKWARD_GRAPH * self.inner_steps + 1.0,
            vectors=6.0 + self.inner_steps,
            advice="Use first_order=True, fewer inner_steps, a smaller batch_size, or Reptile.",
        )

    def gradient(self, omega: Tensor, episode: Episode, heads: Heads, generator: torch.Generator) -> Tensor:
        """Compute the gradient of one task's query loss after adaptation with respect to the initialisation.

        Also updates that task's head.
        """
        start = heads.weights(episode.number, omega).leaves()
        adapted = self._inner_loop(create_graph=not self.first_order).run(episode, start, generator)
        if self.first_order:
            start = adapted = adapted.leaves()
        g = query_gradient(self.adapter, self.budget, episode, adapted, start, generator)
        heads.update(episode.number, g.head)
        return g.theta

    def query_loss(self, phi: Tensor, episode: Episode, heads: Heads, generator: torch.Generator) -> Tensor:
        """Compute the loss of one query minibatch after adaptation, without a graph."""
        adapted = self._inner_loop(create_graph=False).run(episode, heads.weights(episode.number, phi), generator)
        return query_loss(self.adapter, self.budget, episode, adapted, generator).detach()

    def _inner_loop(self, create_graph: bool) -> InnerLoop:
        return InnerLoop(self.adapter, self.budget, self.inner_steps, self.inner_learning_rate, create_graph)

    @at_top_level()
    def adapt(self, state: EpisodicState, task: Task, *, seed: int | None = None) -> Ensemble:
        """Fine-tune from the learned start, by the budget that all methods have."""
        return finetune(self.adapter, task, state.phi, self.budget, seed=seed)

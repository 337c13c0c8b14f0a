r"""Bootstrapped MAML: learn the start from which k steps lead where k + L steps would.

.. math:: \theta^{(k)} = k \text{ steps on support rows from } \phi, \qquad
          \tilde\theta = L \text{ further steps on query rows}, \qquad
          g = \nabla_\phi\, \mathrm{KL}\bigl(p(y \mid x, \tilde\theta)\,\big\|\,p(y \mid x, \theta^{(k)}(\phi))\bigr)

over the inputs of the query minibatch, the target held fixed.

Cost: k + 1 minibatches a task, MAML's backward passes and L + 1 without a graph; memory MAML's.

Our choices: the LiFT paper (its E.6) does not give the direction of the divergence; the target comes first, which
matches the adapted prediction to it. All L steps are on the query minibatch, at the inner rate. For tokens the
divergence is summed over a row's tokens with a target; for regression it is that of normals with the noise's scale.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.functional import kl_div

from pyro_lift.inference.adaptation.inner_loop import Weights, differentiate, minibatches
from pyro_lift.inference.adaptation.predict import Ensemble
from pyro_lift.inference.baselines.episodes import Episode, Heads
from pyro_lift.inference.baselines.episodic import EpisodicState, inner_loop, outer_loop, twice_differentiable
from pyro_lift.inference.baselines.finetune import finetuned
from pyro_lift.inference.baselines.memory import BACKWARD_GRAPH, check_memory
from pyro_lift.inference.baselines.protocol import Budget
from pyro_lift.models.adapters import RandomAdapter
from pyro_lift.models.likelihoods import IGNORED, LossKind
from pyro_lift.models.observation import outputs
from pyro_lift.models.task import Rows, Task
from pyro_lift.support.options import check_number

__all__ = ["BootstrappedMAML", "predictive_divergence"]


@dataclass(frozen=True)
class BootstrappedMAML:
    """Bootstrapped MAML.

    Args:
        adapter: the network as a function of theta.
        budget: shared settings; an outer step draws ``tasks_per_step * (inner_steps + 1)`` of its minibatches.
        inner_steps: k.
        inner_learning_rate: alpha, of plain gradient steps.
        target_steps: L. Zero gives a meta-gradient of zero.
        target_learning_rate: of those; None takes the inner one.
        tasks_per_step: B.

    References:
        Bootstrapped meta-learning, Flennerhag et al., 2022, arXiv:2109.04504; LiFT, section E.6.
    """

    adapter: RandomAdapter
    budget: Budget = field(default_factory=Budget)
    inner_steps: int = 1
    inner_learning_rate: float = 0.05
    target_steps: int = 3
    target_learning_rate: float | None = None
    tasks_per_step: int = 4

    def __post_init__(self) -> None:
        check_number("inner_learning_rate", self.inner_learning_rate)
        check_number("target_steps", self.target_steps, open_below=False, whole=True)
        if self.target_learning_rate is not None:
            check_number("target_learning_rate", self.target_learning_rate, open_below=False)
        for name in ("inner_steps", "tasks_per_step"):
            check_number(name, getattr(self, name), least=1, open_below=False, whole=True)

    def meta_train(self, tasks: Sequence[Task], *, on_step: Callable[[], None] | None = None) -> EpisodicState:
        """Joint training, then bootstrapped outer steps."""
        self.needed_bytes(tasks)
        with twice_differentiable():
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
            graphs=BACKWARD_GRAPH * self.inner_steps + 1.0,
            vectors=8.0 + self.inner_steps,
            way_out="Use fewer inner_steps or a smaller batch_size.",
        )

    def gradient(self, phi: Tensor, episode: Episode, heads: Heads, generator: torch.Generator) -> Tensor:
        """Of the divergence from the target's predictions, with respect to the start; moves that task's head."""
        start = heads.weights(episode.number, phi).leaves()
        adapted = self._steps(episode, start, generator, self.inner_steps, self.inner_learning_rate, graph=True)
        query = minibatches(episode.query, self.budget.batch_size, generator)()
        rate = self.inner_learning_rate if self.target_learning_rate is None else self.target_learning_rate
        target = self._steps(episode, adapted.detached(), generator, self.target_steps, rate, graph=False, rows=query)
        value = self._divergence(episode.task, target, adapted, query)
        g = differentiate(value, start)
        heads.move(episode.number, g.head)
        return g.theta

    def _steps(
        self,
        episode: Episode,
        start: Weights,
        generator: torch.Generator,
        steps: int,
        learning_rate: float,
        graph: bool,
        rows: Rows | None = None,
    ) -> Weights:
        return inner_loop(
            self.adapter,
            self.budget,
            episode,
            start,
            generator,
            steps=steps,
            learning_rate=learning_rate,
            create_graph=graph,
            rows=rows,
        )

    def _divergence(self, task: Task, target: Weights, adapted: Weights, rows: Rows) -> Tensor:
        with torch.no_grad():
            wanted = outputs(self.adapter, rows, target.theta, target.head)
        given = outputs(self.adapter, rows, adapted.theta, adapted.head)
        return predictive_divergence(task.kind, wanted, given, rows.target, self.budget.noise_scale).mean()

    def adapt(self, state: EpisodicState, task: Task, *, seed: int | None = None) -> Ensemble:
        """Fine-tune from the learned start."""
        return finetuned(self.adapter, task, state.phi, self.budget, seed)


def predictive_divergence(kind: LossKind, wanted: Tensor, given: Tensor, target: Tensor, scale: float = 1.0) -> Tensor:
    """KL divergence ``[b]`` between two outputs' predictive distributions, the wanted one first.

    Args:
        kind: of the likelihood.
        wanted: outputs of the target.
        given: outputs to be moved.
        target: observed; of tokens, says which count.
        scale: of the noise in regression.
    """
    if kind == "regression":
        return 0.5 * ((wanted - given) / scale).square().flatten(1).sum(-1)
    each = kl_div(given.log_softmax(-1), wanted.log_softmax(-1), reduction="none", log_target=True).sum(-1)
    return each if kind != "tokens" else (each * (target != IGNORED)).sum(-1)

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

from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.functional import kl_div

from pyro_lift.inference.adaptation.gradients import Weights, differentiate
from pyro_lift.inference.adaptation.inner_loop import minibatches
from pyro_lift.inference.adaptation.predict import Ensemble
from pyro_lift.inference.baselines.episodes import Episode, Heads
from pyro_lift.inference.baselines.episodic import EpisodicMethod, EpisodicState, InnerLoop
from pyro_lift.inference.baselines.finetune import finetune
from pyro_lift.inference.baselines.peak_memory import BACKWARD_GRAPH, PeakMemory
from pyro_lift.inference.baselines.protocol import Budget
from pyro_lift.inference.top_level import at_top_level
from pyro_lift.models.adapters import RandomAdapter
from pyro_lift.models.likelihoods import IGNORED, LossKind
from pyro_lift.models.observation import outputs
from pyro_lift.models.task import Rows, Task
from pyro_lift.support.options import check_number

__all__ = ["BootstrappedMAML", "predictive_divergence"]


@dataclass(frozen=True)
class BootstrappedMAML(EpisodicMethod):
    """Bootstrapped MAML: a start from which k steps lead where k + L steps would.

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

    @property
    def minibatches_per_task(self) -> int:
        """Minibatches drawn in one task of an outer step: k of support rows and one of query rows."""
        return self.inner_steps + 1

    @property
    def second_order(self) -> bool:
        """Whether the whole run needs attention with a double backward."""
        return True

    @property
    def memory(self) -> PeakMemory:
        """Peak memory: the graphs of all inner steps, as MAML's."""
        return PeakMemory(
            graphs=BACKWARD_GRAPH * self.inner_steps + 1.0,
            vectors=8.0 + self.inner_steps,
            advice="Use fewer inner_steps or a smaller batch_size.",
        )

    def gradient(self, omega: Tensor, episode: Episode, heads: Heads, generator: torch.Generator) -> Tensor:
        """Compute the gradient of the divergence from the target's predictions with respect to the initialisation.

        Also updates that task's head.
        """
        start = heads.weights(episode.number, omega).leaves()
        inner = InnerLoop(self.adapter, self.budget, self.inner_steps, self.inner_learning_rate, create_graph=True)
        adapted = inner.run(episode, start, generator)
        query = minibatches(episode.query, self.budget.batch_size, generator)()
        rate = self.inner_learning_rate if self.target_learning_rate is None else self.target_learning_rate
        further = InnerLoop(self.adapter, self.budget, self.target_steps, rate)
        target = further.run(episode, adapted.detached(), generator, rows=query)
        g = differentiate(self._divergence(episode.task, target, adapted, query), start)
        heads.update(episode.number, g.head)
        return g.theta

    def _divergence(self, task: Task, target: Weights, adapted: Weights, rows: Rows) -> Tensor:
        with torch.no_grad():
            reference = outputs(self.adapter, rows, target.theta, target.head)
        output = outputs(self.adapter, rows, adapted.theta, adapted.head)
        return predictive_divergence(task.kind, reference, output, rows.target, self.budget.noise_scale).mean()

    @at_top_level()
    def adapt(self, state: EpisodicState, task: Task, *, seed: int | None = None) -> Ensemble:
        """Fine-tune from the learned start."""
        return finetune(self.adapter, task, state.phi, self.budget, seed=seed)


def predictive_divergence(
    kind: LossKind, reference: Tensor, output: Tensor, target: Tensor, scale: float = 1.0
) -> Tensor:
    r"""Compute the KL divergence ``[b]`` between two outputs' predictive distributions, the reference first.

    .. math:: \sum_c p_c\,(\log p_c - \log q_c) \quad\text{(classes, tokens)}, \qquad
              \tfrac12 \lVert (o_p - o_q) / s \rVert^2 \quad\text{(regression)}

    Args:
        kind: of the likelihood.
        reference: outputs of the target, held fixed.
        output: outputs to be moved.
        target: observed; of tokens, says which count.
        scale: s, standard deviation of the noise in regression.

    References:
        Bootstrapped meta-learning, Flennerhag et al., 2022, arXiv:2109.04504, whose matching function this is.
    """
    if kind == "regression":
        return 0.5 * ((reference - output) / scale).square().flatten(1).sum(-1)
    each = kl_div(output.log_softmax(-1), reference.log_softmax(-1), reduction="none", log_target=True).sum(-1)
    return each if kind != "tokens" else (each * (target != IGNORED)).sum(-1)

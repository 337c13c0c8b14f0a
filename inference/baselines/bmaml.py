r"""Bayesian MAML: particles moved by Stein variational gradient descent, and a chaser loss in parameter space.

.. math:: \theta_m \leftarrow \theta_m + \frac{\epsilon}{M} \sum_l \bigl[k(\theta_l, \theta_m)\,
          \nabla_{\theta_l} \log p(D \mid \theta_l) + \nabla_{\theta_l} k(\theta_l, \theta_m)\bigr],
          \qquad k = \exp(-\lVert\theta_l - \theta_m\rVert^2 / h)

The follower takes n such steps from the meta-particles on support rows; the leader goes on from there for s steps on
all rows; the meta-loss is :math:`\sum_m \lVert \theta_m^{\mathrm{follower}} - \theta_m^{\mathrm{leader}} \rVert^2`, the
leader held fixed.

Cost: n + s minibatches a task, each for M particles: M times MAML's backward passes and M s more; memory M times
MAML's. Adaptation costs M times the others'. Needs attention with a double backward and sets it.

Our choices: the likelihood is flat in the weights (the authors put a Gaussian with a Gamma precision over them);
h is the median of the squared distances over log M, held fixed in gradients; one particle has no kernel; particles
start around the jointly trained weights, since equal ones would stay equal; a task with its own head keeps the
leader's, averaged. A prediction averages as many draws as any other method's, late iterates of all particles.
"""

from __future__ import annotations

import math
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
    scattered,
    twice_differentiable,
)
from pyro_lift.inference.baselines.finetune import finetuned
from pyro_lift.inference.baselines.memory import BACKWARD_GRAPH, check_memory
from pyro_lift.inference.baselines.protocol import Budget
from pyro_lift.models.adapters import RandomAdapter
from pyro_lift.models.task import Task
from pyro_lift.support.options import check_number

__all__ = ["BMAML", "chaser_loss", "stein", "stein_terms", "stein_width"]


@dataclass(frozen=True)
class BMAML:
    """BMAML.

    Args:
        adapter: the network as a function of theta.
        budget: shared settings; an outer step draws ``tasks_per_step * (follow_steps + lead_steps)`` of its
            minibatches.
        particles: M; the paper has 1, 3 and 5.
        follow_steps: n.
        lead_steps: s; zero gives a meta-gradient of zero.
        inner_learning_rate: epsilon, in units of the mean loss.
        jitter: standard deviation of the particles around the jointly trained weights.
        tasks_per_step: B.

    References:
        Bayesian model-agnostic meta-learning, Yoon et al., 2018, arXiv:1806.03836; Stein variational gradient descent,
        Liu and Wang, 2016, arXiv:1608.04471.
    """

    adapter: RandomAdapter
    budget: Budget = field(default_factory=Budget)
    particles: int = 5
    follow_steps: int = 1
    lead_steps: int = 1
    inner_learning_rate: float = 0.05
    jitter: float = 0.01
    tasks_per_step: int = 4

    def __post_init__(self) -> None:
        check_number("inner_learning_rate", self.inner_learning_rate)
        check_number("jitter", self.jitter, open_below=self.particles > 1)
        check_number("lead_steps", self.lead_steps, open_below=False, whole=True)
        for name in ("particles", "follow_steps", "tasks_per_step"):
            check_number(name, getattr(self, name), least=1, open_below=False, whole=True)

    def meta_train(self, tasks: Sequence[Task], *, on_step: Callable[[], None] | None = None) -> EpisodicState:
        """Joint training, then the chaser's outer steps; the state's ``phi`` is ``[M, D]``."""
        self.needed_bytes(tasks)
        with twice_differentiable():
            return outer_loop(
                self.gradient,
                self.adapter,
                tasks,
                self.budget,
                tasks_per_step=self.tasks_per_step,
                minibatches_per_task=self.follow_steps + self.lead_steps,
                start=lambda phi: scattered(phi, self.particles, self.jitter, self.budget.seed),
                on_step=on_step,
            )

    def needed_bytes(self, tasks: Sequence[Task]) -> int:
        """Peak memory of meta-training; refused where it cannot fit."""
        M = self.particles
        return check_memory(
            self.adapter,
            tasks,
            self.budget,
            graphs=M * BACKWARD_GRAPH * self.follow_steps + 1.0,
            vectors=M * (8.0 + 4.0 * self.follow_steps),
            way_out="Use fewer particles, fewer follow_steps, or a smaller batch_size.",
        )

    def gradient(self, particles: Tensor, episode: Episode, heads: Heads, generator: torch.Generator) -> Tensor:
        """Of the chaser loss, with respect to the meta-particles; the task keeps the leader's head."""
        own = heads.values[episode.number]
        each = None if own is None else own.expand(len(particles), *own.shape).clone()
        start = Weights(particles, each).leaves()
        follower = self._steps(episode, start, generator, self.follow_steps, graph=True)
        if self.lead_steps == 0:
            return torch.zeros_like(particles)
        leader = self._steps(episode, follower.detached(), generator, self.lead_steps, graph=False)
        if leader.head is not None:
            heads.values[episode.number] = leader.head.mean(0)
        return torch.autograd.grad(chaser_loss(follower.theta, leader.theta), start.theta)[0]

    def _steps(self, episode: Episode, start: Weights, generator: torch.Generator, steps: int, graph: bool) -> Weights:
        return inner_loop(
            self.adapter,
            self.budget,
            episode,
            start,
            generator,
            steps=steps,
            learning_rate=self.inner_learning_rate,
            create_graph=graph,
            rows=episode.support if graph else episode.task.train,
            n_eff=float(len(episode.task.train)),
            kernel=stein,
        )

    def adapt(self, state: EpisodicState, task: Task, *, seed: int | None = None) -> Ensemble:
        """Stein variational gradient descent from the meta-particles, Adam in place of plain steps."""
        draws = max(self.budget.draws // self.particles, 1)
        return finetuned(self.adapter, task, state.phi, self.budget, seed, kernel=stein, draws=draws)


def stein(particles: Tensor, gradients: Tensor, n_eff: float, width: float | None = None) -> Tensor:
    """What particles ``[M, D]`` move by, from gradients of *mean* losses ``[M, D]``; descends."""
    attraction, repulsion = stein_terms(particles, gradients, width)
    return attraction - repulsion / n_eff


def stein_width(particles: Tensor) -> float:
    """h: the median of the squared distances between different particles, over log M."""
    M = len(particles)
    squares = torch.cdist(particles.detach(), particles.detach(), compute_mode="donot_use_mm_for_euclid_dist").square()
    off_diagonal = squares[~torch.eye(M, dtype=torch.bool, device=particles.device)]
    return max(float(off_diagonal.median()) / math.log(M), torch.finfo(particles.dtype).tiny)


def stein_terms(particles: Tensor, gradients: Tensor, width: float | None = None) -> tuple[Tensor, Tensor]:
    r"""Attraction :math:`\tfrac1M \sum_l k_{lm} g_l` and repulsion :math:`\tfrac1M \sum_l \nabla_{\theta_l} k_{lm}`.

    Repulsion sums to zero over the particles. One particle has a kernel of one and no repulsion.

    Args:
        particles: ``[M, D]``.
        gradients: ``[M, D]``.
        width: h; None takes :func:`stein_width`, held fixed in gradients.
    """
    M = len(particles)
    if M == 1:
        return gradients, torch.zeros_like(particles)
    h = stein_width(particles) if width is None else width
    gaps = particles.unsqueeze(1) - particles.unsqueeze(0)  # [l, m, D]: theta_l - theta_m
    k = torch.exp(-gaps.square().sum(-1) / h)
    repulsion = -2.0 / h * (k.unsqueeze(-1) * gaps).sum(0) / M
    return k.T @ gradients / M, repulsion


def chaser_loss(follower: Tensor, leader: Tensor) -> Tensor:
    """Sum of squared distances; the leader is held fixed."""
    return (follower - leader.detach()).square().sum()

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
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from pyro_lift.inference.adaptation.gradients import Weights
from pyro_lift.inference.adaptation.inner_loop import Hooks
from pyro_lift.inference.adaptation.predict import Ensemble
from pyro_lift.inference.baselines.episodes import Episode, Heads
from pyro_lift.inference.baselines.episodic import EpisodicMethod, EpisodicState, InnerLoop, scattered
from pyro_lift.inference.baselines.finetune import finetune
from pyro_lift.inference.baselines.peak_memory import BACKWARD_GRAPH, PeakMemory
from pyro_lift.inference.baselines.protocol import Budget
from pyro_lift.inference.top_level import at_top_level
from pyro_lift.models.adapters import RandomAdapter
from pyro_lift.models.task import Task
from pyro_lift.support.options import check_number

__all__ = ["BMAML", "chaser_loss", "stein", "stein_terms", "stein_width"]


@dataclass(frozen=True)
class BMAML(EpisodicMethod):
    """Bayesian MAML (BMAML): several particles in place of one start, moved by SVGD.

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

    @property
    def minibatches_per_task(self) -> int:
        """Minibatches drawn in one task of an outer step: the follower's and the leader's."""
        return self.follow_steps + self.lead_steps

    @property
    def second_order(self) -> bool:
        """Whether the whole run needs attention with a double backward."""
        return True

    @property
    def memory(self) -> PeakMemory:
        """Peak memory: MAML's, once for each particle."""
        M = self.particles
        return PeakMemory(
            graphs=M * BACKWARD_GRAPH * self.follow_steps + 1.0,
            vectors=M * (8.0 + 4.0 * self.follow_steps),
            advice="Use fewer particles, fewer follow_steps, or a smaller batch_size.",
        )

    def start(self, phi: Tensor) -> Tensor:
        """Scatter the meta-particles ``[M, D]`` around the jointly trained weights."""
        return scattered(phi, self.particles, self.jitter, self.budget.seed)

    def gradient(self, omega: Tensor, episode: Episode, heads: Heads, generator: torch.Generator) -> Tensor:
        """Compute the gradient of the chaser loss with respect to the meta-particles.

        The task keeps the leader's head.
        """
        head = heads.values[episode.number]
        head_of_each = None if head is None else head.expand(len(omega), *head.shape).clone()
        start = Weights(omega, head_of_each).leaves()
        rows = episode.task.train
        follower = self.follower(len(rows)).run(episode, start, generator)
        if self.lead_steps == 0:
            return torch.zeros_like(omega)
        leader = self.leader(len(rows)).run(episode, follower.detached(), generator, rows=rows)
        if leader.head is not None:
            heads.values[episode.number] = leader.head.mean(0)
        return torch.autograd.grad(chaser_loss(follower.theta, leader.theta), start.theta)[0]

    def follower(self, rows: int) -> InnerLoop:
        """Make the n differentiable SVGD steps from the meta-particles, for a task of so many rows."""
        return InnerLoop(
            self.adapter,
            self.budget,
            self.follow_steps,
            self.inner_learning_rate,
            create_graph=True,
            hooks=Hooks(kernel=stein),
            effective_rows=float(rows),
        )

    def leader(self, rows: int) -> InnerLoop:
        """Make the s further SVGD steps, held fixed in gradients, for a task of so many rows."""
        return replace(self.follower(rows), steps=self.lead_steps, create_graph=False)

    @at_top_level()
    def adapt(self, state: EpisodicState, task: Task, *, seed: int | None = None) -> Ensemble:
        """Run Stein variational gradient descent from the meta-particles, Adam in place of plain steps."""
        budget = replace(self.budget, draws=max(self.budget.draws // self.particles, 1))
        return finetune(self.adapter, task, state.phi, budget, Hooks(kernel=stein), seed=seed)


def stein(particles: Tensor, gradients: Tensor, effective_rows: float, width: float | None = None) -> Tensor:
    r"""Compute the SVGD direction, to be descended, from gradients of *mean* losses.

    .. math:: \phi_m = \tfrac1M \sum_l \bigl[k(\theta_l, \theta_m)\, g_l
              - \nabla_{\theta_l} k(\theta_l, \theta_m) / N_{\mathrm{eff}}\bigr]

    Args:
        particles: ``[M, D]``.
        gradients: g, ``[M, D]``.
        effective_rows: N_eff, the number of rows that the mean loss stands for.
        width: of the kernel; None takes :func:`stein_width`.

    References:
        Stein variational gradient descent, Liu and Wang, 2016, arXiv:1608.04471.
    """
    attraction, repulsion = stein_terms(particles, gradients, width)
    return attraction - repulsion / effective_rows


def stein_width(particles: Tensor) -> float:
    r"""Compute the kernel's width :math:`h = \mathrm{median}_{l \ne m} \lVert\theta_l - \theta_m\rVert^2 / \log M`.

    References:
        Stein variational gradient descent, Liu and Wang, 2016, arXiv:1608.04471, section 5.
    """
    M = len(particles)
    squares = torch.cdist(particles.detach(), particles.detach(), compute_mode="donot_use_mm_for_euclid_dist").square()
    off_diagonal = squares[~torch.eye(M, dtype=torch.bool, device=particles.device)]
    return max(float(off_diagonal.median()) / math.log(M), torch.finfo(particles.dtype).tiny)


def stein_terms(particles: Tensor, gradients: Tensor, width: float | None = None) -> tuple[Tensor, Tensor]:
    r"""Compute the attraction and the repulsion of :func:`stein`, each ``[M, D]``.

    .. math:: \tfrac1M \sum_l k_{lm}\, g_l, \qquad \tfrac1M \sum_l \nabla_{\theta_l} k_{lm}

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
    r"""Sum the squared distances of followers and leaders, the leader held fixed.

    .. math:: \sum_m \lVert \theta_m^{\mathrm{follower}} - \theta_m^{\mathrm{leader}} \rVert^2

    References:
        Bayesian model-agnostic meta-learning, Yoon et al., 2018, arXiv:1806.03836.
    """
    return (follower - leader.detach()).square().sum()

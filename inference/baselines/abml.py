r"""Amortised Bayesian meta-learning: a Gaussian prior whose variational posterior is a few gradient steps away.

.. math:: q_i^{(0)} = p = \mathcal N(\mu, \mathrm{diag}\,e^{2\rho}), \qquad
          q_i \leftarrow q_i - \alpha \nabla_q \bigl\{\mathbb E_q[L_i^{\mathrm{sup}}] + \mathrm{KL}(q \| p)/N_i\bigr\},

.. math:: g_i = \nabla_{(\mu, \rho)} \bigl\{ \mathbb E_{q_i}[L_i^{\mathrm{query}}] + \mathrm{KL}(q_i \| p)/N_i \bigr\}
          - \tfrac1N \nabla \log p(\mu, \rho)

with k steps and L reparametrised draws of the weights in each expectation; N_i and N are rows of the task and of all.

Cost: k + 1 minibatches a task, each for L draws; memory L times MAML's. Needs attention with a double backward and
sets it; ``first_order=True`` drops the second derivatives and the memory.

Our choices: losses are means, so the divergence, in nats, is divided by the number of rows (ports use a weight of 0.1
or 1e-6: 4,000 dimensions of it would swamp a mean loss); the query loss is on query rows alone; the hyper-prior is
N(0, 1) for the mean around the jointly trained weights and a Gamma for the precision with its mean at the starting
one; adaptation is the budget's Adam on (mu, rho) with one draw a step, and a prediction's draws are one from each of
the late q. Meta-training starts at sigma = ``prior_scale``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from pyro_lift.inference.adaptation.inner_loop import differentiate
from pyro_lift.inference.adaptation.predict import Ensemble
from pyro_lift.inference.baselines.episodes import Episode, Heads
from pyro_lift.inference.baselines.episodic import (
    EpisodicState,
    inner_loop,
    outer_loop,
    query_loss,
    twice_differentiable,
)
from pyro_lift.inference.baselines.finetune import finetuned, noise_generator
from pyro_lift.inference.baselines.memory import BACKWARD_GRAPH, check_memory
from pyro_lift.inference.baselines.protocol import Budget
from pyro_lift.models.adapters import RandomAdapter
from pyro_lift.models.task import Task
from pyro_lift.support.options import check_number

__all__ = ["ABML", "GaussianWeights", "divergence"]


@dataclass(frozen=True)
class GaussianWeights:
    """The reparametrisation hook: parameters ``[2 D]``, mean and log standard deviation, under such a prior."""

    prior: Tensor
    samples: int = 1

    def sample(self, theta: Tensor, generator: torch.Generator | None) -> Tensor:
        """One draw ``[D]``."""
        mean, log_sd = theta.chunk(2)
        noise = torch.randn(mean.shape, dtype=mean.dtype, device=mean.device, generator=generator)
        return mean + log_sd.exp() * noise

    def penalty(self, theta: Tensor) -> Tensor:
        """KL divergence to the prior, in nats."""
        return divergence(theta, self.prior)


def divergence(q: Tensor, p: Tensor) -> Tensor:
    """KL(q || p) of diagonal Gaussians given as mean and log standard deviation, ``[2 D]``."""
    (m, r), (m0, r0) = q.chunk(2), p.chunk(2)
    return (r0 - r + 0.5 * ((2.0 * (r - r0)).exp() + ((m - m0) * (-r0).exp()).square() - 1.0)).sum()


@dataclass(frozen=True)
class ABML:
    """ABML.

    Args:
        adapter: the network as a function of theta.
        budget: shared settings; an outer step draws ``tasks_per_step * (inner_steps + 1)`` of its minibatches.
        inner_steps: k.
        inner_learning_rate: alpha.
        samples: L.
        prior_scale: sigma at the start.
        gamma_shape: of the Gamma hyper-prior over precisions; its rate is ``gamma_shape * prior_scale ** 2``.
        hyper_prior: whether there is one.
        tasks_per_step: B.
        first_order: whether second derivatives are dropped.

    References:
        Amortized Bayesian meta-learning, Ravi and Beatson, ICLR 2019.
    """

    adapter: RandomAdapter
    budget: Budget = field(default_factory=Budget)
    inner_steps: int = 2
    inner_learning_rate: float = 0.05
    samples: int = 2
    prior_scale: float = 0.01
    gamma_shape: float = 1.0
    hyper_prior: bool = True
    tasks_per_step: int = 4
    first_order: bool = False

    def __post_init__(self) -> None:
        for name in ("inner_learning_rate", "prior_scale", "gamma_shape"):
            check_number(name, getattr(self, name))
        for name in ("inner_steps", "samples", "tasks_per_step"):
            check_number(name, getattr(self, name), least=1, open_below=False, whole=True)

    def meta_train(self, tasks: Sequence[Task], *, on_step: Callable[[], None] | None = None) -> EpisodicState:
        """Joint training, then outer steps; the state's ``phi`` is ``[2 D]``, mean and log standard deviation."""
        self.needed_bytes(tasks)
        rows = sum(len(task.train) for task in tasks)
        centre: list[Tensor] = []

        def start(phi: Tensor) -> Tensor:
            centre.append(phi)
            return torch.cat([phi, torch.full_like(phi, math.log(self.prior_scale))])

        def gradient(omega: Tensor, episode: Episode, heads: Heads, generator: torch.Generator) -> Tensor:
            g = self.gradient(omega, episode, heads, generator)
            return g - self.hyper_gradient(omega, centre[0]) / rows if self.hyper_prior else g

        with twice_differentiable(not self.first_order):
            return outer_loop(
                gradient,
                self.adapter,
                tasks,
                self.budget,
                tasks_per_step=self.tasks_per_step,
                minibatches_per_task=self.inner_steps + 1,
                start=start,
                on_step=on_step,
            )

    def needed_bytes(self, tasks: Sequence[Task]) -> int:
        """Peak memory of meta-training; refused where it cannot fit."""
        k = 0 if self.first_order else self.inner_steps
        return check_memory(
            self.adapter,
            tasks,
            self.budget,
            graphs=self.samples * (BACKWARD_GRAPH * k + 1.0),
            vectors=2.0 * (8.0 + 4.0 * self.inner_steps * self.samples),
            way_out="Use first_order=True, fewer samples, fewer inner_steps, or a smaller batch_size.",
        )

    def gradient(self, omega: Tensor, episode: Episode, heads: Heads, generator: torch.Generator) -> Tensor:
        """Of one task's query objective, with respect to the prior; moves that task's head."""
        start = heads.weights(episode.number, omega).leaves()
        rows = float(len(episode.task.train))
        noise = noise_generator(generator, omega)
        q = inner_loop(
            self.adapter,
            self.budget,
            episode,
            start,
            generator,
            steps=self.inner_steps,
            learning_rate=self.inner_learning_rate,
            create_graph=not self.first_order,
            n_eff=rows,
            reparametrisation=GaussianWeights(start.theta, self.samples),
        )
        at = start
        if self.first_order:
            at = q = q.leaves()
        form = GaussianWeights(start.theta, self.samples)
        draws = [q._replace(theta=form.sample(q.theta, noise)) for _ in range(self.samples)]
        losses = [query_loss(self.adapter, self.budget, episode, draw, generator) for draw in draws]
        value = torch.stack(losses).mean() + form.penalty(q.theta) / rows
        g = differentiate(value, at, create_graph=False)
        if self.first_order:  # q moves with the prior one to one, but the divergence also has the prior itself
            of_prior = torch.autograd.grad(divergence(q.theta.detach(), start.theta) / rows, start.theta)[0]
            g = g._replace(theta=g.theta + of_prior)
        heads.move(episode.number, g.head)
        return g.theta

    def hyper_gradient(self, omega: Tensor, centre: Tensor) -> Tensor:
        """Of the log hyper-prior at (mu, rho)."""
        mean, log_sd = omega.chunk(2)
        # log Gamma(tau; a, b) = (a - 1) log tau - b tau with tau = exp(-2 rho)
        rate = self.gamma_shape * self.prior_scale**2
        of_log_sd = -2.0 * (self.gamma_shape - 1.0) + 2.0 * rate * (-2.0 * log_sd).exp()
        return torch.cat([centre - mean, of_log_sd])

    def adapt(self, state: EpisodicState, task: Task, *, seed: int | None = None) -> Ensemble:
        """Variational inference under the learned prior; draws are one from each of the late posteriors."""
        form = GaussianWeights(state.phi)
        found = finetuned(self.adapter, task, state.phi, self.budget, seed, reparametrisation=form)
        generator = torch.Generator(device=state.phi.device).manual_seed(self.budget.seed if seed is None else seed)
        return replace(found, thetas=torch.stack([form.sample(q, generator) for q in found.thetas]))

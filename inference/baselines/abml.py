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

from pyro_lift.inference.adaptation.gradients import differentiate
from pyro_lift.inference.adaptation.inner_loop import Hooks
from pyro_lift.inference.adaptation.predict import Ensemble
from pyro_lift.inference.baselines.episodes import Episode, Heads
from pyro_lift.inference.baselines.episodic import (
    EpisodicMethod,
    EpisodicState,
    Gradient,
    InnerLoop,
    meta_train,
    query_loss,
)
from pyro_lift.inference.baselines.finetune import finetune, noise_generator
from pyro_lift.inference.baselines.peak_memory import BACKWARD_GRAPH, PeakMemory
from pyro_lift.inference.baselines.protocol import Budget
from pyro_lift.inference.top_level import at_top_level
from pyro_lift.models.adapters import RandomAdapter
from pyro_lift.models.task import Task
from pyro_lift.support.options import check_number

__all__ = ["ABML", "GaussianWeights", "divergence"]


@dataclass(frozen=True)
class GaussianWeights:
    """The mean-field Gaussian of the weights as a reparametrisation.

    Attributes:
        prior: mean and log standard deviation of the prior, ``[2 D]``, as the parameters are.
        samples: L, draws in an expectation.
    """

    prior: Tensor
    samples: int = 1

    def sample(self, theta: Tensor, generator: torch.Generator | None) -> Tensor:
        r"""Draw the weights ``[D]`` once, :math:`\mu + e^\rho \epsilon`."""
        mean, log_sd = theta.chunk(2)
        noise = torch.randn(mean.shape, dtype=mean.dtype, device=mean.device, generator=generator)
        return mean + log_sd.exp() * noise

    def penalty(self, theta: Tensor) -> Tensor:
        """Compute the KL divergence to the prior, in nats."""
        return divergence(theta, self.prior)


def divergence(q: Tensor, p: Tensor) -> Tensor:
    r"""Compute KL(q || p) of diagonal Gaussians given as mean and log standard deviation, ``[2 D]``, in nats.

    .. math:: \sum_d \rho_{p,d} - \rho_{q,d}
              + \tfrac12 \bigl\{e^{2 (\rho_{q,d} - \rho_{p,d})} + (\mu_{q,d} - \mu_{p,d})^2 e^{-2 \rho_{p,d}} - 1\bigr\}

    References:
        Auto-encoding variational Bayes, Kingma and Welling, 2014, arXiv:1312.6114, appendix B.
    """
    (m, r), (m0, r0) = q.chunk(2), p.chunk(2)
    return (r0 - r + 0.5 * ((2.0 * (r - r0)).exp() + ((m - m0) * (-r0).exp()).square() - 1.0)).sum()


@dataclass(frozen=True)
class ABML(EpisodicMethod):
    """Amortised Bayesian meta-learning (ABML): a Gaussian over starts, adapted by variational steps.

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
        """Peak memory: MAML's, once for each draw of the weights."""
        k = 0 if self.first_order else self.inner_steps
        return PeakMemory(
            graphs=self.samples * (BACKWARD_GRAPH * k + 1.0),
            vectors=2.0 * (8.0 + 4.0 * self.inner_steps * self.samples),
            advice="Use first_order=True, fewer samples, fewer inner_steps, or a smaller batch_size.",
        )

    def start(self, phi: Tensor) -> Tensor:
        """Begin from ``[2 D]``, the jointly trained weights and the log of ``prior_scale``."""
        return torch.cat([phi, torch.full_like(phi, math.log(self.prior_scale))])

    @at_top_level()
    def meta_train(self, tasks: Sequence[Task], *, on_step: Callable[[], None] | None = None) -> EpisodicState:
        """Train jointly, then take outer steps; the state's ``phi`` is ``[2 D]``, mean and log standard deviation."""
        rows = sum(len(task.train) for task in tasks)

        def with_hyper_prior(centre: Tensor) -> Gradient:
            def gradient(omega: Tensor, episode: Episode, heads: Heads, generator: torch.Generator) -> Tensor:
                g = self.gradient(omega, episode, heads, generator)
                return g - self.hyper_gradient(omega, centre) / rows

            return gradient

        return meta_train(self, tasks, gradient=with_hyper_prior if self.hyper_prior else None, on_step=on_step)

    def gradient(self, omega: Tensor, episode: Episode, heads: Heads, generator: torch.Generator) -> Tensor:
        """Compute the gradient of one task's query objective with respect to the prior's parameters.

        Also updates that task's head.
        """
        start = heads.weights(episode.number, omega).leaves()
        rows = float(len(episode.task.train))
        noise = noise_generator(generator, omega)
        form = GaussianWeights(start.theta, self.samples)
        inner = InnerLoop(
            self.adapter,
            self.budget,
            self.inner_steps,
            self.inner_learning_rate,
            create_graph=not self.first_order,
            hooks=Hooks(reparametrisation=form),
            effective_rows=rows,
        )
        q = inner.run(episode, start, generator)
        at = start
        if self.first_order:
            at = q = q.leaves()
        draws = [q._replace(theta=form.sample(q.theta, noise)) for _ in range(self.samples)]
        losses = [query_loss(self.adapter, self.budget, episode, draw, generator) for draw in draws]
        value = torch.stack(losses).mean() + form.penalty(q.theta) / rows
        g = differentiate(value, at, create_graph=False)
        if self.first_order:  # q moves with the prior one to one, but the divergence also has the prior itself
            of_prior = torch.autograd.grad(divergence(q.theta.detach(), start.theta) / rows, start.theta)[0]
            g = g._replace(theta=g.theta + of_prior)
        heads.update(episode.number, g.head)
        return g.theta

    def hyper_gradient(self, omega: Tensor, centre: Tensor) -> Tensor:
        r"""Compute the gradient of the log hyper-prior at :math:`(\mu, \rho)`.

        .. math:: \log p = \log \mathcal N(\mu; c, I) + \log \mathrm{Gamma}(e^{-2 \rho}; a, a \sigma_0^2)

        with centre c, a the ``gamma_shape`` and sigma_0 the ``prior_scale``.
        """
        mean, log_sd = omega.chunk(2)
        # log Gamma(tau; a, b) = (a - 1) log tau - b tau with tau = exp(-2 rho)
        rate = self.gamma_shape * self.prior_scale**2
        of_log_sd = -2.0 * (self.gamma_shape - 1.0) + 2.0 * rate * (-2.0 * log_sd).exp()
        return torch.cat([centre - mean, of_log_sd])

    @at_top_level()
    def adapt(self, state: EpisodicState, task: Task, *, seed: int | None = None) -> Ensemble:
        """Run variational inference under the learned prior; draw once from each of the late posteriors."""
        form = GaussianWeights(state.phi)
        late = finetune(self.adapter, task, state.phi, self.budget, Hooks(reparametrisation=form), seed=seed)
        generator = torch.Generator(device=state.phi.device).manual_seed(self.budget.seed if seed is None else seed)
        return replace(late, thetas=torch.stack([form.sample(q, generator) for q in late.thetas]))

r"""i-MAML: MAML with a proximal inner problem, whose meta-gradient needs its solution and not the way there.

.. math:: \theta_i^* = \arg\min_\theta L_i^{\mathrm{sup}}(\theta) + \tfrac{\lambda}{2} \lVert \theta - \phi \rVert^2,
          \qquad g_i = \bigl(I + \tfrac1\lambda \nabla^2 L_i^{\mathrm{sup}}(\theta_i^*)\bigr)^{-1}
                       \nabla L_i^{\mathrm{query}}(\theta_i^*)

The linear system is solved by Hessian-vector products, with conjugate gradients or with a Neumann series.

Cost: ``inner_steps + 1`` minibatches a task and ``solver_steps`` Hessian-vector products on the last support
minibatch, about two backward passes each; memory about that of one gradient that can be differentiated again, whatever
the number of inner steps. Needs attention with a double backward and sets it.

Our choices: lambda is in units of the mean loss; the proximal term is in every inner step (the authors' code takes
plain steps and a single proximal one) and in adaptation (``proximal_adaptation``); no extra damping but for
``damping``; conjugate gradients stop at a direction of negative curvature.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor
from torch.distributions import Distribution, Independent, Normal

from pyro_lift.inference.adaptation.gradients import Loss, Weights
from pyro_lift.inference.adaptation.inner_loop import Hooks, minibatches
from pyro_lift.inference.adaptation.predict import Ensemble
from pyro_lift.inference.baselines.episodes import Episode, Heads
from pyro_lift.inference.baselines.episodic import (
    EpisodicMethod,
    EpisodicState,
    InnerLoop,
    query_gradient,
    query_loss,
    twice_differentiable,
)
from pyro_lift.inference.baselines.finetune import finetune, loss_of
from pyro_lift.inference.baselines.peak_memory import BACKWARD_GRAPH, PeakMemory
from pyro_lift.inference.baselines.protocol import Budget
from pyro_lift.inference.top_level import at_top_level
from pyro_lift.models.adapters import RandomAdapter
from pyro_lift.models.task import Rows, Task
from pyro_lift.support.options import check_literal, check_number

__all__ = ["ImplicitMAML", "conjugate_gradients", "hessian_product", "neumann_series", "proximal"]

Product = Callable[[Tensor], Tensor]
Solver = Literal["cg", "neumann"]


@dataclass(frozen=True)
class ImplicitMAML(EpisodicMethod):
    """MAML with implicit gradients (i-MAML): they need the inner solution, and not the way there.

    Args:
        adapter: the network as a function of theta.
        budget: shared settings; an outer step draws ``tasks_per_step * (inner_steps + 1)`` of its minibatches.
        regularisation: lambda, per unit of *mean* loss.
        inner_steps: gradient steps on the inner problem (the authors: 16).
        inner_learning_rate: of those.
        solver: ``"cg"`` or ``"neumann"``.
        solver_steps: Hessian-vector products; 0 is first order.
        damping: added to the operator's diagonal.
        tasks_per_step: B.
        proximal_adaptation: whether a new task is fine-tuned under the same Gaussian prior.

    References:
        Meta-learning with implicit gradients, Rajeswaran et al., 2019, arXiv:1909.04630; the Neumann series is that
        of Optimizing millions of hyperparameters by implicit differentiation, Lorraine et al., 2020, arXiv:1911.02590.
    """

    adapter: RandomAdapter
    budget: Budget = field(default_factory=Budget)
    regularisation: float = 1.0
    inner_steps: int = 3
    inner_learning_rate: float = 0.05
    solver: Solver = "cg"
    solver_steps: int = 3
    damping: float = 0.0
    tasks_per_step: int = 4
    proximal_adaptation: bool = True

    def __post_init__(self) -> None:
        check_number("regularisation", self.regularisation)
        check_number("inner_learning_rate", self.inner_learning_rate)
        check_number("damping", self.damping, open_below=False)
        check_literal("solver", self.solver, Solver)
        check_number("solver_steps", self.solver_steps, open_below=False, whole=True)
        for name in ("inner_steps", "tasks_per_step"):
            check_number(name, getattr(self, name), least=1, open_below=False, whole=True)

    @property
    def minibatches_per_task(self) -> int:
        """Minibatches drawn in one task of an outer step; the solver's is one of the support rows again."""
        return self.inner_steps + 1

    @property
    def memory(self) -> PeakMemory:
        """Peak memory: one gradient that can be differentiated again, whatever the number of inner steps."""
        return PeakMemory(
            graphs=BACKWARD_GRAPH + 1.0,
            vectors=12.0,
            advice="Use solver_steps=0 with a smaller batch_size, or Reptile.",
        )

    def gradient(self, omega: Tensor, episode: Episode, heads: Heads, generator: torch.Generator) -> Tensor:
        """Compute the implicit gradient of one task; also updates that task's head by the query loss."""
        adapted = self.solve_inner(omega, episode, heads, generator).leaves()
        g = query_gradient(self.adapter, self.budget, episode, adapted, adapted, generator)
        heads.update(episode.number, g.head)
        if self.solver_steps == 0:
            return g.theta
        rows = minibatches(episode.support, self.budget.batch_size, generator)()
        with twice_differentiable():
            product = hessian_product(loss_of(self.adapter, episode.task, self.budget), adapted, rows)

            def operator(v: Tensor) -> Tensor:
                return (1.0 + self.damping) * v + product(v) / self.regularisation

            solve = conjugate_gradients if self.solver == "cg" else neumann_series
            return solve(operator, g.theta, self.solver_steps)

    def query_loss(self, phi: Tensor, episode: Episode, heads: Heads, generator: torch.Generator) -> Tensor:
        """Compute the loss of one query minibatch at the inner problem's solution, without a graph."""
        adapted = self.solve_inner(phi, episode, heads, generator)
        return query_loss(self.adapter, self.budget, episode, adapted, generator).detach()

    def solve_inner(self, phi: Tensor, episode: Episode, heads: Heads, generator: torch.Generator) -> Weights:
        """Take gradient steps on the support loss and the proximal term."""
        inner = InnerLoop(
            self.adapter,
            self.budget,
            self.inner_steps,
            self.inner_learning_rate,
            hooks=Hooks(prior=proximal(phi, self.regularisation, len(episode.support))),
        )
        return inner.run(episode, heads.weights(episode.number, phi), generator)

    @at_top_level()
    def adapt(self, state: EpisodicState, task: Task, *, seed: int | None = None) -> Ensemble:
        """Fine-tune from the learned centre, and towards it."""
        prior = proximal(state.phi, self.regularisation, len(task.train)) if self.proximal_adaptation else None
        return finetune(self.adapter, task, state.phi, self.budget, Hooks(prior=prior), seed=seed)


def proximal(phi: Tensor, regularisation: float, rows: int) -> Distribution:
    r"""Make the Gaussian prior that is the proximal term: variance :math:`1 / (\lambda N)` around phi.

    Its negative log density is :math:`N\,\tfrac\lambda2 \lVert\theta - \phi\rVert^2` over N rows, i-MAML's term for
    a mean loss.
    """
    return Independent(Normal(phi.detach(), (regularisation * rows) ** -0.5), 1)


def hessian_product(loss: Loss[Rows], weights: Weights, rows: Rows) -> Product:
    r"""Make the map :math:`v \mapsto \nabla^2_\theta \bar L(\theta)\,v` of a minibatch's mean loss, the head fixed.

    The gradient is differentiated again along v, so that the Hessian is never formed.

    References:
        Fast exact multiplication by the Hessian, Pearlmutter, Neural Computation 1994.
    """
    theta = weights.theta.detach().requires_grad_()
    head = None if weights.head is None else weights.head.detach()
    (g,) = torch.autograd.grad(loss(Weights(theta, head), rows), theta, create_graph=True)

    def product(v: Tensor) -> Tensor:
        return torch.autograd.grad(g, theta, grad_outputs=v, retain_graph=True)[0]

    return product


def conjugate_gradients(operator: Product, b: Tensor, steps: int) -> Tensor:
    """Solve ``A x = b`` for positive A, from x = 0.

    Args:
        operator: A.
        b: right-hand side.
        steps: products with A.

    Returns:
        The last iterate; at a direction of negative curvature the one before it, and b itself at the first.

    References:
        Methods of conjugate gradients for solving linear systems, Hestenes and Stiefel, 1952; Meta-learning with
        implicit gradients, Rajeswaran et al., 2019, arXiv:1909.04630, which solves its meta-gradient by it.
    """
    x, r = torch.zeros_like(b), b.clone()
    p, square = r.clone(), r.dot(r)
    for _ in range(steps):
        if square <= torch.finfo(b.dtype).tiny:
            break
        Ap = operator(p)
        curvature = p.dot(Ap)
        if curvature <= 0.0:
            return x if x.any() else b  # first order: the identity is all that is known of A
        step = square / curvature
        x, r = x + step * p, r - step * Ap
        p, square = r + (r.dot(r) / square) * p, r.dot(r)
    return x


def neumann_series(operator: Product, b: Tensor, steps: int, scale: float | None = None) -> Tensor:
    r"""Approximate :math:`A^{-1} b \approx s \sum_{k \le K} (I - s A)^k b`.

    Args:
        operator: A.
        b: right-hand side.
        steps: K, products.
        scale: s, below 2 over A's largest eigenvalue; None takes :math:`\lVert b\rVert / \lVert A b\rVert`. The series
            ends where its terms begin to grow.

    References:
        Optimizing millions of hyperparameters by implicit differentiation, Lorraine et al., 2020, arXiv:1911.02590.
    """
    term, total, s = b, b, scale
    for _ in range(steps):
        product = operator(term)
        if s is None:
            s = float(b.norm() / product.norm().clamp_min(torch.finfo(b.dtype).tiny))
        after = term - s * product
        if after.norm() > term.norm():
            break
        term = after
        total = total + term
    return total if s is None else s * total

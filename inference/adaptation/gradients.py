r"""Estimators of the gradient that an adaptation follows, and the wrappers that compose them.

An estimator takes weights and a minibatch to the mean loss and its gradient, as JAX's ``value_and_grad`` does:

.. math:: \bar L(w) = \tfrac1b \sum_{(x,y)} -\log p(y \mid x, w), \qquad g = \nabla_w \bar L(w)

:func:`value_and_gradient` makes one for a single set of weights. :func:`per_particle` maps it over particles, as
``vmap`` would, but with one graph alive at a time. :func:`per_task` is for tasks that share a pass through the network.
:func:`mixed` passes the gradients of particles through a kernel (SVGD), and :func:`reparametrised` changes the loss
before any of them: the weights are then drawn from parameters (variational inference).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol, TypeAlias, TypeVar

import torch
from torch import Tensor

__all__ = [
    "Estimator",
    "Kernel",
    "Loss",
    "Reparametrisation",
    "Weights",
    "differentiate",
    "mixed",
    "per_particle",
    "per_task",
    "reparametrised",
    "value_and_gradient",
]

Batch = TypeVar("Batch")


class Weights(NamedTuple):
    """The weights that are optimised in one task.

    Attributes:
        theta: ``[D]``, or ``[M, D]`` for particles; under a reparametrisation its parameters.
        head: the task's own head ``[C, width + 1]`` (``[M, C, width + 1]``), or None.
    """

    theta: Tensor
    head: Tensor | None = None

    def leaves(self) -> Weights:
        """Return the same values as leaves that gradients can be taken at."""
        head = None if self.head is None else self.head.detach().requires_grad_()
        return Weights(self.theta.detach().requires_grad_(), head)

    def detached(self) -> Weights:
        """Return the same values outside any graph."""
        return Weights(self.theta.detach(), None if self.head is None else self.head.detach())


#: Mean loss of a minibatch (of each task's ``[B]``, for :func:`per_task`).
Loss: TypeAlias = Callable[[Weights, Batch], Tensor]
#: Weights and a minibatch to the mean loss, without a graph, and its gradient at both parts of the weights.
Estimator: TypeAlias = Callable[[Weights, Batch], tuple[Tensor, Weights]]
#: From particles ``[M, D]`` and the gradients of their mean losses to the gradients they move by; the number is the
#: effective number of rows.
Kernel: TypeAlias = Callable[[Tensor, Tensor, float], Tensor]


class Reparametrisation(Protocol):
    """The map from parameters that are optimised to random weights, and its cost."""

    @property
    def samples(self) -> int:
        """Number of draws in an expectation."""
        ...

    def sample(self, theta: Tensor, generator: torch.Generator | None) -> Tensor:
        """Draw the weights once, differentiable in the parameters."""
        ...

    def penalty(self, theta: Tensor) -> Tensor:
        """Return the KL divergence, in nats, that is added to the *total* loss."""
        ...


def differentiate(value: Tensor, weights: Weights, create_graph: bool = False) -> Weights:
    """Differentiate a scalar with respect to both parts of the weights."""
    if weights.head is None:
        return Weights(torch.autograd.grad(value, weights.theta, create_graph=create_graph)[0])
    return Weights(*torch.autograd.grad(value, [weights.theta, weights.head], create_graph=create_graph))


def value_and_gradient(loss: Loss[Batch], create_graph: bool = False) -> Estimator[Batch]:
    """Estimate the gradient at one theta ``[D]`` and one head.

    Args:
        loss: mean negative log likelihood of a minibatch.
        create_graph: whether the gradient is itself differentiable in the weights, as MAML's inner loop needs.
    """

    def estimate(weights: Weights, batch: Batch) -> tuple[Tensor, Weights]:
        weights = weights if create_graph else weights.leaves()
        value = loss(weights, batch)
        return value.detach(), differentiate(value, weights, create_graph)

    return estimate


def per_particle(estimator: Estimator[Batch]) -> Estimator[Batch]:
    """Map an estimator over particles with a leading dimension M, all on one minibatch; the loss is their mean.

    Particle by particle rather than by ``vmap``, so that memory holds one graph.
    """

    def estimate(weights: Weights, batch: Batch) -> tuple[Tensor, Weights]:
        heads = [None] * len(weights.theta) if weights.head is None else list(weights.head)
        particles = [Weights(theta, head) for theta, head in zip(weights.theta, heads, strict=True)]
        values, gradients = zip(*(estimator(particle, batch) for particle in particles), strict=True)
        head_gradients = [g.head for g in gradients if g.head is not None]
        theta_gradient = torch.stack([g.theta for g in gradients])
        head_gradient = torch.stack(head_gradients) if head_gradients else None
        return torch.stack(values).mean(), Weights(theta_gradient, head_gradient)

    return estimate


def per_task(loss: Loss[Batch]) -> Estimator[Batch]:
    """Estimate the gradients of B independent tasks in one pass.

    Args:
        loss: takes the weights ``[B, D]`` and the minibatches of all tasks to their mean losses ``[B]``. The tasks
            share nothing, so that the gradient of the sum is the gradient of each.
    """

    def estimate(weights: Weights, batch: Batch) -> tuple[Tensor, Weights]:
        weights = weights.leaves()
        values = loss(weights, batch)
        return values.detach().mean(), differentiate(values.sum(), weights)

    return estimate


def mixed(estimator: Estimator[Batch], kernel: Kernel, effective_rows: float) -> Estimator[Batch]:
    """Pass the gradients of particles through a kernel; heads are not mixed."""

    def estimate(weights: Weights, batch: Batch) -> tuple[Tensor, Weights]:
        value, gradient = estimator(weights, batch)
        return value, gradient._replace(theta=kernel(weights.theta, gradient.theta, effective_rows))

    return estimate


def reparametrised(
    loss: Loss[Batch], form: Reparametrisation, effective_rows: float, generator: torch.Generator | None
) -> Loss[Batch]:
    r"""Average the loss over draws of the weights and add the penalty: the negative ELBO per row.

    .. math:: \tfrac1L \sum_{l \le L} \bar L(w_l) + \mathrm{KL} / N_{\mathrm{eff}}, \qquad
              w_l = \mathrm{sample}(\lambda, \epsilon_l)

    References:
        Auto-encoding variational Bayes, Kingma and Welling, 2014, arXiv:1312.6114.
    """

    def expected(weights: Weights, batch: Batch) -> Tensor:
        draws = range(form.samples)
        values = [loss(weights._replace(theta=form.sample(weights.theta, generator)), batch) for _ in draws]
        return torch.stack(values).mean() + form.penalty(weights.theta) / effective_rows

    return expected

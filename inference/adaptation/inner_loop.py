r"""The one adaptation engine: from a start to a task's weights, in one loop with six hooks.

Fine-tuning, a proximal inner loop, MAML's differentiable one, SVGD, variational inference and Langevin adaptation all
repeat two lines, a gradient of the *mean* loss of a minibatch and a move,

.. math:: g = \nabla_w\, \tfrac1b \sum_{(x,y)} -\log p(y \mid x, w),
          \qquad w' = \mathrm{move}(w, g, \text{prior} / N_{\mathrm{eff}}),

and differ in these hooks:

``start``
    the weights to begin from (and by it every meta-learner).
``prior``
    a Gaussian or a Gaussian mixture over theta, entered in closed form: L2 towards a centre, i-MAML's proximal term,
    LiFT's mixture.
``kernel``
    mixes the gradients of M particles: SVGD.
``reparametrisation``
    from what is optimised to the network's weights: ABML's mean and log standard deviation.
``create_graph``
    keeps the path differentiable: MAML.
``head policy``
    whether a task has a linear head of its own, its prior, and how much faster it learns.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.distributions import Distribution

from pyro_lift.inference.adaptation.update_rules import Rule
from pyro_lift.inference.sgld import DivergedError
from pyro_lift.models.adapters import RandomAdapter
from pyro_lift.models.likelihoods import log_likelihood
from pyro_lift.models.observation import outputs
from pyro_lift.models.priors import LocalGaussian, gaussian_at
from pyro_lift.models.task import Rows, Task
from pyro_lift.support.options import check_number

__all__ = [
    "HeadPolicy",
    "Kernel",
    "Loss",
    "Path",
    "Reparametrisation",
    "Weights",
    "adapt",
    "differentiate",
    "mean_loss",
    "minibatches",
]


class Weights(NamedTuple):
    """What is optimised in one task.

    Attributes:
        theta: ``[D]``, or ``[M, D]`` for particles; under a reparametrisation its parameters.
        head: the task's own head ``[C, width + 1]`` (``[M, C, width + 1]``), or None.
    """

    theta: Tensor
    head: Tensor | None = None

    def leaves(self) -> Weights:
        """The same values as leaves that gradients can be taken at."""
        head = None if self.head is None else self.head.detach().requires_grad_()
        return Weights(self.theta.detach().requires_grad_(), head)

    def detached(self) -> Weights:
        """The same values outside any graph."""
        return Weights(self.theta.detach(), None if self.head is None else self.head.detach())


class Path(NamedTuple):
    """Where a loop came to: the last weights, those kept on the way, and the minibatch losses."""

    last: Weights
    kept: list[Weights]
    losses: list[float]


#: Mean loss of a minibatch (of each task's, for a block).
Loss = Callable[[Weights, Any], Tensor]
#: From particles ``[M, D]`` and the gradients of their mean losses to the gradients they move by; the number is Neff.
Kernel = Callable[[Tensor, Tensor, float], Tensor]


class Reparametrisation(Protocol):
    """From what is optimised to weights, and what that costs."""

    samples: int

    def sample(self, theta: Tensor, generator: torch.Generator | None) -> Tensor:
        """One draw of the weights, differentiable."""
        ...

    def penalty(self, theta: Tensor) -> Tensor:
        """Added to the *total* loss, in nats: a KL divergence."""
        ...


@dataclass(frozen=True)
class HeadPolicy:
    """Heads of the tasks' own, linear on the network's output.

    Args:
        scale: standard deviation of a head's Gaussian prior; None for a network whose head all tasks share.
        rate: a head's learning rate over the adapter's.
    """

    scale: float | None = None
    rate: float = 10.0

    def __post_init__(self) -> None:
        if self.scale is not None:
            check_number("head scale", self.scale)
        check_number("head rate", self.rate)

    def fresh(self, task: Task, width: int, like: Tensor) -> Tensor | None:
        """A head of zeros, or None where the head is shared."""
        if self.scale is None or task.num_classes is None:
            return None
        return like.new_zeros(task.num_classes, width + 1)

    @property
    def prior(self) -> tuple[float, float] | None:
        """Mean and precision of each coordinate."""
        return None if self.scale is None else (0.0, self.scale**-2)


def mean_loss(adapter: RandomAdapter, task: Task, rows: Rows, weights: Weights, *, noise_scale: float = 1.0) -> Tensor:
    """Negative log likelihood of some rows, the mean over rows (a row's own tokens are summed)."""
    output = outputs(adapter, rows, weights.theta, weights.head)
    return -log_likelihood(task.kind, output, rows.target, noise_scale).mean()


def minibatches(rows: Rows, batch_size: int | None, generator: torch.Generator) -> Callable[[], Rows]:
    """Random minibatches without replacement inside a batch, as Pyro's subsampling plate draws them."""
    size = len(rows) if batch_size is None else min(batch_size, len(rows))
    device = rows.target.device

    def draw() -> Rows:
        return rows.take(torch.randperm(len(rows), generator=generator)[:size].to(device))

    return draw


def adapt(
    loss: Loss,
    start: Weights,
    batches: Callable[[], Any],
    rule: Rule,
    *,
    steps: int,
    n_eff: float | Tensor,
    keep: int = 0,
    prior: Distribution | None = None,
    kernel: Kernel | None = None,
    reparametrisation: Reparametrisation | None = None,
    create_graph: bool = False,
    block: bool = False,
    head_rule: Rule | None = None,
    head_prior: tuple[float, float] | None = None,
    generator: torch.Generator | None = None,
    on_step: Callable[[], None] | None = None,
    name: str = "",
) -> Path:
    """Run the loop.

    Args:
        loss: mean negative log likelihood of a minibatch at one theta ``[D]`` and one head.
        start: hook; particles have a leading dimension M, in theta and head alike.
        batches: gives a minibatch at each call.
        rule: how theta moves; a function of the learning rate that made it.
        steps: moves.
        n_eff: N_eff, the number of rows that the mean loss stands for (times an inflation, if any): priors, kernels
            and KL terms are divided by it. ``[B]`` for a block.
        keep: iterates kept, evenly spaced over the last half of the steps.
        prior: hook; over ``[D]``.
        kernel: hook; needs particles.
        reparametrisation: hook; theta is then its parameters.
        create_graph: hook; the result is a differentiable function of ``start``. Rules with noise or running means
            are not.
        block: whether ``start`` holds B tasks, ``[B, D]``, and ``loss`` takes all of them and their rows at once and
            returns ``[B]``: the same moves as B loops, one pass through the network each.
        head_rule: hook; how a head moves. None leaves it as it is.
        head_prior: hook; mean and precision of a head's prior.
        generator: of noise and of the reparametrisation.
        on_step: called after each step.
        name: of the task, for messages.

    Raises:
        ValueError: fewer steps than ``2 * keep``.
        DivergedError: a loss that is not finite.
    """
    if steps < 2 * keep:
        raise ValueError(f"steps={steps}: {keep} iterates from the last half need at least {2 * keep} steps.")
    weights, kept, losses = start, [], []
    state, head_state = rule.init(start.theta), None
    if head_rule is not None and start.head is not None:
        head_state = head_rule.init(start.head)
    thinning = max(steps // 2 // keep, 1) if keep else 1
    counted = head_counted = n_eff
    if isinstance(n_eff, Tensor):
        counted, head_counted = n_eff[:, None], n_eff[:, None, None]
    for step in range(steps):
        value, g = _gradient(loss, weights, batches(), n_eff, reparametrisation, create_graph, block, generator)
        losses.append(_finite(value, step, name))
        g_theta = g.theta if kernel is None else kernel(weights.theta, g.theta, float(n_eff))
        touching = None if prior is None else gaussian_at(prior, weights.theta.detach())
        theta, state = rule.move(weights.theta, g_theta, touching, state, counted, generator)
        head = weights.head
        if head is not None and g.head is not None and head_rule is not None:
            own = None if head_prior is None else _constant(head_prior, head)
            head, head_state = head_rule.move(head, g.head, own, head_state, head_counted, generator)
        weights = Weights(theta, head)
        left = steps - 1 - step
        if keep and left % thinning == 0 and left // thinning < keep:
            kept.append(weights.detached())
        if on_step is not None:
            on_step()
    return Path(weights if create_graph else weights.detached(), kept, losses)


def _gradient(
    loss: Loss,
    weights: Weights,
    rows: Any,
    n_eff: float | Tensor,
    reparametrisation: Reparametrisation | None,
    create_graph: bool,
    block: bool,
    generator: torch.Generator | None,
) -> tuple[Tensor, Weights]:
    """The mean loss (over particles too) and its gradient; particle by particle, so that memory holds one graph."""
    if not create_graph:
        weights = weights.leaves()

    def single(one: Weights) -> Tensor:
        if reparametrisation is None:
            return loss(one, rows)
        draws = range(reparametrisation.samples)
        values = [loss(one._replace(theta=reparametrisation.sample(one.theta, generator)), rows) for _ in draws]
        return torch.stack(values).mean() + reparametrisation.penalty(one.theta) / n_eff

    if block:
        values = loss(weights, rows)
        return values.detach().mean(), differentiate(values.sum(), weights, create_graph)
    if weights.theta.dim() == 1:
        value = single(weights)
        return value.detach(), differentiate(value, weights, create_graph)
    M = len(weights.theta)
    heads = [None] * M if weights.head is None else list(weights.head)
    parts = [Weights(theta, head) for theta, head in zip(weights.theta, heads, strict=True)]
    found = [(value := single(one), differentiate(value, one, create_graph)) for one in parts]
    head_gradients = [g.head for _, g in found if g.head is not None]
    stacked = Weights(torch.stack([g.theta for _, g in found]), torch.stack(head_gradients) if head_gradients else None)
    return torch.stack([value.detach() for value, _ in found]).mean(), stacked


def differentiate(value: Tensor, weights: Weights, create_graph: bool = False) -> Weights:
    """Gradient of a scalar at both parts of the weights."""
    if weights.head is None:
        return Weights(torch.autograd.grad(value, weights.theta, create_graph=create_graph)[0])
    return Weights(*torch.autograd.grad(value, [weights.theta, weights.head], create_graph=create_graph))


def _constant(prior: tuple[float, float], like: Tensor) -> LocalGaussian:
    return LocalGaussian(torch.full_like(like, prior[0]), torch.full_like(like, prior[1]))


def _finite(value: Tensor, step: int, name: str) -> float:
    number = float(value)
    if not torch.isfinite(value):
        where = f"step {step}" + (f", task {name!r}" if name else "")
        raise DivergedError(f"{where}: the loss is {number}. Use a smaller learning rate.", step)
    return number

r"""The one adaptation loop: a generator of weights, composed from an estimator of gradients and two update rules.

Fine-tuning, a proximal inner loop, MAML's differentiable one, SVGD, variational inference and Langevin adaptation all
repeat two lines, a gradient of the *mean* loss of a minibatch and an update,

.. math:: g = \nabla_w\, \tfrac1b \sum_{(x,y)} -\log p(y \mid x, w),
          \qquad w' = \mathrm{update}(w, g, \text{prior} / N_{\mathrm{eff}}),

which :func:`iterates` does for ever and :func:`follow` stops. They differ in the pieces put in:

start
    the weights to begin from (and by it every meta-learner).
estimator
    of the gradient, see :mod:`pyro_lift.inference.adaptation.gradients`: for one set of weights, for particles (SVGD),
    for tasks that share a pass, for weights drawn from parameters (ABML), or differentiable (MAML).
rule
    :class:`WeightsRule`: an update rule for theta and one for the head, each with its Gaussian prior (L2 towards a
    centre, i-MAML's proximal term, LiFT's mixture).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, Literal, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.distributions import Distribution

from pyro_lift.inference.adaptation.early_stopping import DrawWindows
from pyro_lift.inference.adaptation.gradients import (
    Estimator,
    Kernel,
    Loss,
    Reparametrisation,
    Weights,
    mixed,
    per_particle,
    reparametrised,
    value_and_gradient,
)
from pyro_lift.inference.adaptation.update_rules import Terms, UpdateRule
from pyro_lift.inference.sgld import DivergedError
from pyro_lift.models.adapters import RandomAdapter
from pyro_lift.models.likelihoods import log_likelihood
from pyro_lift.models.observation import is_narrower, outputs, own_head_scale, zero_head
from pyro_lift.models.priors import LocalGaussian, gaussian_at
from pyro_lift.models.solved_heads import SolvedHeads, has_solved_head
from pyro_lift.models.task import Rows, Task
from pyro_lift.support.options import check_choice, check_number, renamed_keywords

__all__ = [
    "HeadPolicy",
    "Hooks",
    "Iterate",
    "Trajectory",
    "WeightsRule",
    "follow",
    "iterates",
    "mean_loss",
    "minibatches",
]

Batch = TypeVar("Batch")


class Iterate(NamedTuple):
    """The weights after a step, and the minibatch loss that the step was taken at."""

    loss: float
    weights: Weights


class Trajectory(NamedTuple):
    """A finished loop: the last weights, those kept on the way, and the minibatch losses."""

    last: Weights
    kept: list[Weights]
    losses: list[float]


@renamed_keywords(rate="lr_scale")
@dataclass(frozen=True)
class HeadPolicy:
    """Settings for per-task linear heads on the network's output.

    Args:
        scale: standard deviation of a head's Gaussian prior; None leaves it to the network, whose head all tasks share
            unless its output is features or wider than all tasks' classes: then every task has a solved one on it.
        lr_scale: a head's learning rate over the adapter's.
        update: whether a head takes steps beside the adapter, or is solved on the task's rows
            (:mod:`~pyro_lift.models.solved_heads`): in fine-tuning, joint training and LiFT; the inner loops of the
            other meta-learners take steps. Solved, label matching has heads too. ``"shared"`` is solved, but the
            network's classes are the tasks', however many they are.
    """

    scale: float | None = None
    lr_scale: float = 10.0
    update: Literal["step", "solve", "shared"] = "solve"

    def __post_init__(self) -> None:
        if self.scale is not None:
            check_number("head scale", self.scale)
        check_number("head lr_scale", self.lr_scale)
        check_choice("head update", self.update, ["step", "solve", "shared"])
        if self.scale is not None and self.update == "shared":
            raise ValueError(f"head scale {self.scale:g}, and update 'shared': a head is shared or the task's own.")

    def fitted(self, adapter: RandomAdapter, tasks: Sequence[Task]) -> HeadPolicy:
        """Fill in what was left to the network (:func:`~pyro_lift.models.observation.own_head_scale`).

        Fitted to all the tasks of a problem, it says the same of a part of them.
        """
        scale = own_head_scale(adapter, tasks, self.scale, solve=self.update == "solve")
        varied = len({task.num_classes for task in tasks}) > 1
        if varied and scale is None and self.update == "solve" and is_narrower(adapter, tasks):
            return replace(self, update="shared")
        return self if scale == self.scale else replace(self, scale=scale)

    def fresh(self, task: Task, width: int, like: Tensor) -> Tensor | None:
        """Make a head of zeros, or None where the head is shared."""
        return zero_head(task, width, self.scale, like)

    def solved(
        self, adapter: RandomAdapter, tasks: Sequence[Task], start: Tensor, noise_scale: float = 1.0
    ) -> SolvedHeads | None:
        """Make the heads that are solved; None where some task has none of its own, or where they take steps."""
        if self.update == "step" or not all(has_solved_head(adapter, task, self.scale) for task in tasks):
            return None
        return SolvedHeads(adapter, tasks, start, noise_scale=noise_scale)

    @property
    def prior(self) -> tuple[float, float] | None:
        """Mean and precision of each coordinate."""
        return None if self.scale is None else (0.0, self.scale**-2)


@dataclass(frozen=True)
class Hooks:
    """Departures from a point estimate under a flat prior.

    Attributes:
        prior: over ``[D]``, a Gaussian or a Gaussian mixture, entered in closed form.
        kernel: mixes the gradients of particles; theta is then ``[M, D]``.
        reparametrisation: from what is optimised to the network's weights.
    """

    prior: Distribution | None = None
    kernel: Kernel | None = None
    reparametrisation: Reparametrisation | None = None

    def estimator(
        self,
        loss: Loss[Batch],
        particles: bool,
        effective_rows: float,
        generator: torch.Generator | None,
        create_graph: bool = False,
    ) -> Estimator[Batch]:
        """Compose the estimator of the gradient.

        Args:
            loss: mean loss of a minibatch at one theta and one head.
            particles: whether weights have a leading dimension M.
            effective_rows: N_eff, by which kernels and KL terms are divided.
            generator: of the draws of a reparametrisation.
            create_graph: whether the gradient is itself differentiable.
        """
        if self.reparametrisation is not None:
            loss = reparametrised(loss, self.reparametrisation, effective_rows, generator)
        estimator = value_and_gradient(loss, create_graph)
        if particles:
            estimator = per_particle(estimator)
        return estimator if self.kernel is None else mixed(estimator, self.kernel, effective_rows)


@dataclass(frozen=True)
class WeightsRule:
    """The update of both parts of the weights, theta and head.

    Attributes:
        theta: how theta moves; a function of the learning rate that made it.
        effective_rows: N_eff, the number of rows that the mean loss stands for (times an inflation, if any): the pull
            of the priors is divided by it. ``[B]`` where the weights are those of B tasks.
        prior: of theta, over ``[D]``.
        head: how a head moves. None leaves it as it is.
        head_prior: mean and precision of each coordinate of a head.
        generator: of the updates' noise.
    """

    theta: UpdateRule
    effective_rows: float | Tensor
    prior: Distribution | None = None
    head: UpdateRule | None = None
    head_prior: tuple[float, float] | None = None
    generator: torch.Generator | None = None

    def init(self, weights: Weights) -> tuple[Any, Any]:
        """Return the states of both rules; a head that is absent or does not move has None."""
        head_state = None if self.head is None or weights.head is None else self.head.init(weights.head)
        return self.theta.init(weights.theta), head_state

    def update(self, weights: Weights, gradient: Weights, state: tuple[Any, Any]) -> tuple[Weights, tuple[Any, Any]]:
        """Move both parts of the weights once. Pure."""
        theta_state, head_state = state
        prior = None if self.prior is None else gaussian_at(self.prior, weights.theta.detach())
        theta, theta_state = self.theta.update(
            weights.theta, gradient.theta, theta_state, self._terms(prior, weights.theta)
        )
        head = weights.head
        if head is not None and gradient.head is not None and self.head is not None:
            head_prior = None if self.head_prior is None else _constant(self.head_prior, head)
            head, head_state = self.head.update(head, gradient.head, head_state, self._terms(head_prior, head))
        return Weights(theta, head), (theta_state, head_state)

    def _terms(self, prior: LocalGaussian | None, x: Tensor) -> Terms:
        rows = self.effective_rows
        if isinstance(rows, Tensor):
            rows = rows.view(-1, *(1,) * (x.dim() - 1))  # one number a task
        return Terms(prior, rows, self.generator)


def _constant(prior: tuple[float, float], like: Tensor) -> LocalGaussian:
    return LocalGaussian(torch.full_like(like, prior[0]), torch.full_like(like, prior[1]))


def mean_loss(adapter: RandomAdapter, task: Task, rows: Rows, weights: Weights, *, noise_scale: float = 1.0) -> Tensor:
    """Compute the negative log likelihood of some rows, the mean over rows (a row's own tokens are summed)."""
    output = outputs(adapter, rows, weights.theta, weights.head)
    return -log_likelihood(task.kind, output, rows.target, noise_scale).mean()


def minibatches(rows: Rows, batch_size: int | None, generator: torch.Generator) -> Callable[[], Rows]:
    """Make a sampler of minibatches, without replacement inside one, as Pyro's subsampling plate draws them."""
    size = len(rows) if batch_size is None else min(batch_size, len(rows))
    device = rows.target.device

    def draw() -> Rows:
        return rows.take(torch.randperm(len(rows), generator=generator)[:size].to(device))

    return draw


def iterates(
    estimator: Estimator[Batch], rule: WeightsRule, start: Weights, batches: Callable[[], Batch], name: str = ""
) -> Iterator[Iterate]:
    """Yield the weights after each step, for ever.

    Under a differentiable estimator and rule every iterate is a differentiable function of ``start``. Rules with noise
    or running means are not differentiable.

    Args:
        estimator: of the mean loss and its gradient.
        rule: how the weights move.
        start: the weights before the first step; particles have a leading dimension M, in theta and head alike.
        batches: gives a minibatch at each call.
        name: of the task, for messages.

    Raises:
        DivergedError: a loss that is not finite; the step is not taken.
    """
    weights, state = start, rule.init(start)
    step = 0
    while True:
        value, gradient = estimator(weights, batches())
        loss = _finite(value, step, name)
        weights, state = rule.update(weights, gradient, state)
        step += 1
        yield Iterate(loss, weights)


def follow(
    weights: Iterator[Iterate],
    steps: int,
    *,
    keep: int = 0,
    on_step: Callable[[], None] | None = None,
    windows: DrawWindows | None = None,
) -> Trajectory:
    """Take a number of steps, and keep some of the iterates of the last half, evenly spaced.

    Args:
        weights: :func:`iterates`.
        steps: at least one.
        keep: iterates kept, outside any graph.
        on_step: called after each step.
        windows: that development rows judge; those of the best are kept in place of the last half's.

    Raises:
        ValueError: fewer steps than ``2 * keep``, or none.
    """
    if steps < 2 * keep:
        raise ValueError(f"steps={steps}: {keep} iterates from the last half need at least {2 * keep} steps.")
    kept: list[Weights] = []
    losses: list[float] = []
    thinning = max(steps // 2 // keep, 1) if keep else 1
    last: Weights | None = None
    for step, iterate in enumerate(islice(weights, steps)):
        last = iterate.weights
        losses.append(iterate.loss)
        remaining = steps - 1 - step
        if keep and remaining % thinning == 0 and remaining // thinning < keep:
            kept.append(last.detached())
        if on_step is not None:
            on_step()
        if windows is not None and windows.see(step + 1, _named(iterate.weights)):
            break
    if last is None:
        raise ValueError(f"steps={steps}: at least one step is needed.")
    if windows is not None:
        thetas, heads = windows.kept["theta"], windows.kept.get("head")
        kept = [Weights(theta, None if heads is None else heads[k]) for k, theta in enumerate(thetas)]
    return Trajectory(last, kept, losses)


def _named(weights: Weights) -> dict[str, Tensor]:
    return {"theta": weights.theta} if weights.head is None else {"theta": weights.theta, "head": weights.head}


def _finite(value: Tensor, step: int, name: str) -> float:
    number = float(value)
    if not torch.isfinite(value):
        place = f"step {step}" + (f", task {name!r}" if name else "")
        raise DivergedError(
            f"{place}: the loss is {number}. Use a smaller learning rate.", step, (name,) if name else ()
        )
    return number

r"""Meta-testing (Eq. 15-18): the program of a new task under the learned prior, and the start of its chain.

.. math:: p(\theta_* \mid D_*, D_{1..N}) \propto
          p(D_* \mid \theta_*)\,\sum_j \alpha_j\,\mathcal N(\theta_*; \mu_j, V_j + \beta^2 I)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import pyro.distributions as dist
import torch
from torch import Tensor

from pyro_lift.models.adapters import RandomAdapter
from pyro_lift.models.flat import FlatAdapter, FlatBlock
from pyro_lift.models.priors import broadened
from pyro_lift.models.solved_heads import SolvedHeads
from pyro_lift.models.task import Task

__all__ = ["Start", "best_start", "best_starts", "heads_at_best_start", "meta_test_program"]


class Start(NamedTuple):
    """The start of a test-time chain.

    Attributes:
        component: the one chosen.
        theta: its mean ``[D]``.
        log_likelihood: of the task at that mean, the sum over training rows.
    """

    component: int
    theta: Tensor
    log_likelihood: float


def meta_test_program(
    adapter: RandomAdapter,
    task: Task,
    mixture: dist.MixtureSameFamily,
    *,
    beta: float,
    batch_size: int | None = None,
    head_scale: float | None = None,
    noise_scale: float = 1.0,
    solved: SolvedHeads | None = None,
) -> FlatAdapter:
    r"""Make the program of a new task under the mixture over phi, broadened by beta.

    .. math:: \theta_* \sim \sum_j \alpha_j\,\mathcal N(\mu_j, V_j + \beta^2 I)

    Args:
        adapter: the network as a function of theta.
        task: the new task.
        mixture: over phi.
        beta: standard deviation of a task's weights around phi.
        batch_size: rows of a minibatch; None takes all rows.
        head_scale: standard deviation of the head's prior; None for a head that all tasks share.
        noise_scale: standard deviation of the noise in regression.
        solved: the task's head, where it is solved on the way and no site.

    References:
        LiFT, Eq. 16 and 17.
    """
    return FlatAdapter(
        adapter,
        task,
        broadened(mixture, beta),
        batch_size=batch_size,
        head_scale=head_scale,
        noise_scale=noise_scale,
        solved=solved,
    )


def heads_at_best_start(
    adapter: RandomAdapter, tasks: Sequence[Task], mixture: dist.MixtureSameFamily
) -> tuple[SolvedHeads, list[Start]]:
    """Solve the heads of new tasks: the component whose features predict left-out rows best, and heads from there on.

    Args:
        adapter: the network as a function of theta.
        tasks: with heads of their own.
        mixture: over phi, ``[K, D]``.

    Returns:
        The heads, their priors' widths chosen at each task's start; and the starts, the log likelihood being that of
        left-out rows (sum over training rows).
    """
    means = mixture.component_distribution.mean
    order = torch.argsort(mixture.mixture_distribution.probs, descending=True).tolist()
    at_mean = {j: SolvedHeads(adapter, tasks, means[j]) for j in order}
    starts, chosen = [], []
    for k, task in enumerate(tasks):
        best = max(order, key=lambda j, k=k: at_mean[j].score(k))  # type: ignore[misc]
        starts.append(Start(best, means[best], at_mean[best].score(k) * len(task.train)))
        chosen.append(at_mean[best].prior_sd(k))
    return SolvedHeads(adapter, tasks, means[order[0]], widths=chosen), starts


@torch.no_grad()
def best_start(program: FlatAdapter, mixture: dist.MixtureSameFamily) -> Start:
    r"""Choose the component mean with the highest likelihood on the task's own training data.

    .. math:: j^* = \arg\max_j\, \log p(D_* \mid \theta_* = \mu_j)

    The paper does not say where test-time chains start. Past a thousand dimensions the responsibilities are one-hot,
    so a chain never leaves its component: the start *is* the choice of prototype, and the data should make it. Ties
    (a head of zeros) go to the heavier component.
    """
    means = mixture.component_distribution.mean
    order = torch.argsort(mixture.mixture_distribution.probs, descending=True).tolist()
    starts = [Start(j, means[j], float(program.log_likelihood(means[j]))) for j in order]
    return max(starts, key=lambda start: start.log_likelihood)


@torch.no_grad()
def best_starts(program: FlatBlock, mixture: dist.MixtureSameFamily) -> list[Start]:
    """Choose :func:`best_start` for each task of a block; every mean goes through the network once for all tasks."""
    means = mixture.component_distribution.mean
    order = torch.argsort(mixture.mixture_distribution.probs, descending=True).tolist()
    values = torch.stack([program.log_likelihood(means[j]) for j in order])  # [K, B]
    starts = []
    for k, best in enumerate(values.argmax(0).tolist()):
        starts.append(Start(order[best], means[order[best]], float(values[best, k])))
    return starts

r"""Meta-testing (Eq. 15-18): the program of a new task under the learned prior, and the start of its chain.

.. math:: p(\theta_* \mid D_*, D_{1..N}) \propto
          p(D_* \mid \theta_*)\,\sum_j \alpha_j\,\mathcal N(\theta_*; \mu_j, V_j + \beta^2 I)
"""

from __future__ import annotations

from typing import NamedTuple

import pyro.distributions as dist
import torch
from torch import Tensor

from pyro_lift.models.adapters import RandomAdapter
from pyro_lift.models.flat import FlatAdapter, FlatBlock
from pyro_lift.models.priors import broadened
from pyro_lift.models.task import Task

__all__ = ["Start", "best_start", "best_starts", "meta_test_program"]


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

    References:
        LiFT, Eq. 16 and 17.
    """
    prior = broadened(mixture, beta)
    return FlatAdapter(adapter, task, prior, batch_size=batch_size, head_scale=head_scale, noise_scale=noise_scale)


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

r"""Meta-test as a program (Eq. 15-18): a new task under the learned prior, and where its chain starts.

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
    """The component chosen, its mean ``[D]``, and the task's log likelihood there (sum over training rows)."""

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
    """The new task under the mixture over phi broadened by beta, Eq. 17."""
    prior = broadened(mixture, beta)
    return FlatAdapter(adapter, task, prior, batch_size=batch_size, head_scale=head_scale, noise_scale=noise_scale)


@torch.no_grad()
def best_start(program: FlatAdapter, mixture: dist.MixtureSameFamily) -> Start:
    """The component mean with the highest likelihood on the task's own training data.

    The paper does not say where test-time chains start. Past a thousand dimensions the responsibilities are one-hot,
    so a chain never leaves its component: the start *is* the choice of prototype, and the data should make it. Ties
    (a head of zeros) go to the heavier component.
    """
    means = mixture.component_distribution.mean
    order = torch.argsort(mixture.mixture_distribution.probs, descending=True).tolist()
    found = [Start(j, means[j], float(program.log_likelihood(means[j]))) for j in order]
    return max(found, key=lambda start: start.log_likelihood)


@torch.no_grad()
def best_starts(program: FlatBlock, mixture: dist.MixtureSameFamily) -> list[Start]:
    """:func:`best_start` of each task of a block; every component's mean goes through the network once for all."""
    means = mixture.component_distribution.mean
    order = torch.argsort(mixture.mixture_distribution.probs, descending=True).tolist()
    values = torch.stack([program.log_likelihood(means[j]) for j in order])  # [K, B]
    found = []
    for k, best in enumerate(values.argmax(0).tolist()):
        found.append(Start(order[best], means[order[best]], float(values[best, k])))
    return found

r"""Meta-testing (Eq. 15-18): the program of a new task under the learned prior, and the start of its chain.

.. math:: p(\theta_* \mid D_*, D_{1..N}) \propto
          p(D_* \mid \theta_*)\,\sum_j \alpha_j\,\mathcal N(\theta_*; \mu_j, V_j + \beta^2 I)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import pyro.distributions as dist
import torch
from torch import Tensor

from pyro_lift.models.adapters import RandomAdapter
from pyro_lift.models.class_head import ClassHead
from pyro_lift.models.flat import FlatAdapter, FlatBlock
from pyro_lift.models.priors import broadened
from pyro_lift.models.solved_heads import SolvedHeads
from pyro_lift.models.task import Task

__all__ = ["UNTOUCHED", "Start", "Untouched", "best_start", "best_starts", "heads_at_best_start", "meta_test_program"]

#: Rows that a start is chosen by, at most: they tell prototypes apart, and more would cost as much as the chain.
START_ROWS = 48
#: The "component" of a start at the adapter's own initial weights.
UNTOUCHED = -1


class Start(NamedTuple):
    """The start of a test-time chain.

    Attributes:
        component: the one chosen; :data:`UNTOUCHED` where the weights are those of no component.
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
    beta: float | Tensor,
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
        beta: standard deviation of a task's weights around phi; one number, or ``[D]``.
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


class Untouched(NamedTuple):
    """The start that is there without any meta-training, as a candidate beside the mixture's means.

    A new task may be none of the kind that meta-training has seen; then phi is the wrong place to begin at, and the
    network as it was is a better one. The task's own rows say which.

    Attributes:
        theta: the adapter's own initial weights ``[D]``.
        probability: that a new task is none of the kind, before its rows are seen.
    """

    theta: Tensor
    probability: float

    @property
    def log_odds(self) -> float:
        """Log of the prior odds against the mixture."""
        return math.log(self.probability) - math.log1p(-self.probability)

    def prior(self, mixture: dist.MixtureSameFamily) -> dist.MixtureSameFamily:
        """Make the prior of such a task: one component, as wide as the heaviest, at the untouched weights."""
        heaviest = int(mixture.mixture_distribution.probs.argmax())
        scale = mixture.component_distribution.variance[heaviest].sqrt()
        component = dist.Normal(self.theta.to(scale).unsqueeze(0), scale.unsqueeze(0)).to_event(1)
        return dist.MixtureSameFamily(dist.Categorical(torch.ones_like(scale[:1])), component)


class _Candidate(NamedTuple):
    component: int
    theta: Tensor
    log_odds: float


def _candidates(mixture: dist.MixtureSameFamily, untouched: Untouched | None) -> list[_Candidate]:
    """The components' means, the heaviest first, and the untouched weights."""
    means = mixture.component_distribution.mean
    order = torch.argsort(mixture.mixture_distribution.probs, descending=True).tolist()
    candidates = [_Candidate(j, means[j], 0.0) for j in order]
    if untouched is not None:
        candidates.append(_Candidate(UNTOUCHED, untouched.theta.to(means), untouched.log_odds))
    return candidates


def heads_at_best_start(
    adapter: RandomAdapter,
    tasks: Sequence[Task],
    mixture: dist.MixtureSameFamily,
    untouched: Untouched | None = None,
    *,
    scale: float | None = None,
    mean: ClassHead | None = None,
    noise_scale: float = 1.0,
) -> tuple[SolvedHeads, list[Start]]:
    """Solve the heads of new tasks: the start whose features predict left-out rows best, and heads from there on.

    Args:
        adapter: the network as a function of theta.
        tasks: with heads of their own.
        mixture: over phi, ``[K, D]``.
        untouched: a further start.
        scale: of label matching without rows; None takes the readout's.
        mean: the head that theirs have their prior around; None is zero.
        noise_scale: standard deviation of the noise in regression.

    Returns:
        The heads, their priors chosen at each task's start; and the starts, the log likelihood being that of
        left-out rows (sum over training rows).
    """
    candidates = _candidates(mixture, untouched)
    options: dict[str, Any] = {"scale": scale, "noise_scale": noise_scale}
    few = None if mean is None else mean.few_values
    before = None if mean is None else mean._replace(few_values=None, few_classes=None)  # of features at phi
    of = [before if candidate.component == UNTOUCHED else mean for candidate in candidates]
    pairs = zip(candidates, of, strict=True)
    heads = [SolvedHeads(adapter, tasks, candidate.theta, mean=each, **options) for candidate, each in pairs]
    components = len(candidates) - (untouched is not None)  # which come before the untouched weights
    starts, chosen, begun = [], [], []
    for k, task in enumerate(tasks):
        # Two rows that are left out in turn, under a noise that is small beside what heads leave open, say nothing.
        able = len(candidates) if few is None or few.of(len(task.train)) is None else components
        scores = [each.score(k) * len(task.train) for each in heads[:able]]
        odds = [score + candidate.log_odds for score, candidate in zip(scores, candidates[:able], strict=True)]
        best = odds.index(max(odds))
        starts.append(Start(candidates[best].component, candidates[best].theta, scores[best]))
        chosen.append(heads[best].choice(k))
        begun.append(heads[best])
    solved = heads[0].on(tasks, chosen)
    for k, each in enumerate(begun):
        solved.take_over(k, each)
    return solved, starts


@torch.no_grad()
def best_start(program: FlatAdapter, mixture: dist.MixtureSameFamily, untouched: Untouched | None = None) -> Start:
    r"""Choose the component mean with the highest likelihood on the task's own training data.

    .. math:: j^* = \arg\max_j\, \log p(D_* \mid \theta_* = \mu_j)

    The paper does not say where test-time chains start. Past a thousand dimensions the responsibilities are one-hot,
    so a chain never leaves its component: the start *is* the choice of prototype, and the data should make it. Ties
    (a head of zeros) go to the heavier component. The untouched weights are chosen where the likelihood times their
    prior odds is higher than of any component.
    """
    candidates = _candidates(mixture, untouched)
    values = [float(program.log_likelihood(candidate.theta, most=START_ROWS)) for candidate in candidates]
    return _best(candidates, values)


@torch.no_grad()
def best_starts(program: FlatBlock, mixture: dist.MixtureSameFamily, untouched: Untouched | None = None) -> list[Start]:
    """Choose :func:`best_start` for each task of a block; every start goes through the network once for all tasks."""
    candidates = _candidates(mixture, untouched)
    values = torch.stack(
        [program.log_likelihood(candidate.theta, most=START_ROWS) for candidate in candidates], -1
    )  # [B, K]
    return [_best(candidates, of_task) for of_task in values.tolist()]


def _best(candidates: Sequence[_Candidate], log_likelihoods: Sequence[float]) -> Start:
    odds = [value + each.log_odds for value, each in zip(log_likelihoods, candidates, strict=True)]
    best = odds.index(max(odds))
    return Start(candidates[best].component, candidates[best].theta, log_likelihoods[best])

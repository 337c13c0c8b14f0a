r"""Tuned LoRA: what a careful user of PEFT does with one task, and No Meta Train at its best.

Probe first, then fine-tune (LP-FT): the task's own head is solved on the frozen network, then LoRA and head take Adam
steps together from there,

.. math:: (\theta, h)_0 = (\theta_{\text{start}}, \hat h(\theta_{\text{start}})), \qquad
          (\theta, h)_{t+1} = (\theta, h)_t - \text{Adam}\big(\nabla L\big).

The rate and the number of steps are chosen on a fifth of the task's own rows, by their mean log probability; no step at
all, the untouched probe, is among the candidates. Then everything is done again on all rows, as chosen.

Cost: for each rate the budget's steps, and once more for the last fit; nothing is meta-trained.

Our choices: the fifth is stratified, and a function of the targets alone; steps are looked at after a quarter, a half
and all of the budget's; the prediction is the last network's, as PEFT's would be. A network whose head all tasks share
has no head to solve: it begins as it is, and the linear probe on its features is a candidate besides. With fewer than
five rows there is nothing to choose by, and the candidate without steps is taken.

References:
    Fine-tuning can distort pretrained features and underperform out-of-distribution, Kumar et al., 2022,
    arXiv:2202.10054.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyro_lift.inference.adaptation.gradients import Weights, value_and_gradient
from pyro_lift.inference.adaptation.inner_loop import WeightsRule, iterates, minibatches
from pyro_lift.inference.adaptation.predict import Ensemble, predict
from pyro_lift.inference.adaptation.update_rules import adam
from pyro_lift.inference.baselines.finetune import loss_of
from pyro_lift.inference.baselines.linear_probe import LinearProbe, LinearProbeState, has_probe
from pyro_lift.inference.baselines.protocol import Budget, Posterior, with_heads
from pyro_lift.inference.baselines.search_space import SearchSpace
from pyro_lift.inference.sgld import DivergedError
from pyro_lift.inference.top_level import at_top_level
from pyro_lift.models.adapters import RandomAdapter
from pyro_lift.models.heads import folds
from pyro_lift.models.likelihoods import log_likelihood
from pyro_lift.models.observation import check_width
from pyro_lift.models.solved_heads import SolvedHeads, has_solved_head
from pyro_lift.models.task import Rows, Task
from pyro_lift.support.options import check_number

__all__ = ["LoRATuned", "LoRATunedState", "TunedPosterior"]

#: One row of so many is held out to choose by.
HELD_OUT = 5
#: Shares of the budget's steps after which the held-out rows are looked at.
LOOKS = (0.25, 0.5, 1.0)


class LoRATunedState(NamedTuple):
    """The adapter's own weights ``[D]``; nothing was learned."""

    theta: Tensor
    meta_steps: int = 0


class Candidate(NamedTuple):
    """A setting, and what it scored: mean log probability of a held-out row. No rate is no step."""

    rate: float | None
    steps: int
    score: float
    probe: bool = False


@dataclass(frozen=True)
class TunedPosterior:
    """A point estimate of a task's weights, and how it was chosen.

    Attributes:
        posterior: what predicts.
        chosen: the setting that it was fitted with.
        tried: all of them, the chosen one included; empty where there were too few rows to choose by.
    """

    posterior: Posterior
    chosen: Candidate
    tried: tuple[Candidate, ...]

    @property
    def thetas(self) -> Tensor | None:
        """The adapter's weights ``[1, D]``; None for a probe, which moves none."""
        return getattr(self.posterior, "thetas", None)

    @property
    def heads(self) -> Tensor | None:
        """The task's own head ``[1, C, E + 1]``, that of a probe included; None where it has none."""
        head: Tensor | None = getattr(self.posterior, "head", None)
        return getattr(self.posterior, "heads", None) if head is None else head.unsqueeze(0)

    def predict(self, inputs: Any) -> Tensor:
        """Probabilities ``[n, C]``; for regression values."""
        return self.posterior.predict(inputs)


@dataclass(frozen=True)
class LoRATuned:
    """LoRA and head tuned on the task's own rows.

    Args:
        adapter: the network as a function of theta.
        budget: steps at most, rows of a minibatch, heads and noise scale; its learning rate is not used.
        rates: of Adam that are tried; a head's is the budget's multiple.
    """

    adapter: RandomAdapter
    budget: Budget = field(default_factory=Budget)
    rates: tuple[float, ...] = (3e-4, 1e-3, 3e-3, 1e-2)

    def __post_init__(self) -> None:
        if not self.rates:
            raise ValueError("rates is empty: there is nothing to try.")
        for rate in self.rates:
            check_number("rates", rate)

    @property
    def space(self) -> SearchSpace:
        """Nothing: rate and steps are chosen on each task's own rows."""
        return SearchSpace()

    @at_top_level()
    def meta_train(self, tasks: Sequence[Task], *, on_step: Callable[[], None] | None = None) -> LoRATunedState:
        """Learn nothing."""
        del tasks, on_step
        return LoRATunedState(self.adapter.initial.clone())

    @at_top_level()
    def adapt(self, state: LoRATunedState, task: Task, *, seed: int | None = None) -> TunedPosterior:
        """Choose on a fifth of the rows, then fit on all of them.

        Raises:
            ValueError: labels outside the head's range.
        """
        task = task.to(state.theta.device)
        budget = with_heads(self.budget, self.adapter, [task])
        check_width(self.adapter, [task], budget.heads.scale)
        seed = budget.seed if seed is None else seed
        part = self._held_out(task)
        tried: list[Candidate] = []
        if part is not None:
            kept, held = part
            tried = self._tried(_Fit(self.adapter, replace(task, train=kept), state.theta, budget, seed), held)
        chosen = max(tried, key=lambda candidate: candidate.score, default=Candidate(None, 0, float("nan")))
        fit = _Fit(self.adapter, task, state.theta, budget, seed)
        if chosen.probe or (not tried and not fit.own_head and has_probe(task)):
            return TunedPosterior(self._probe(fit), chosen._replace(probe=True), tuple(tried))
        weights = fit.start
        if chosen.rate is not None:
            *_, (_, weights) = fit.path(chosen.rate, [chosen.steps])
        head = None if weights.head is None else weights.head.unsqueeze(0)
        return TunedPosterior(Ensemble(self.adapter, task, weights.theta.unsqueeze(0), head), chosen, tuple(tried))

    def _tried(self, fit: _Fit, held: Rows) -> list[Candidate]:
        tried = [Candidate(None, 0, fit.score(fit.start, held))]
        if not fit.own_head and has_probe(fit.task):
            tried.append(Candidate(None, 0, _score_of(self._probe(fit).predict(held), fit, held), probe=True))
        looks = sorted({max(round(share * fit.budget.steps), 1) for share in LOOKS})
        for rate in self.rates:
            try:
                tried += [Candidate(rate, steps, fit.score(weights, held)) for steps, weights in fit.path(rate, looks)]
            except DivergedError:  # a rate that is too high is no candidate
                continue
        return tried

    def _probe(self, fit: _Fit) -> Posterior:
        return LinearProbe(self.adapter, fit.budget).adapt(LinearProbeState(fit.theta), fit.task)

    @staticmethod
    def _held_out(task: Task) -> tuple[Rows, Rows] | None:
        """Split a task's rows in those to fit and those to choose by; None where they are too few."""
        n = len(task.train)
        if n < HELD_OUT:
            return None
        classes = task.num_classes is not None
        fold = folds(task.train.target if classes else torch.arange(n), HELD_OUT, stratified=classes)
        held = fold.to(task.train.target.device) == HELD_OUT - 1
        return task.train.take((~held).nonzero().squeeze(-1)), task.train.take(held.nonzero().squeeze(-1))


class _Fit:
    """One task's rows, and the paths of Adam from where its head was solved."""

    def __init__(self, adapter: RandomAdapter, task: Task, theta: Tensor, budget: Budget, seed: int) -> None:
        self.adapter, self.task, self.theta, self.budget, self.seed = adapter, task, theta, budget, seed
        self.own_head = has_solved_head(adapter, task, budget.heads.scale)
        noise = budget.noise_scale
        self.heads = SolvedHeads(adapter, [task], theta, noise_scale=noise) if self.own_head else None
        head = None if self.heads is None else self.heads.solve(0, theta)
        self.start = Weights(theta, head)

    def path(self, rate: float, looks: Sequence[int]) -> list[tuple[int, Weights]]:
        """Follow Adam at a rate; the weights after these numbers of steps, in order."""
        generator = torch.Generator().manual_seed(self.seed)
        estimator = value_and_gradient(loss_of(self.adapter, self.task, self.budget))
        mask = self._linear_part()

        def masked(weights: Weights, rows: Rows) -> tuple[Tensor, Weights]:
            value, gradient = estimator(weights, rows)
            return value, gradient if mask is None or gradient.head is None else gradient._replace(
                head=gradient.head * mask
            )

        rule = WeightsRule(adam(rate), float(len(self.task.train)), head=adam(self.budget.heads.lr_scale * rate))
        batches = minibatches(self.task.train, self.budget.batch_size, generator)
        steps = iterates(masked, rule, self.start, batches, self.task.name)
        return [
            (number, iterate.weights.detached())
            for number, iterate in enumerate(islice(steps, max(looks)), 1)
            if number in looks
        ]

    def _linear_part(self) -> Tensor | None:
        """One where a head takes steps: under label matching not where its similarities' scale is."""
        head = self.start.head
        if head is None or not self.adapter.matches(self.task.train.named):
            return None
        mask = torch.ones_like(head)
        mask[:, -len(head) - 1 : -1] = 0.0
        if head.shape[-1] == len(head) + 1:  # a scale alone
            mask[:] = 0.0
        return mask

    def score(self, weights: Weights, held: Rows) -> float:
        """Return the mean log probability of held-out rows."""
        head = None if weights.head is None else weights.head.unsqueeze(0)
        found = predict(self.adapter, weights.theta.unsqueeze(0), held, self.task.kind, heads=head, batch_size=64)
        return _score_of(found, self, held)


def _score_of(found: Tensor, fit: _Fit, held: Rows) -> float:
    """Mean log probability of rows under predicted probabilities, of values under the noise."""
    if fit.task.kind != "regression":
        found = found.clamp_min(1e-12).log()
    return float(log_likelihood(fit.task.kind, found, held.target, fit.budget.noise_scale).mean())

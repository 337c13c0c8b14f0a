r"""The choice of a regression's head before it is solved: how strong a ridge it is, and how far off it will be.

Under normal noise of standard deviation :math:`\eta` and a prior of width s the mode depends on their ratio r = s /
:math:`\eta` alone. So the ratio is chosen, by cross-validation on the task's own rows, and the noise is what the rows
left out then show,

.. math:: \hat\eta^2(r) = \frac1{nM} \sum_n \big\|y_n - \hat h_{-k(n)}(x_n; r)\big\|^2, \qquad
          \min_r\ \tfrac{nM}2 \log \hat\eta^2(r) + \tfrac12 \log^2 (r / r_0), \qquad s = r\,\hat\eta.

Ten rows say little of how sure their ratio may be, and a family of tasks says more: :math:`r_0` is the ratio that is
best for all tasks of meta-training together (:func:`best_width`). Where there are none it is the one at which features
say as much as noise does, :math:`1 / \sqrt E`, and its prior half as wide in variance.

No unit of the targets changes the choice, nor their level: the biases' prior stands at their mean. Around a head that
all tasks share it stands at that one's, and a bias is as near to it as the rest of the head; how near that is has
nothing to do with the ratio of heads that stand alone. All tasks say it together too, and a task's own rows then take
more to say otherwise: the second term is :data:`~pyro_lift.models.heads.SURE` times as large.

A value, unlike a probability, has no bounds. Where the adapter comes to where a feature is level on a task's few rows,
a head on it would be steep, and predictions of other rows beyond all proportion. So features are divided by no less
than :data:`LEAST_SPREAD` of what they varied by when the choice was made. What three rows vary by may be a tenth of
what rows to come will, so they are divided by no less than :data:`USUAL_SPREAD` of what rows of all tasks vary by
either.

Where tasks were asked with few of their rows, a task of so few has the prior that they say
(:mod:`~pyro_lift.models.few_values`). Else one of :data:`FEW` rows or fewer has the ratio of all tasks as it is,
features are divided by no less than what rows of all tasks vary by, and those that are level on its rows by that too:
how wide its predictions are is then what all tasks say of rows to come.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from pyro_lift.models.few_values import FewValues, least_spread
from pyro_lift.models.head_choice import HeadChoice
from pyro_lift.models.head_problem import BIAS_SD, HeadModel, head_problem, least_squares
from pyro_lift.models.heads import SURE, folds, scaling_of
from pyro_lift.models.value_spread import scaling_under
from pyro_lift.support.small_problems import on_one_thread

__all__ = ["RATIO_WIDTHS", "best_width", "choose_value_head", "columns_of", "few_value_head", "standard_ratios"]

#: Standard deviations of a value under the prior (standardised features, so ``r * sqrt(E)``) over that of the noise
#: that are tried. Targets without noise are common in regressions, and classes never are so sure.
RATIO_WIDTHS = (0.1, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0)
#: The least error of left-out rows over the spread of targets: below it all rows are as good as exact.
LEAST = 1e-2
#: The least that a feature is divided by, over its spread where the choice is made.
LEAST_SPREAD = 0.2
#: The same over its spread among the rows of all tasks. Sines of 2, 3 and 5 rows on features (seeds 0 and 1), mean
#: square error: 6.7, 12.6, 19.3 without it, 3.8, 6.2, 4.0 with it; at 1 they have 3.1, 4.4, 3.4, and sines of 15 rows
#: (three seeds) a density that is 0.07 nats lower.
USUAL_SPREAD = 0.5
#: Rows of a task, up to which it goes by all tasks. Regressions on tanh features (two seeds of three families, tasks of
#: 24 rows; nats a row): of one row 5.4 to 7.3 without it and 3.7 to 4.5 with it, of 12 rows -0.13, -0.14, -0.03, +0.03
#: and +0.02, of 24 -0.08, +0.01, -0.05, +0.06 and -0.01.
FEW = 16

#: Of the median spread over features, the least that one is divided by there.
DEAD = 1e-3
#: How seldom a task of few rows may be as far as that from what the others say.
SELDOM = 1e-4


def standard_ratios(features: int, widths: Sequence[float] = RATIO_WIDTHS) -> tuple[float, ...]:
    """The ratios that are tried for so many features."""
    return tuple(width / math.sqrt(features) for width in widths)


def best_width(
    told: Sequence[tuple[Tensor, Tensor]], feature_sd: Tensor | None = None, around: Tensor | None = None
) -> float:
    """Return the one of :data:`RATIO_WIDTHS` that predicts the left-out rows of several tasks best, all together.

    Args:
        told: features ``[n, E]`` and targets of each task; of a single row nothing can be left out.
        feature_sd: as of :func:`choose_value_head`.
        around: the head ``[M, E + 1]`` that theirs stand around, which has not seen the tasks; None is none.
    """
    costs = [0.5 * math.log(width) ** 2 for width in RATIO_WIDTHS]
    for features, target in told:
        if len(features) < 2:
            continue
        models = _models(target, around, _least_spread(features, feature_sd))
        errors = _errors(features.double(), columns_of(target), models, standard_ratios(features.shape[-1]), 10)
        costs = [cost + _cost(error, target) for cost, error in zip(costs, errors, strict=True)]
    return RATIO_WIDTHS[costs.index(min(costs))]


@on_one_thread
@torch.no_grad()
def choose_value_head(
    features: Tensor,
    target: Tensor,
    *,
    around: Tensor | None = None,
    width: float | None = None,
    feature_sd: Tensor | None = None,
    by_all: bool = False,
    noise_scale: float = 1.0,
    most_folds: int = 10,
) -> HeadChoice:
    """Choose a regression's prior and noise by cross-validation on its rows, every fold and ratio solved exactly.

    Args:
        features: ``[n, E]``.
        target: values ``[n]`` or ``[n, M]``.
        around: the head ``[M, E + 1]`` at which the prior stands; None stands at the mean of the targets.
        width: what other tasks say of the ratio (:func:`best_width`), around the head where there is one; None where
            there are none, and around a head is 1.
        feature_sd: standard deviation of each feature over the rows of all tasks, ``[E]``; None where it is unknown.
        by_all: whether a task of few rows goes by all tasks; in runs of before it goes by its own.
        noise_scale: standard deviation of the noise where a single row says nothing of it.
        most_folds: number of folds, at most.

    Returns:
        The choice; its score is the mean log density of left-out rows at the noise that they show, NaN for a single
        row, which cannot be left out.
    """
    n, E = features.shape
    told = width if by_all and n <= FEW and feature_sd is not None else None  # what a task of few rows goes by
    few, widths = told is not None, RATIO_WIDTHS if told is None else (_nearest(told),)
    models = _models(target, around, _least_spread(features, feature_sd, few=few), widths, level=few)
    y, tried = columns_of(target), standard_ratios(E, widths)
    sure = 1.0
    if around is not None:
        sure, width = (1.0, 1.0) if width is None else (SURE, width)
    if n < 2:  # one row says next to nothing against a head of all tasks
        usual = widths.index(_nearest(1.0 if width is None else width)) if around is None else 0
        return _scaled(models[usual], tried[usual], noise_scale, math.nan)
    errors = _errors(features.double(), y, models, tried, most_folds)
    prior = [math.log(w) ** 2 if width is None else 0.5 * sure * math.log(w / width) ** 2 for w in widths]
    costs = [_cost(error, target) + penalty for error, penalty in zip(errors, prior, strict=True)]
    best = costs.index(min(costs))
    noise = math.sqrt(errors[best])
    return _scaled(models[best], tried[best], noise, _score(noise, target))


@on_one_thread
@torch.no_grad()
def few_value_head(features: Tensor, target: Tensor, few: FewValues, noise_scale: float) -> HeadChoice | None:
    r"""Return what tasks say of a head of so few rows, with the noise that its left-out rows show.

    The rows themselves may say that their task is none of these: with residuals r from the head of all tasks, whose
    covariance is K under the prior and the noise, the level as far off as a bias and a value together,
    :math:`r^\top K^{-1} r` is chi-squared, and a task that is beyond all but one in ten thousand (:data:`SELDOM`) goes
    by its own rows.

    Args:
        features: ``[n, E]``.
        target: values ``[n]`` or ``[n, M]``.
        few: what tasks say.
        noise_scale: standard deviation of the noise that they said it of.

    Returns:
        As :func:`choose_value_head`; None of more rows than tasks were asked with, and of a task that is unlike them.
    """
    n, E = features.shape
    asked = few.of(n)
    if asked is None:
        return None
    model, ratio = few.model(asked, noise_scale), asked.width / (noise_scale * math.sqrt(E))
    if _unlike(features.double(), columns_of(target), model, ratio, noise_scale):
        return None
    if n < 2:
        return _scaled(model, ratio, noise_scale, math.nan)
    (error,) = _errors(features.double(), columns_of(target), [model], [ratio], n)
    noise = math.sqrt(error)
    return _scaled(model, ratio, noise, _score(noise, target))


def _unlike(x: Tensor, y: Tensor, model: HeadModel, ratio: float, noise: float) -> bool:
    """Whether targets are too far from the head that theirs stands around to have come from its prior."""
    from scipy.stats import chi2

    offset = model.offset(x)
    assert offset is not None and isinstance(model.bias_sd, float)
    z = scaling_under(model, x).apply(x)
    level = model.bias_sd**2 + ratio**2 * x.shape[-1]  # where the task's mean row lies the slopes say too
    covariance = ratio**2 * (z @ z.mT) + level + torch.eye(len(x)).to(z)
    missed = (y - offset) / noise
    far = float((missed * torch.linalg.solve(covariance, missed)).sum())
    return not far < chi2.isf(SELDOM, y.numel())


def columns_of(target: Tensor) -> Tensor:
    """Return the targets of a regression as columns ``[n, M]``, in float64."""
    return target.double().reshape(len(target), -1)


def _nearest(width: float) -> float:
    """Return the nearest of the widths that are tried."""
    return min(RATIO_WIDTHS, key=lambda tried: abs(math.log(tried / width)))


def _models(
    target: Tensor,
    around: Tensor | None,
    least: Tensor,
    widths: Sequence[float] = RATIO_WIDTHS,
    *,
    level: bool = False,
) -> list[HeadModel]:
    """Make the likelihood in units of the noise, for each width."""
    values = columns_of(target).shape[-1]
    model = HeadModel(values, "regression", around=around, least_spread=least, level_spread=level)
    if around is None:
        return [model._replace(bias_sd=BIAS_SD * width, centred=True) for width in widths]
    return [model._replace(bias_sd=width) for width in widths]


def _least_spread(features: Tensor, feature_sd: Tensor | None, *, few: bool = False) -> Tensor:
    """Return the least that each feature is divided by; of few rows what rows of all tasks vary by."""
    own = scaling_of(features).sd
    if few and feature_sd is not None and bool((feature_sd > 0.0).any()):
        return least_spread(feature_sd.to(own), DEAD)
    least = LEAST_SPREAD * own
    return least if feature_sd is None else least.maximum(USUAL_SPREAD * feature_sd.to(least))


def _errors(x: Tensor, y: Tensor, models: Sequence[HeadModel], ratios: Sequence[float], most_folds: int) -> list[float]:
    """Compute the mean square error of the rows left out for each ratio, no less than that of rows taken for exact."""
    n, offset = len(x), models[0].offset(x)
    z = models[0].limited(scaling_of(x)).apply(x)
    fold = folds(y, min(n, most_folds), stratified=False)
    kept = torch.stack([(fold != k).double() for k in range(int(fold.max()) + 1)]).to(x.device)  # [F, n]
    least = LEAST**2 * float(y.var(0, correction=0).mean()) + 1e-24 * float(1.0 + y.square().mean())
    errors = []
    for model, ratio in zip(models, ratios, strict=True):
        problem = head_problem(z, y, model, ratio, None, offset).of_rows(kept)
        miss = (problem.outputs(least_squares(problem)) - problem.target).square().mean(-1)
        errors.append(float(((1.0 - kept) * miss).sum() / n) + least)
    return errors


def _cost(error: float, target: Tensor) -> float:
    """Return the negative log likelihood of left-out rows at the noise that fits them best, but for constants."""
    return 0.5 * target.numel() * math.log(error)


def _score(noise: float, target: Tensor) -> float:
    """Return the mean log density of left-out rows at the noise that fits them best."""
    return -0.5 * columns_of(target).shape[-1] * (math.log(2.0 * math.pi * noise**2) + 1.0)


def _scaled(model: HeadModel, ratio: float, noise: float, score: float) -> HeadChoice:
    """Bring a choice from units of the noise to those of the targets."""
    assert not isinstance(model.bias_sd, Tensor)
    model = model._replace(noise_scale=noise, bias_sd=noise * model.bias_sd)
    return HeadChoice(model, noise * ratio, score)

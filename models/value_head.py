r"""The choice of a regression's head before it is solved: how strong a ridge it is, and how far off it will be.

Under normal noise of standard deviation :math:`\eta` and a prior of width s the mode depends on their ratio r = s /
:math:`\eta` alone. So the ratio is chosen, by cross-validation on the task's own rows, and the noise is what the rows
left out then show,

.. math:: \hat\eta^2(r) = \frac1{nM} \sum_n \big\|y_n - \hat h_{-k(n)}(x_n; r)\big\|^2, \qquad
          \min_r\ \tfrac{nM}2 \log \hat\eta^2(r) + \tfrac12 \log^2 (r / r_0), \qquad s = r\,\hat\eta,

with the prior of :func:`~pyro_lift.models.heads.width_penalty` on the ratio. No unit of the targets changes the choice,
nor their level: the biases' prior stands at their mean. Around a head that all tasks share it stands at that one's, and
a bias is as near to it as the rest of the head.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pyro_lift.models.head_choice import HeadChoice
from pyro_lift.models.head_problem import BIAS_SD, HeadModel, head_problem, least_squares
from pyro_lift.models.heads import folds, scaling_of, width_penalty

__all__ = ["RATIO_WIDTHS", "choose_value_head", "standard_ratios"]

#: Standard deviations of a value under the prior (standardised features, so ``r * sqrt(E)``) over that of the noise
#: that are tried. Targets without noise are common in regressions, and classes never are so sure.
RATIO_WIDTHS = (0.1, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0)
#: The least error of left-out rows over the spread of targets: below it all rows are as good as exact.
LEAST = 1e-2


def standard_ratios(features: int) -> tuple[float, ...]:
    """The ratios that are tried for so many features."""
    return tuple(width / math.sqrt(features) for width in RATIO_WIDTHS)


@torch.no_grad()
def choose_value_head(
    features: Tensor,
    target: Tensor,
    *,
    around: Tensor | None = None,
    noise_scale: float = 1.0,
    most_folds: int = 10,
) -> HeadChoice:
    """Choose a regression's prior and noise by cross-validation on its rows, every fold and ratio solved exactly.

    Args:
        features: ``[n, E]``.
        target: values ``[n]`` or ``[n, M]``.
        around: the head ``[M, E + 1]`` at which the prior stands; None stands at the mean of the targets.
        noise_scale: standard deviation of the noise where a single row says nothing of it.
        most_folds: number of folds, at most.

    Returns:
        The choice; its score is the mean log density of left-out rows at the noise that they show, NaN for a single
        row, which cannot be left out.
    """
    n, tried = len(features), standard_ratios(features.shape[-1])
    x, y = features.double(), columns_of(target)
    models = [_model(y.shape[-1], ratio, features.shape[-1], around) for ratio in tried]
    if n < 2:
        middle = len(tried) // 2
        return _scaled(models[middle], tried[middle], noise_scale, math.nan)
    z, offset = scaling_of(x).apply(x), models[0].offset(x)
    fold = folds(y, min(n, most_folds), stratified=False)
    kept = torch.stack([(fold != k).double() for k in range(int(fold.max()) + 1)]).to(x.device)  # [F, n]
    least = LEAST**2 * float(y.var(0, correction=0).mean()) + 1e-24 * float(1.0 + y.square().mean())
    errors = []
    for model, ratio in zip(models, tried, strict=True):
        problem = head_problem(z, y, model, ratio, None, offset).of_rows(kept)
        miss = (problem.outputs(least_squares(problem)) - problem.target).square().mean(-1)
        errors.append(float(((1.0 - kept) * miss).sum() / n) + least)
    M = y.shape[-1]
    costs = [
        0.5 * n * M * math.log(error) + width_penalty(ratio, tried) for error, ratio in zip(errors, tried, strict=True)
    ]
    best = costs.index(min(costs))
    noise = math.sqrt(errors[best])
    return _scaled(models[best], tried[best], noise, -0.5 * M * (math.log(2.0 * math.pi * errors[best]) + 1.0))


def columns_of(target: Tensor) -> Tensor:
    """Return the targets of a regression as columns ``[n, M]``, in float64."""
    return target.double().reshape(len(target), -1)


def _model(values: int, ratio: float, features: int, around: Tensor | None) -> HeadModel:
    """Make the likelihood in units of the noise."""
    width = ratio * math.sqrt(features)
    if around is None:
        return HeadModel(values, "regression", bias_sd=BIAS_SD * width, centred=True)
    return HeadModel(values, "regression", around=around, bias_sd=width)


def _scaled(model: HeadModel, ratio: float, noise: float, score: float) -> HeadChoice:
    """Bring a choice from units of the noise to those of the targets."""
    assert not isinstance(model.bias_sd, Tensor)
    return HeadChoice(model._replace(noise_scale=noise, bias_sd=noise * model.bias_sd), noise * ratio, score)

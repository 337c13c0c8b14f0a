r"""The choice of a task's head before it is solved: the width of its prior and, under label matching, the scale.

Both are chosen by cross-validation on the task's own rows, together. The scale stands against a normal prior around the
one that is taken where there are no rows, of which it costs a row or less to be far away:

.. math:: \min_{s, \tau}\ -\sum_n \log p\big(y_n \mid x_n, \hat h_{-k(n)}(s, \tau)\big)
          + \tfrac12\Big(\frac{s - s_0}{s_0}\Big)^2, \qquad s \in \{0, \tfrac14, \tfrac12, 1, 2\}\,s_0,

Where the labels' texts say nothing of the classes the choice is s = 0, a linear probe. Solving for s together with the
head is convex too, but the mode follows the rows that it is solved on, and predicts less well. Where every row has
options of its own there is no linear head, so that s is all there is: it is solved, under the same prior.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from typing import NamedTuple

from torch import Tensor

from pyro_lift.models.head_problem import HeadModel, ScalePrior
from pyro_lift.models.heads import BIAS_SD, UsualPrior, choose_prior_sd, width_penalty
from pyro_lift.models.readouts import ABSENT, LabelMatching
from pyro_lift.models.tensor_digest import digest_of

__all__ = ["SCALE_SHARES", "HeadChoice", "choose_head", "choose_matching_head"]

#: Scales that are tried, as shares of the one without rows, which is tried too.
SCALE_SHARES = (0.5, 0.25, 0.0, 2.0)
#: No larger scale is tried, unless it is the one without rows: at 40 a few rows that agree make sure of the rest.
LARGEST = LabelMatching().scale


class HeadChoice(NamedTuple):
    """What a head is solved under.

    Attributes:
        model: the likelihood, the scale of label matching in it.
        sd: s, standard deviation of a weight on a standardised feature.
        score: mean log probability of left-out rows; NaN for a single row, which cannot be left out.
    """

    model: HeadModel
    sd: float
    score: float


#: Choices that are remembered, by a digest of what they were made of: a number or two each.
REMEMBERED = 4096
_choices: OrderedDict[bytes, HeadChoice] = OrderedDict()


def choose_head(
    features: Tensor,
    target: Tensor,
    num_classes: int,
    scale: float | None = None,
    *,
    around: Tensor | None = None,
    usual: UsualPrior | None = None,
    sureness: float = 1.0,
) -> HeadChoice:
    """Choose a task's prior by cross-validation on its rows.

    A choice is remembered, for as long as the process lives: a task that is adapted to again, at other rates say, has
    the same features at its start, and cross-validation takes as long as several of its steps.

    Args:
        features: ``[n, E]``; under label matching ``[n, E + C]``, as
            :meth:`~pyro_lift.models.readouts.LabelMatching.head_inputs` gives them.
        target: class numbers ``[n]``.
        num_classes: C.
        scale: s_0, of label matching; None where there are no label texts.
        around: the head ``[C, E + 1]`` at which the prior stands; not under label matching.
        usual: what other tasks say of the prior, of biases alone under label matching. None where nothing is known of
            them.
        sureness: how much that weighs, 1 at most.
    """
    told: tuple[object, ...] = (num_classes, scale) if usual is None else (num_classes, scale, *usual, sureness)
    key = digest_of(features, target, told=told) if around is None else digest_of(features, target, around, told=told)
    found = _choices.get(key)
    if found is None:
        found = _choices[key] = _cross_validated(features, target, num_classes, scale, around, usual, sureness)
        while len(_choices) > REMEMBERED:
            _choices.popitem(last=False)
    return found


def choose_matching_head(
    features: Tensor, target: Tensor, num_classes: int, scale: float, usual: UsualPrior | None
) -> HeadChoice:
    r"""Choose a task's scale and prior under label matching, with biases as free as tasks say, or as can be.

    The latter where left-out rows say so against what the tasks do, whose classes may be even where this one's are not:

    .. math:: \sum_n \log p\big(y_n \mid \hat h_{-k(n)}(3)\big) - \sum_n \log p\big(y_n \mid \hat h_{-k(n)}(s_b)\big)
              > \tfrac12 \log^2 (3 / s_b)

    On ten text tasks of CLS-45, NLL of heads of 8, 12, 16, 20, 25 rows, three draws of each, with s_b, with 3, and so:
    0.880, 0.961, 0.860; 0.854, 0.848, 0.854; 0.803, 0.797, 0.799; 0.747, 0.737, 0.737; 0.789, 0.785, 0.784. Of two and
    four rows none asks for it.

    Args:
        features: ``[n, E + C]``.
        target: class numbers ``[n]``.
        num_classes: C.
        scale: s_0, of label matching.
        usual: what other tasks say of biases, of so many rows; None where nothing is known of them.
    """
    choice = choose_head(features, target, num_classes, scale, usual=usual)
    if usual is None or usual.bias_sd >= BIAS_SD:
        return choice
    free = choose_head(features, target, num_classes, scale, usual=usual._replace(bias_sd=BIAS_SD))
    gain = (free.score - choice.score) * len(target)  # NaN of a single row, which cannot say it
    return free if gain > width_penalty(BIAS_SD, usual.bias_sd) else choice


def _cross_validated(
    features: Tensor,
    target: Tensor,
    num_classes: int,
    scale: float | None,
    around: Tensor | None,
    usual: UsualPrior | None,
    sureness: float,
) -> HeadChoice:
    if scale is None and usual is None:
        return _chosen(features, target, HeadModel(num_classes, around=around))
    if scale is None and usual is not None:
        model = HeadModel(num_classes, around=around, bias_sd=usual.bias_sd)
        return _chosen(features, target, model, usual.width / math.sqrt(features.shape[-1]), sureness)
    assert scale is not None
    if features.shape[-1] == num_classes:
        return _chosen(features, target, HeadModel(num_classes, scale=ScalePrior(scale, scale)))
    absent = bool((features[..., -num_classes:] == ABSENT).any())
    plain = HeadModel(num_classes, bias_sd=BIAS_SD if usual is None else usual.bias_sd)
    best = _chosen(features, target, plain._replace(scale=ScalePrior(scale, 0.0)))
    lowest = -len(target) * best.score
    for share in SCALE_SHARES:
        if (absent and share == 0.0) or math.isnan(lowest):  # at zero a text that is absent would come to life
            continue
        if share * scale > max(LARGEST, scale):
            continue
        choice = _chosen(features, target, plain._replace(scale=ScalePrior(share * scale, 0.0)))
        loss = -len(target) * choice.score + 0.5 * (share - 1.0) ** 2
        if loss < lowest:
            best, lowest = choice, loss
    return best


def _chosen(
    features: Tensor, target: Tensor, model: HeadModel, usual: float | None = None, sureness: float = 1.0
) -> HeadChoice:
    choice = choose_prior_sd(features, target, model, usual=usual, sureness=sureness)
    return HeadChoice(model, choice.sd, -choice.loss)

r"""A temperature for predictions: one scalar that makes probabilities mean what they say.

.. math:: p_T(y \mid x) = \frac{r_y (p(y \mid x) / r_y)^{1/T}}{\sum_c r_c (p(c \mid x) / r_c)^{1/T}},\qquad
          \hat T = \arg\min_T \tfrac1M \sum_i \tfrac1{n_i} \sum_n -\log p_T(y_{in} \mid x_{in})

over the held-out rows of some tasks, each task counting the same. The rates r are the classes' own where a task's rows
say that these are uneven (:mod:`.class_rates`), so that a high temperature leads to what is known without the row;
elsewhere they are even, and fall out. With b = 1/T and :math:`\ell = \log (p / r)` the loss of a row,
:math:`\log \sum_c r_c e^{b \ell_c} - \log r_y - b\,\ell_y`, is convex in b, so the derivative has one root. It is the
averaged probabilities that are tempered, not each draw's.

A hundred rows that are nearly all right would have a temperature next to 0, at which a single wrong one costs ten nats.
Predictions may so be rows of their own, :math:`K` of them, dealt as the :math:`N` rows are:

.. math:: \hat T = \arg\min_T \tfrac1M \sum_i \tfrac1{n_i} \sum_n \Big(-\log p_T(y_{in} \mid x_{in})
          - \tfrac K N \sum_c p(c \mid x_{in}) \log p_T(c \mid x_{in})\Big)

whose second term is least at 1: of few rows T is closer to that, and on the same side of it.

References:
    On calibration of modern neural networks, Guo et al., 2017, arXiv:1706.04599.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from pyro_lift.models.likelihoods import IGNORED
from pyro_lift.support.options import check_number

__all__ = ["HIGHEST", "LOWEST", "OWN_ROWS", "Predicted", "careful_temperature", "fit_temperature", "tempered"]

#: Bounds of a fitted temperature: a few dozen rows that are all right, or all wrong, would send it to 0 or infinity.
LOWEST, HIGHEST = 0.2, 5.0
#: Rows that predictions are of their own, where a temperature below 1 is fitted. On thirteen families of digits (3 to
#: 5 classes, 12 to 40 rows) it changes the NLL a row of new tasks by -0.014 on average, -0.003 at worst; without own
#: rows by -0.003, +0.054.
OWN_ROWS = 36.0


class Predicted(NamedTuple):
    """Predictions of rows that nothing was learned from.

    Attributes:
        probabilities: ``[n, C]``; of tokens ``[n, L, V]``.
        target: ``[n]`` or ``[n, L]``; those of -100 are not counted.
        rates: of the task's classes ``[C]``; None where they are even.
    """

    probabilities: Tensor
    target: Tensor
    rates: Tensor | None = None


def tempered(probabilities: Tensor, temperature: float, rates: Tensor | None = None) -> Tensor:
    """Return the probabilities ``[..., C]`` at a temperature: above 1 closer to the rates, below 1 farther from them.

    With even rates, flatter and sharper, and the order of classes stays.

    Args:
        probabilities: of classes or tokens, already averaged over draws.
        temperature: T; 1 returns what was given.
        rates: of the classes ``[C]``; None are even ones.

    Raises:
        ValueError: a temperature that is not above 0.
    """
    check_number("temperature", temperature)
    if temperature == 1.0:
        return probabilities
    logs = _logarithms(probabilities)
    if rates is None:
        return torch.softmax(logs / temperature, -1)
    base = rates.to(logs).log()
    return torch.softmax(base + (logs - base) / temperature, -1)


def fit_temperature(predictions: Sequence[Predicted | tuple[Tensor, Tensor]], own_rows: float = 0.0) -> float:
    """Return the temperature with the lowest mean NLL over tasks, at least ``LOWEST``, at most ``HIGHEST``.

    Args:
        predictions: of each task; a pair has no rates.
        own_rows: rows K that predictions are of their own.

    Raises:
        ValueError: no rows at all.
    """
    tasks: list[tuple[Tensor, Tensor, Tensor | float, Tensor | float]] = []
    count = 0
    for probabilities, target, rates in (Predicted(*each) for each in predictions):
        counted = target.cpu() != IGNORED
        p = probabilities.cpu()[counted]
        # Rows of other tasks never meet: tasks may differ in their number of classes.
        if len(p):
            base = 0.0 if rates is None else rates.double().cpu().log()
            logs = _logarithms(p) - base
            right = logs.gather(-1, target.cpu()[counted].unsqueeze(-1)).squeeze(-1)
            tasks.append((logs, right, base, (p.double() * logs).sum(-1) if own_rows else 0.0))
            count += len(right)
    if not tasks:
        raise ValueError("no row to fit a temperature on.")
    from scipy.optimize import brentq

    def slope(inverse: float) -> float:
        """Differentiate the mean NLL by b: the mean of E_b[log (p / r)] - log (p(y) / r_y), and of own rows."""
        means = []
        for logs, right, base, own in tasks:
            expected = ((base + inverse * logs).softmax(-1) * logs).sum(-1)
            means.append((expected - right + share * (expected - own)).mean())
        return float(torch.stack(means).mean())

    share = own_rows / count
    low, high = 1.0 / HIGHEST, 1.0 / LOWEST
    at_low, at_high = slope(low), slope(high)
    if at_low >= 0.0 and at_high <= 0.0:  # flat: the predictions are uniform, and every temperature is as good
        return 1.0
    if at_low >= 0.0:
        return HIGHEST
    if at_high <= 0.0:
        return LOWEST
    return 1.0 / float(brentq(slope, low, high, xtol=1e-6))


def careful_temperature(predictions: Sequence[Predicted | tuple[Tensor, Tensor]]) -> float:
    """Return the fitted temperature; where that is below 1, the one with :data:`OWN_ROWS` rows of the predictions' own.

    Args:
        predictions: of each task; a pair has no rates.

    Raises:
        ValueError: no rows at all.
    """
    temperature = fit_temperature(predictions)
    return temperature if temperature >= 1.0 else fit_temperature(predictions, OWN_ROWS)


def _logarithms(probabilities: Tensor) -> Tensor:
    """Take logarithms in double precision; a probability of 0 counts as the smallest positive double, as in NLL."""
    return probabilities.double().clamp_min(torch.finfo(torch.float64).tiny).log()

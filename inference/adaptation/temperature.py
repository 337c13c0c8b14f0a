r"""A temperature for predictions: one scalar that makes probabilities mean what they say.

.. math:: p_T(y \mid x) = \frac{p(y \mid x)^{1/T}}{\sum_c p(c \mid x)^{1/T}},\qquad
          \hat T = \arg\min_T \tfrac1M \sum_i \tfrac1{n_i} \sum_n -\log p_T(y_{in} \mid x_{in})

over the held-out rows of some tasks, each task counting the same. With b = 1/T and :math:`\ell = \log p` the loss of a
row, :math:`\log \sum_c e^{b \ell_c} - b\,\ell_y`, is convex in b, so the derivative has one root. It is the averaged
probabilities that are tempered, not each draw's.

References:
    On calibration of modern neural networks, Guo et al., 2017, arXiv:1706.04599.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pyro_lift.models.likelihoods import IGNORED
from pyro_lift.support.options import check_number

__all__ = ["HIGHEST", "LOWEST", "fit_temperature", "tempered"]

#: Bounds of a fitted temperature: a few dozen rows that are all right, or all wrong, would send it to 0 or infinity.
LOWEST, HIGHEST = 0.2, 5.0


def tempered(probabilities: Tensor, temperature: float) -> Tensor:
    """Return the probabilities ``[..., C]`` at a temperature: above 1 flatter, below 1 sharper; the order stays.

    Args:
        probabilities: of classes or tokens, already averaged over draws.
        temperature: T; 1 returns what was given.

    Raises:
        ValueError: a temperature that is not above 0.
    """
    check_number("temperature", temperature)
    if temperature == 1.0:
        return probabilities
    return torch.softmax(_logarithms(probabilities) / temperature, -1)


def fit_temperature(predictions: Sequence[tuple[Tensor, Tensor]]) -> float:
    """Return the temperature with the lowest mean NLL over tasks, at least ``LOWEST``, at most ``HIGHEST``.

    Args:
        predictions: of each task, probabilities ``[n, C]`` (of tokens ``[n, L, V]``) and targets ``[n]`` (``[n, L]``,
            those of -100 not counted); rows that nothing was learned from.

    Raises:
        ValueError: no rows at all.
    """
    tasks: list[tuple[Tensor, Tensor]] = []
    for probabilities, target in predictions:
        counted = target.cpu() != IGNORED
        p = probabilities.cpu()[counted]
        # Rows of other tasks never meet: tasks may differ in their number of classes.
        if len(p):
            logs = _logarithms(p)
            tasks.append((logs, logs.gather(-1, target.cpu()[counted].unsqueeze(-1)).squeeze(-1)))
    if not tasks:
        raise ValueError("no row to fit a temperature on.")
    from scipy.optimize import brentq

    def slope(inverse: float) -> float:
        """Differentiate the mean NLL by b: the mean of E_b[log p] - log p(y)."""
        means = [(((inverse * logs).softmax(-1) * logs).sum(-1) - right).mean() for logs, right in tasks]
        return float(torch.stack(means).mean())

    low, high = 1.0 / HIGHEST, 1.0 / LOWEST
    at_low, at_high = slope(low), slope(high)
    if at_low >= 0.0 and at_high <= 0.0:  # flat: the predictions are uniform, and every temperature is as good
        return 1.0
    if at_low >= 0.0:
        return HIGHEST
    if at_high <= 0.0:
        return LOWEST
    return 1.0 / float(brentq(slope, low, high, xtol=1e-6))


def _logarithms(probabilities: Tensor) -> Tensor:
    """Take logarithms in double precision; a probability of 0 counts as the smallest positive double, as in NLL."""
    return probabilities.double().clamp_min(torch.finfo(torch.float64).tiny).log()

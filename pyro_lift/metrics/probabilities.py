"""Accuracy, likelihood and calibration of predicted probabilities, and paired comparison."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from pyro_lift.models.targets import check_predictions
from pyro_lift.support.options import check_number

__all__ = ["Reliability", "accuracy", "class_scores", "expected_calibration_error", "nll", "reliability"]


class Reliability(NamedTuple):
    """Per bin of confidence: number of cases, mean confidence and share that came true (0 where empty)."""

    cases: Tensor
    confidence: Tensor
    accuracy: Tensor


def accuracy(probabilities: Tensor, target: Tensor) -> float:
    """Return the share of rows whose most probable class is the target; ``[n, C]`` and ``[n]``.

    Raises:
        ValueError: other shapes, no row, values that are no probabilities, targets outside the classes.
    """
    target = check_predictions(probabilities, target, "accuracy")
    return float((probabilities.argmax(-1) == target).double().mean())


def nll(probabilities: Tensor, target: Tensor) -> float:
    """Return the mean of ``-log p(target)`` in nats; the probabilities are averages over draws, already normalised.

    A probability of 0 counts as the smallest positive double (708 nats), so that one row cannot make the mean infinite.

    Raises:
        ValueError: as :func:`accuracy`.
    """
    target = check_predictions(probabilities, target, "nll")
    chosen = probabilities.double().gather(-1, target.unsqueeze(-1)).squeeze(-1)
    return float(-chosen.clamp_min(torch.finfo(torch.float64).tiny).log().mean())


def class_scores(probabilities: Tensor, target: Tensor) -> dict[str, float]:
    """Return ``accuracy``, ``nll`` in nats and ``ece``: the three numbers that every comparison here reports.

    Args:
        probabilities: ``[n, C]``, averaged over draws.
        target: ``[n]``.
    """
    return {
        "accuracy": accuracy(probabilities, target),
        "nll": nll(probabilities, target),
        "ece": expected_calibration_error(probabilities, target),
    }


def reliability(probabilities: Tensor, target: Tensor, bins: int = 15, *, pooled: bool = False) -> Reliability:
    """Count the cases by confidence, in equal bins.

    Args:
        probabilities: ``[n, C]``.
        target: ``[n]``.
        bins: number of bins.
        pooled: False: one case a row, the top class, bins ``(low, high]`` (Guo et al., 2017). True: every class of
            every row is a case, bins ``[low, high)``, as BayesDLL, the reference that the LiFT paper cites.

    Raises:
        ValueError: as :func:`accuracy`; fewer than one bin.
    """
    check_number("bins", bins, least=1, open_below=False, whole=True)
    target = check_predictions(probabilities, target, "reliability", look=False)  # the counts stay where they are
    p = probabilities.double().clamp(0.0, 1.0)  # rounding may carry a probability a hair outside
    if pooled:
        confidence = p.reshape(-1)
        correct = torch.nn.functional.one_hot(target, p.shape[-1]).double().reshape(-1)
        which = (confidence * bins).floor().long().clamp_max(bins - 1)
    else:
        confidence, top = p.max(-1)
        correct = (top == target).double()
        which = (confidence * bins).ceil().long().sub(1).clamp_min(0)
    count = torch.zeros(bins, dtype=p.dtype, device=p.device).index_add_(0, which, torch.ones_like(confidence))
    total = count.clamp_min(1.0)
    mean_confidence = torch.zeros_like(count).index_add_(0, which, confidence) / total
    mean_correct = torch.zeros_like(count).index_add_(0, which, correct) / total
    return Reliability(count, mean_confidence, mean_correct)


def expected_calibration_error(probabilities: Tensor, target: Tensor, bins: int = 15, *, pooled: bool = False) -> float:
    r"""Compute :math:`\sum_b \tfrac{n_b}{n}\,|\mathrm{acc}_b - \mathrm{conf}_b|` over the bins of :func:`reliability`.

    References:
        On calibration of modern neural networks, Guo et al., 2017, arXiv:1706.04599.
    """
    check_predictions(probabilities, target, "expected_calibration_error")
    cases, confidence, correct = reliability(probabilities, target, bins, pooled=pooled)
    return float((cases / cases.sum() * (correct - confidence).abs()).sum())

"""The loss of a prediction that ignores its input: what a network that has stopped working comes to."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from pyro_lift.models.likelihoods import IGNORED
from pyro_lift.models.task import Task

__all__ = ["chance_loss", "targets_scale"]


def chance_loss(task: Task, noise_scale: float = 1.0) -> float:
    r"""Mean negative log probability of a training row under the best prediction that is the same for every row.

    Classes: the entropy of their frequencies. Options of a row's own: the mean log number of them. Tokens: the entropy
    of their frequencies times the tokens of a row. Regression: a normal of standard deviation ``noise_scale`` around
    the mean target.

    Args:
        task: its training rows.
        noise_scale: standard deviation of the noise in regression.

    Returns:
        Nats a row (a row's own tokens and outputs are summed).
    """
    target = task.train.target
    if task.kind == "regression":
        squares = _squares_around_mean(target)
        square = squares.sum(-1).mean() / (2.0 * noise_scale**2)
        return float(square) + squares.shape[-1] * (math.log(noise_scale) + 0.5 * math.log(2.0 * math.pi))
    if task.kind == "tokens":
        tokens = target[target != IGNORED]
        return _entropy(tokens) * len(tokens) / len(target)
    if "option_attention_mask" in task.train.inputs:
        options = task.train.inputs["option_attention_mask"].any(-1).sum(-1)
        return float(options.double().log().mean())
    return _entropy(target)


def targets_scale(tasks: Sequence[Task]) -> float:
    """Return the standard deviation of training targets around their task's mean, the root mean square over tasks.

    Args:
        tasks: those that are no regressions do not count; of none, and of targets that are all alike, it is 1.
    """
    variances = [_squares_around_mean(task.train.target).mean() for task in tasks if task.kind == "regression"]
    scale = float(torch.stack(variances).mean().sqrt()) if variances else 1.0
    return scale if scale > 0.0 else 1.0


def _squares_around_mean(target: Tensor) -> Tensor:
    y = target.double().reshape(len(target), -1)
    return (y - y.mean(0)).square()


def _entropy(numbers: Tensor) -> float:
    """Entropy in nats of the empirical distribution of whole numbers."""
    share = torch.unique(numbers, return_counts=True)[1].double() / max(numbers.numel(), 1)
    return float(-(share * share.log()).sum())

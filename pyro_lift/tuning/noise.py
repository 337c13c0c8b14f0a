r"""The noise of regressions where nobody gave it: how far targets are from what a task's rows can say of them.

It begins with the spread of targets within tasks (:func:`~pyro_lift.models.chance.targets_scale`), which no unit
changes. Then tasks are adapted to on some of their rows, and the mean square error is measured on these, :math:`e`, and
on the rows left out, :math:`e'`. A fit of d coordinates to n rows has

.. math:: \operatorname E e \approx \tau^2 (1 - d/n), \qquad \operatorname E e' \approx \tau^2 (1 + d/n),
          \qquad\text{so that}\quad \tau^4 \approx e\,e'

but for :math:`(d/n)^2`. A smaller noise lets a task's rows say more, so this is done :data:`ROUNDS` times.

How wide predictions are is another question: draws that are colder than the posterior vary less than it does. The
temperature of predictions is :math:`T = \operatorname{mean} (y - m)^2 / s^2` on the rows left out, m and s being mean
and standard deviation of the prediction; it makes their density the highest, as the temperature of classes does, and
like that it is divided by :data:`EXAGGERATED` where it is above 1, unless nothing exaggerates it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyro_lift.inference.sgld import DivergedError
from pyro_lift.models.task import Rows, Task

__all__ = ["EXAGGERATED", "Noise", "fitted_noise", "less_exaggerated", "variance_factor"]

#: Factor by which tasks that are adapted to from half of the others, on a part of their rows, exaggerate a temperature:
#: up to 1.4 on digits, where tasks are of ten rows.
EXAGGERATED = 1.3
#: Times that the noise is found anew.
ROUNDS = 4
#: The least noise over the spread of targets; below it all rows are as good as exact.
LEAST = 1e-2

#: Posteriors at a noise, each beside its task, whose test rows are those left out.
Adapt = Callable[[float], Iterable[tuple[Any, Task]]]


class Noise(NamedTuple):
    """The noise of regressions.

    Attributes:
        scale: standard deviation of a target around the network's output.
        temperature: factor on the variance of predictions.
    """

    scale: float
    temperature: float


def fitted_noise(first: float, adapt: Adapt, exaggerated: float = EXAGGERATED) -> Noise | None:
    """Find the noise, and the temperature of predictions.

    Args:
        first: the noise to begin with, :func:`~pyro_lift.models.chance.targets_scale`.
        adapt: to tasks at a noise; it is called once a round.
        exaggerated: factor by which a temperature above 1 is too high.

    Returns:
        None where no task could be adapted to: none has rows to leave out, or the chain diverged at once.
    """
    noise = None
    scale = first
    for _ in range(ROUNDS):
        try:
            judged = [_Judged.of(posterior, task) for posterior, task in adapt(scale)]
        except DivergedError:
            break
        if not judged:
            break
        fit, miss = (
            float(torch.stack([getattr(each, name).mean() for each in judged]).mean()) for name in ("fit", "miss")
        )
        before, scale = scale, max((fit * miss) ** 0.25, LEAST * first)
        widths = [each.variance - before**2 + scale**2 for each in judged]
        ratios = [(each.miss / width).mean() for each, width in zip(judged, widths, strict=True)]
        temperature = float(torch.stack(ratios).mean())
        noise = Noise(scale, less_exaggerated(temperature, exaggerated))
    return noise


def less_exaggerated(temperature: float, exaggerated: float = EXAGGERATED) -> float:
    """Return a temperature, one above 1 divided by what it is exaggerated by, down to 1."""
    return max(temperature / exaggerated, 1.0) if temperature > 1.0 else temperature


def variance_factor(judged: Iterable[tuple[Any, Task]]) -> float:
    """Return the mean over tasks of the mean of square errors over variances: by it predictions are as wide as wrong.

    Args:
        judged: posteriors of regressions, each beside its task, whose test rows it has not seen.
    """
    found = [_Judged.of(posterior, task) for posterior, task in judged]
    return float(torch.stack([(each.miss / each.variance).mean() for each in found]).mean())


class _Judged(NamedTuple):
    """Square errors of a task's own rows and of those left out, and the variance of the latter's predictions."""

    fit: Tensor
    miss: Tensor
    variance: Tensor

    @classmethod
    def of(cls, posterior: Any, task: Task) -> _Judged:
        assert task.test is not None
        variance = posterior.predict_sd(task.test, calibrated=False).double().square()
        miss = _square_errors(posterior, task.test)
        return cls(_square_errors(posterior, task.train), miss, variance.reshape(miss.shape))


def _square_errors(posterior: Any, rows: Rows) -> Tensor:
    target = rows.target.double()
    prediction: Tensor = posterior.predict(rows).double()
    return (prediction.reshape(target.shape) - target).square()

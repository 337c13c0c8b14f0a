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

**Power in adaptation.** Where the network says little of a task, the prior may hold it so close to phi that the rows
that it was adapted to are missed as widely as others. The noise that they leave is then large, and lets them say
little: sines by an untrained network keep a noise of 0.99 of 1.05, where a ridge on its last layer leaves 0.5. So tasks
are adapted to with :data:`POWERS` times the power on the likelihood too, one after the other for as long as rows left
out are missed by less, and the best is taken where it gains more than :data:`TIE` by the paired one-sided test at 5 %.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyro_lift.inference.sgld import DivergedError
from pyro_lift.models.dispersion import Dispersion
from pyro_lift.models.task import Rows, Task
from pyro_lift.tuning.dispersion import Widths, fitted_dispersion
from pyro_lift.tuning.halves import is_above_zero, paired

__all__ = ["EXAGGERATED", "Noise", "fitted_noise", "less_exaggerated", "variance_factor"]

#: Factor by which tasks that are adapted to from half of the others, on a part of their rows, exaggerate a temperature:
#: up to 1.4 on digits, where tasks are of ten rows.
EXAGGERATED = 1.3
#: Times that the noise is found anew.
ROUNDS = 4
#: Powers on the likelihood in adaptation, over meta-training's, that are tried beside 1: the noise is taken for a fifth
#: of what it is, a fifth of that, and so on.
POWERS = (5.0**2, 5.0**4, 5.0**6)
#: Nats a row that each has to gain over the one before, but the first, which may be no more than a step on the way; and
#: that the best has to gain over 1 by more than chance.
TIE = 0.02
#: The least noise over the spread of targets; below it all rows are as good as exact.
LEAST = 1e-2

#: Posteriors at a noise, each beside its task, whose test rows are those left out.
Adapt = Callable[[float], Iterable[tuple[Any, Task]]]

log = logging.getLogger("pyro_lift")


class Noise(NamedTuple):
    """The noise of regressions.

    Attributes:
        scale: standard deviation of a target around the network's output.
        temperature: factor on the variance of predictions.
        power: on the likelihood in adaptation, over meta-training's.
        dispersion: how unevenly tasks vary around the noise; None where that was not asked, or cannot be.
        losses: of the tasks that were adapted to, half the logarithm of the mean square error of rows left out.
    """

    scale: float
    temperature: float
    power: float = 1.0
    dispersion: Dispersion | None = None
    losses: tuple[float, ...] = ()


def fitted_noise(
    first: float,
    adapt: Adapt,
    exaggerated: float = EXAGGERATED,
    *,
    stronger: bool = False,
    dispersed: bool = True,
) -> Noise | None:
    """Find the noise, and the temperature of predictions; and the power in adaptation, where it may be found.

    Args:
        first: the noise to begin with, :func:`~pyro_lift.models.chance.targets_scale`.
        adapt: to tasks at a noise; it is called once a round.
        exaggerated: factor by which a temperature above 1 is too high.
        stronger: whether a larger power may be found.
        dispersed: whether tasks say how unevenly they vary; in runs of before all are alike.

    Returns:
        None where no task could be adapted to: none has rows to leave out, or the chain diverged at once.
    """
    log.info(
        "the noise of the targets is looked for: some tasks are adapted to up to %d times. noise_scale= gives it.",
        ROUNDS + (len(POWERS) if stronger else 0),
    )
    best: _Found | None = None
    for _ in range(ROUNDS):
        scale = first if best is None else best.noise.scale
        told = _judged(adapt, scale)
        if not told:
            break
        best = _Found(_fitted(told, scale, LEAST * first, exaggerated), told, scale)
    if best is None:
        return None
    best = _with_power(best, first, adapt, exaggerated) if stronger else best
    noise = best.dispersed(exaggerated) if dispersed else best.noise
    return noise._replace(losses=tuple(each.log_miss for each in best.judged))


def _judged(adapt: Adapt, scale: float) -> list[_Judged]:
    """Adapt to tasks at a noise; none is judged where a chain diverges."""
    try:
        return [_Judged.of(posterior, task) for posterior, task in adapt(scale)]
    except DivergedError:
        return []


def _fitted(judged: Sequence[_Judged], before: float, least: float, exaggerated: float) -> Noise:
    """Find the noise that adaptations at one (``before``) leave, and the temperature of predictions under it."""
    fit, miss = (float(torch.stack([getattr(each, name).mean() for each in judged]).mean()) for name in ("fit", "miss"))
    scale = max((fit * miss) ** 0.25, least)
    widths = [each.variance - before**2 + scale**2 for each in judged]
    ratios = [(each.miss / width).mean() for each, width in zip(judged, widths, strict=True)]
    return Noise(scale, less_exaggerated(float(torch.stack(ratios).mean()), exaggerated))


class _Found(NamedTuple):
    """A noise, and the adaptations at another one that it was found by."""

    noise: Noise
    judged: Sequence[_Judged]
    before: float

    def dispersed(self, exaggerated: float) -> Noise:
        """Add how unevenly tasks vary, and take the temperature that is left."""
        found = (each.widths(self.before, self.noise.scale) for each in self.judged)
        told = [each for each in found if each is not None]
        fitted = fitted_dispersion(told) if len(told) == len(self.judged) else None
        if fitted is None:
            return self.noise
        dispersion, temperature = fitted
        return self.noise._replace(dispersion=dispersion, temperature=less_exaggerated(temperature, exaggerated))


def _with_power(found: _Found, first: float, adapt: Adapt, exaggerated: float) -> _Found:
    """Try larger powers on the likelihood, and take the best where it is better by the test."""
    best, most = found, torch.zeros(len(found.judged), dtype=torch.float64)
    for power in POWERS:
        scale = found.noise.scale / math.sqrt(power)
        tried = _judged(adapt, scale)
        if len(tried) != len(found.judged):
            break
        pairs = zip(found.judged, tried, strict=True)
        gains = torch.stack([0.5 * (one.miss.mean() / two.miss.mean()).log() for one, two in pairs])
        if not float(gains.mean()) > float(most.mean()) + (0.0 if best is found else TIE):
            break
        noise = _fitted(tried, scale, LEAST * first, exaggerated)
        best, most = _Found(noise._replace(power=(noise.scale / scale) ** 2), tried, scale), gains
    if best is found:
        return found
    taken = is_above_zero(most - TIE)
    log.info(
        "adaptation with %.3g times the power on the likelihood: %+.3f ± %.3f nats a row on rows left out; it is %s.",
        best.noise.power, *paired(most), "taken" if taken else "not taken",
    )  # fmt: skip
    return best if taken else found


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
    """Square errors of a task's own rows and of those left out, and the variance of the latter's predictions.

    With the number of its own rows and what these miss of one another, where its head was solved.
    """

    fit: Tensor
    miss: Tensor
    variance: Tensor
    rows: int
    left_out: Tensor | None

    @property
    def log_miss(self) -> float:
        """Half the logarithm of the mean square error of the rows left out: their loss at the variance best for it."""
        return 0.5 * math.log(max(float(self.miss.mean()), torch.finfo(torch.float64).tiny))

    def widths(self, before: float, scale: float) -> Widths | None:
        """Return what was predicted as if under another noise than that of the adaptation."""
        if self.left_out is None:
            return None
        miss, variance = (x.reshape(len(x), -1) for x in (self.miss, self.variance))
        return Widths(self.rows, self.left_out * (before / scale) ** 2, miss, variance - before**2 + scale**2)

    @classmethod
    def of(cls, posterior: Any, task: Task) -> _Judged:
        assert task.test is not None
        variance = posterior.predict_sd(task.test, calibrated=False).double().square()
        miss = _square_errors(posterior, task.test)
        fit, rows = _square_errors(posterior, task.train), len(task.train)
        return cls(fit, miss, variance.reshape(miss.shape), rows, posterior.left_out)


def _square_errors(posterior: Any, rows: Rows) -> Tensor:
    target = rows.target.double()
    prediction: Tensor = posterior.predict(rows).double()
    return (prediction.reshape(target.shape) - target).square()

r"""The power on the likelihood in adaptation to tasks of classes, found on tasks that joint training has not seen.

Where a network has the tasks' classes itself, all of a task's own is in its adapter, and the default's prior holds that
close to phi: its widths are such that draws from it do little to the loss, which says how well the network bears them,
not how far tasks are from it. Where tasks are far, and joint training does not bring phi nearer to them, rows say so.
Each is adapted to with :data:`POWERS` times the power too, one after the other, for as long as rows that were left out
are predicted better by the one-sided test at 5 %, at the temperature that is best for all tasks at that power,

.. math:: \min_T \tfrac1{n_i} \sum_n -\log p_{P,T}(y_{in}), \qquad P = 1, 10, 100.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from pyro_lift.inference.adaptation.temperature import Predicted
from pyro_lift.inference.sgld import DivergedError
from pyro_lift.models.task import Task
from pyro_lift.tuning.halves import is_above_zero, paired
from pyro_lift.tuning.predictions import least_losses
from pyro_lift.tuning.unmoved_share import apart, chosen_share

__all__ = ["POWERS", "AtPower", "at_best_power"]

log = logging.getLogger("pyro_lift")

#: Powers that are tried beside 1.
POWERS = (10.0, 100.0)

#: Posteriors, each beside its task, whose test rows it has not seen.
Adapted = Sequence[tuple[Any, Task]]


class AtPower(NamedTuple):
    """Predictions of rows that were set apart.

    Attributes:
        power: on the likelihood in adaptation, over meta-training's.
        adapted: posteriors and tasks.
        predictions: of each.
        share: of the draws that stay at the start of an adaptation; None leaves it as it is.
    """

    power: float
    adapted: Adapted
    predictions: list[Predicted]
    share: float | None

    @classmethod
    def of(cls, power: float, adapted: Adapted, usual: float | None) -> AtPower:
        """Predict, with the share of draws at the start that is best where one is sought (``usual``)."""
        parts = [None if usual is None else apart(posterior, task) for posterior, task in adapted]
        share = usual
        if usual is not None and (together := [part for part in parts if part is not None]):
            share = chosen_share(together, usual)
        predictions = [
            posterior.predicted(task.test) if part is None or share is None else part.mixed(share)
            for part, (posterior, task) in zip(parts, adapted, strict=True)
            if task.test is not None
        ]
        return cls(power, adapted, predictions, None if share == usual else share)


def at_best_power(adapt: Callable[[float], Adapted], powers: Sequence[float], usual: float | None) -> AtPower:
    """Return the predictions at power 1, or at a larger one where they are better.

    Args:
        adapt: gives posteriors at a power.
        powers: that are tried beside 1, rising.
        usual: share of draws that stay at the start, where another one may be found; None finds none.
    """
    best = AtPower.of(1.0, adapt(1.0), usual)
    for power in powers if best.predictions else ():
        try:
            tried = AtPower.of(power, adapt(power), usual)
        except DivergedError:
            break
        if len(tried.predictions) != len(best.predictions):
            break
        gains = (least_losses(best.predictions) - least_losses(tried.predictions)).to(torch.float64)
        taken = len(gains) > 1 and is_above_zero(gains)
        log.info(
            "adaptation with %g times the power on the likelihood: %+.3f ± %.3f nats a row over %g, on unseen tasks; "
            "it is %s.", power, *paired(gains), best.power, "taken" if taken else "not taken",
        )  # fmt: skip
        if not taken:
            break
        best = tried
    return best

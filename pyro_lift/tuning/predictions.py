"""The temperature of predictions, fitted on rows of tasks that adaptation does not see."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from pyro_lift.inference.adaptation.failures import those_kept
from pyro_lift.inference.adaptation.temperature import Predicted, careful_temperature, fit_temperature, tempered
from pyro_lift.metrics.probabilities import nll
from pyro_lift.models.task import Task
from pyro_lift.tuning.held_out import judged, that_can_be_judged
from pyro_lift.tuning.noise import variance_factor

__all__ = ["fitted_on_held_out", "least_losses", "loss_of"]


def fitted_on_held_out(
    tasks: Sequence[Task], adapt: Callable[[Sequence[Task]], Sequence[Any]], most_rows: int
) -> float:
    """Fit one temperature to the predictions of rows that no posterior saw: test or dev rows, else a third of a task's.

    The mean NLL over tasks is at its lowest with it; one below 1 is fitted with care (:func:`.careful_temperature`),
    since a hundred rows that are nearly all right would send it to its bound. Of regressions, whose variance it
    multiplies, it is the mean over tasks of the mean square error over the variance.

    Args:
        tasks: of classes or tokens, or all regressions.
        adapt: gives each task's posterior, with ``predict``, and ``predict_sd`` for regressions.
        most_rows: of a task, that the fit looks at.

    Raises:
        ValueError: no task, none with two rows, or regressions beside others.
        LostTasksError: none could be adapted to; where some could, the others are warned of and left out.
    """
    if not tasks:
        raise ValueError("tasks is empty: there is nothing to calibrate on.")
    kinds = {task.kind == "regression": task.name for task in tasks}
    if len(kinds) > 1:
        raise ValueError(
            f"task {kinds[True]!r} is a regression and {kinds[False]!r} is not: a temperature is of one kind of "
            "prediction. Calibrate on tasks of the kind that the prior is for."
        )
    fit = that_can_be_judged(tasks, "left out of the calibration") or tasks
    split = [judged(task, most_rows) for task in fit]
    posteriors, split = those_kept(split, adapt, "the temperature of predictions")
    if True in kinds:
        return variance_factor(zip(posteriors, split, strict=True))
    pairs = []
    for task, posterior in zip(split, posteriors, strict=True):
        assert task.test is not None
        pairs.append(posterior.predicted(task.test))
    return careful_temperature(pairs)


def least_losses(predictions: Sequence[Predicted]) -> Tensor:
    """Compute the NLL a row of each task at the temperature that is best for all, ``[M]``."""
    temperature = fit_temperature(predictions)
    return torch.tensor([loss_of(each, temperature) for each in predictions], dtype=torch.float64)


def loss_of(predictions: Predicted, temperature: float) -> float:
    """Compute the NLL a row at a temperature."""
    return nll(tempered(predictions.probabilities, temperature, predictions.rates), predictions.target)

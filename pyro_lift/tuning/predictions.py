"""The temperature of predictions, fitted on rows of tasks that adaptation does not see."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from pyro_lift.inference.adaptation.temperature import fit_temperature
from pyro_lift.models.task import Task
from pyro_lift.tuning.held_out import judged

__all__ = ["fitted_on_held_out"]


def fitted_on_held_out(
    tasks: Sequence[Task], adapt: Callable[[Sequence[Task]], Sequence[Any]], most_rows: int
) -> float:
    """Fit one temperature to the predictions of rows that no posterior saw: test or dev rows, else a third of a task's.

    Args:
        tasks: of classes or tokens.
        adapt: gives each task's posterior, with ``predict``.
        most_rows: of a task, that the fit looks at.

    Raises:
        ValueError: no task, or a regression, whose predictions have no temperature.
    """
    for task in tasks:
        if task.kind == "regression":
            raise ValueError(f"task {task.name!r} is a regression: its predictions have no temperature.")
    if not tasks:
        raise ValueError("tasks is empty: there is nothing to calibrate on.")
    split = [judged(task, most_rows) for task in tasks]
    pairs = []
    for task, posterior in zip(split, adapt(split), strict=True):
        assert task.test is not None
        pairs.append((posterior.predict(task.test, calibrated=False), task.test.target))
    return fit_temperature(pairs)

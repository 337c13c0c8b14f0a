"""Tasks whose rows are all of one class: what is learned from them is that class alone."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from pyro_lift.models.task import Task, shares_classes
from pyro_lift.support.wording import some_names

__all__ = ["warn_of_one_class"]

log = logging.getLogger("pyro_lift")

#: Rows from which on it is told: a class of the only row that there is yet is no mistake.
FROM = 4


def warn_of_one_class(tasks: Sequence[Task]) -> None:
    """Say in the log which tasks have rows of one class alone, where there are others; options of a row are none."""
    named = [task.name for task in tasks if _has_one(task)]
    if named:
        log.warning(
            "all rows of %s are of one class: they say nothing of the others, and an adaptation moves towards this one "
            "alone. Give rows of others too, or do not ask for a prediction.", some_names(named),
        )  # fmt: skip


def _has_one(task: Task) -> bool:
    return shares_classes(task) and len(task.train) >= FROM and len(task.train.target.unique()) == 1

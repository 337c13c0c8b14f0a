r"""How many classes tasks have whose own rows may lack some of them, where the other tasks say it.

Where nobody says how many classes there are, a task has as many as its largest label counts to. Twenty rows of ten
classes lack the last one in one task out of eight, and a task that counts to nine shares no head with the others, and
gives the tenth class no probability. So a count that falls short by chance is that of the other tasks: with a share q
of their rows in the classes that it lacks, n rows have none of these with the probability

.. math:: (1 - q)^n,

and where that is below :data:`SELDOM` the task has classes of its own. What is declared, by number or by names, stays.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace

import torch

from pyro_lift.models.targets import CountedClasses
from pyro_lift.models.task import Task
from pyro_lift.support.wording import some_names

__all__ = ["classes_in_common", "with_classes_of_prior", "with_common_classes"]

#: How seldom a task's rows may lack classes that it has.
SELDOM = 1e-4
#: Share of the tasks that count to as many classes as any, at least: else they are of different numbers.
MOST = 0.5

log = logging.getLogger("pyro_lift")


def with_common_classes(tasks: Sequence[Task]) -> list[Task]:
    """Return tasks that are learned from together, those whose count of classes falls short by chance with all classes.

    Only where then all have equally many; it is said in the log. Others are returned as they are.

    Args:
        tasks: all of a run, or of a comparison.
    """
    tasks = list(tasks)
    if not tasks or any(task.kind != "classification" or task.labels is not None for task in tasks):
        return tasks
    most = max(_classes(task) for task in tasks)
    full = [task for task in tasks if _classes(task) == most]
    short = [task for task in tasks if _classes(task) < most]
    if not short or len(full) < MOST * len(tasks):
        return tasks
    shares = torch.stack([torch.bincount(task.train.target, minlength=most) / len(task.train) for task in full]).mean(0)
    unlike = [task.name for task in short if not _by_chance(task, float(shares[_classes(task) :].sum()))]
    if unlike:
        log.info(
            "%s: rows of fewer than the %d classes that the other tasks count to, and too many rows for that to be "
            "chance: tasks of different numbers of classes share no head. If they have the same classes, say "
            "num_classes=%d in each.", some_names(unlike), most, most,
        )  # fmt: skip
        return tasks
    log.warning(
        "%s: no row of the last of the %d classes that the other tasks count to, as may be by chance: taken to have %d "
        "too. Say num_classes= in each task, or the classes' names as labels=.",
        some_names([task.name for task in short]), most, most,
    )  # fmt: skip
    return [_counted(task, most) if _classes(task) < most else task for task in tasks]


def classes_in_common(tasks: Sequence[Task]) -> int:
    """Return the number of classes that each of a prior's tasks has, told by numbers alone; 0 where there is none.

    Args:
        tasks: all that it is learned from.
    """
    if any(task.kind != "classification" or task.labels is not None for task in tasks):
        return 0
    counts = {_classes(task) for task in tasks}
    return counts.pop() if len(counts) == 1 else 0


def with_classes_of_prior(tasks: Sequence[Task], classes: int, *, shared: bool) -> list[Task]:
    """Return new tasks, those whose count of classes falls short by chance with the classes of the prior's tasks.

    Args:
        tasks: new ones.
        classes: that each of the prior's tasks has (:func:`classes_in_common`); 0 where they have none in common.
        shared: whether the prior's tasks share a head of these classes.
    """
    taken: list[str] = []
    own: list[str] = []
    found = []
    for task in tasks:
        short = task.kind == "classification" and task.labels is None and 0 < _classes(task) < classes
        counted = short and isinstance(task.num_classes, CountedClasses)
        chance = counted and _by_chance(task, 1.0 - _classes(task) / classes)
        found.append(_counted(task, classes) if chance else task)
        (taken if chance else own).extend([task.name] if counted else [])
    if taken:
        log.warning(
            "%s: no row of the last of the %d classes of the prior's tasks, as may be by chance: taken to have %d too. "
            "Say num_classes= to have it otherwise.", some_names(taken), classes, classes,
        )  # fmt: skip
    if own:
        log.warning(
            "%s: rows of fewer classes than the %d of the prior's tasks, and too many rows for that to be chance: %s. "
            "If the classes are the same, say num_classes=%d.", some_names(own), classes,
            "the head that these share is not used" if shared else "the others have no probability", classes,
        )  # fmt: skip
    return found


def _classes(task: Task) -> int:
    assert task.num_classes is not None
    return task.num_classes


def _by_chance(task: Task, share: float) -> bool:
    """Whether a task lacks classes by chance that have a share of the rows; one of a single class has more of them."""
    counted = isinstance(task.num_classes, CountedClasses)
    return counted and (_classes(task) == 1 or (1.0 - share) ** len(task.train) >= SELDOM)


def _counted(task: Task, classes: int) -> Task:
    return replace(task, num_classes=CountedClasses(classes))

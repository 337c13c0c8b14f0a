"""Names of classes at outputs that tasks share: one name stands at one output."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

from pyro_lift.models.task import Task

__all__ = ["check_class_numbers", "class_numbers_by_name"]

log = logging.getLogger("pyro_lift")


def class_numbers_by_name(tasks: Sequence[Task]) -> dict[str, int]:
    """Return which output each class name stands at, over all tasks that share the network's outputs.

    An output that has one name in one task and another in another is warned of: it may be two classes.

    Args:
        tasks: those of classes with names count; others are passed over.

    Raises:
        ValueError: a name that two tasks number differently; one output would be two classes.
    """
    numbers: dict[str, int] = {}
    by: dict[str, Task] = {}
    for task in _named(tasks):
        assert task.labels is not None
        for number, name in enumerate(task.labels):
            if numbers.setdefault(name, number) != number:
                other = by[name]
                raise ValueError(
                    f"class {name!r} is number {number} in task {task.name!r} ({_listed(task)}) and number "
                    f"{numbers[name]} in task {other.name!r} ({_listed(other)}), and all tasks share the network's "
                    "outputs: one output would be two classes. Number the classes alike in all tasks, with the same "
                    "labels= for each (labels in a folder's task.json), or give every task a head of its own with "
                    "head_scale=1.0."
                )
            by.setdefault(name, task)
    first: dict[int, str] = {}
    for name, number in numbers.items():
        if first.setdefault(number, name) != name:
            log.warning(
                "the network's output %d is class %r in task %r and %r in task %r, and all tasks share the outputs. If "
                "these are two classes, give every task a head of its own with head_scale=1.0, or every class an "
                "output.", number, first[number], by[first[number]].name, name, by[name].name,
            )  # fmt: skip
            break
    return numbers


def check_class_numbers(tasks: Sequence[Task], learned: Mapping[str, int]) -> None:
    """Refuse new tasks that number the classes of a prior otherwise than the tasks it was learned from.

    Args:
        tasks: to be adapted to, at the outputs that they share with those.
        learned: :func:`class_numbers_by_name` of these.

    Raises:
        ValueError: names the task and the class.
    """
    for task in _named(tasks):
        assert task.labels is not None
        for number, name in enumerate(task.labels):
            if learned.get(name, number) != number:
                order = _order(learned, task)
                raise ValueError(
                    f"class {name!r} is number {number} in task {task.name!r} ({_listed(task)}) and number "
                    f"{learned[name]} in the tasks that the prior was learned from: the network's output {number} is "
                    f"another class. Give it labels={order!r}, and targets that count in it."
                )
        if learned and not set(task.labels) & set(learned):
            log.warning(
                "task %r: its classes (%s) are none of those that the prior was learned from (%s), and share the "
                "network's outputs with them. If they are others, meta-train with heads of the tasks' own: "
                "head_scale=1.0.", task.name, _listed(task), _some(list(learned)),
            )  # fmt: skip


def _order(learned: Mapping[str, int], task: Task) -> list[str]:
    """Return a name for each output, the task's own where several stand at one."""
    own = task.labels or ()
    names: dict[int, str] = {}
    for name, number in learned.items():
        if number not in names or (name in own and names[number] not in own):
            names[number] = name
    return [names[number] for number in sorted(names)]


def _named(tasks: Sequence[Task]) -> list[Task]:
    return [task for task in tasks if task.kind == "classification" and task.labels is not None]


def _listed(task: Task) -> str:
    assert task.labels is not None
    return _some(task.labels)


def _some(names: Sequence[str]) -> str:
    return ", ".join([*names[:6], "..."] if len(names) > 6 else names)

"""Which local sites of different tasks are the same site, where the task plate is iterated over.

Pyro wants a name of its own for each site, and users choose them freely: ``theta_3``, ``theta_paris``, ``task3/theta``,
``theta_3_w``, or one name for all tasks where each run visits one task. A family's label serves for settings by site
(``site_step_scale={"head": 10.0}``) and for what tasks share of a preconditioner. Which family hangs on phi is read off
the graph (:mod:`~pyro_lift.inference.gibbs.conjugate`).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import takewhile
from typing import NamedTuple

__all__ = ["Families"]

_NUMBER = re.compile(r"\d+")


class _Seen(NamedTuple):
    """A name met before, with its number among the task's names of the same skeleton."""

    name: str
    skeleton: str
    occurrence: int
    label: str


class Families:
    """Labels of local sites by task and name; a label is fixed when its site is first met.

    A name is matched, in this order: by what is left of it without the task's number at its end; by being a name of
    another task; by its skeleton (digits left out) and its turn among the task's names of that skeleton; where names go
    without numbers, by the longest beginning and end in common with a family that the task has not shown yet.
    """

    def __init__(self) -> None:
        self._labels: dict[int, dict[str, str]] = {}
        self._seen: list[_Seen] = []
        self._order: dict[int, list[str]] = {}

    def label(self, task: int, name: str) -> str:
        """The family of a site."""
        labels = self._labels.setdefault(task, {})
        if name not in labels:
            labels[name] = self._first_label(task, name, labels)
        return labels[name]

    def rename(self, task: int, name: str, label: str) -> None:
        """Give a site another label; a site of the task that had it gets that of the first in exchange."""
        labels = self._labels[task]
        former = labels[name]
        for other, known in labels.items():
            if known == label:
                labels[other] = former
        labels[name] = label

    def learn(self, task: int, labels: Sequence[str]) -> None:
        """Take the labels of a task's sites from a saved run, in the program's order."""
        self._order[task] = list(labels)
        self._labels[task] = {}

    def _first_label(self, task: int, name: str, labels: dict[str, str]) -> str:
        if task in self._order:
            turn = len(labels)
            if turn < len(self._order[task]):
                return self._order[task][turn]
        used = set(labels.values())
        skeleton = _NUMBER.sub("#", name)
        occurrence = sum(_NUMBER.sub("#", other) == skeleton for other in labels)
        label = self._match(task, name, skeleton, occurrence, used)
        if label is None:
            label = _fresh(task, name, used | {seen.label for seen in self._seen})
        self._seen.append(_Seen(name, skeleton, occurrence, label))
        return label

    def _match(self, task: int, name: str, skeleton: str, occurrence: int, used: set[str]) -> str | None:
        free = [seen for seen in self._seen if seen.label not in used]
        stem = _without_end(task, name)
        for seen in free:
            if stem == seen.label:
                return seen.label
        for seen in free:
            if seen.name == name:
                return seen.label
        for seen in free:
            if (seen.skeleton, seen.occurrence) == (skeleton, occurrence):
                return seen.label
        if not free or str(task) in _NUMBER.findall(name):
            return None
        alike = [_in_common(name, seen.name) for seen in free]
        return free[alike.index(max(alike))].label


def _without_end(task: int, name: str) -> str:
    """``theta`` of ``theta_12`` of task 12; the name itself where it does not end in its task's number."""
    return re.sub(rf"([_\-./]?(?<!\d){task}|\[{task}\]|\({task}\))$", "", name)


def _fresh(task: int, name: str, taken: set[str]) -> str:
    """A label for a family that is met for the first time: its name without what looks like the task."""
    numbers = [match.span() for match in _NUMBER.finditer(name) if match.group() == str(task)]
    begin, end = numbers[-1] if numbers else (len(name), len(name))
    candidates = [
        _without_end(task, name),
        (name[:begin].rstrip("_-./") + name[end:]) if numbers else name,
        re.sub(r"[_\-./]?\d+$", "", name) if not numbers else name,
    ]
    for label in [c for c in candidates if c and c != name] + [name]:
        if label not in taken:
            return label
    return next(label for label in (f"{name}'{k}" for k in range(len(taken) + 1)) if label not in taken)


def _in_common(first: str, second: str) -> int:
    """Length of the beginning and the end that two names share."""
    ahead = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(first, second, strict=False)))
    rest = zip(reversed(first[ahead:]), reversed(second[ahead:]), strict=False)
    return ahead + sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], rest))

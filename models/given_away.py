"""Answers that are given away: rows to be judged by among the training rows, and tasks that stand twice."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence

from pyro_lift.models.digest import digest_of_rows
from pyro_lift.models.rows import Rows
from pyro_lift.models.task import Task
from pyro_lift.support.wording import some_names

__all__ = ["are_in_both", "warn_of_what_is_given_away"]

log = logging.getLogger("pyro_lift")

#: Share of the rows to be judged by that are training rows too, beside twice the share of training rows that stand
#: there more than once, from which on it is told: few different rows meet again by themselves.
SHARE = 0.1
#: Rows that meet by chance.
FEW = 2
#: Numbers of an input that rows are compared by, at most: more say no more, and take their time.
NUMBERS = 4096


def warn_of_what_is_given_away(tasks: Sequence[Task]) -> None:
    """Say in the log which tasks have training rows among their test or dev rows, and which have another's rows."""
    for part in ("test", "dev"):
        names = [task.name for task in tasks if are_in_both(task.train, getattr(task, part))]
        if names:
            log.warning(
                "%s rows of %s are training rows too, inputs and targets: what is measured on them is better than of a "
                "new row. Give %s= rows that are not among those to learn from.", part, some_names(names), part,
            )  # fmt: skip
    first: dict[str, str] = {}
    again = []
    for task in tasks:
        other = first.setdefault(digest_of_rows(task.train), task.name)
        if other != task.name:
            again.append(f"{task.name} (as {other})")
    if again:
        log.warning(
            "training rows of %s stand twice: each counts as a task of its own, and where one is held out, the other "
            "gives its answers away. Leave one of them out.", some_names(again),
        )  # fmt: skip


def are_in_both(train: Rows, others: Rows | None) -> bool:
    """Tell whether more of the other rows are training rows than would be by chance.

    Args:
        train: rows to learn from.
        others: rows to be judged by; None has none.
    """
    if others is None:
        return False
    known, seen = list(_digests(train)), list(_digests(others))
    different = set(known)
    again = 1.0 - len(different) / max(len(known), 1)
    both = sum(digest in different for digest in seen)
    return both > FEW and both > (SHARE + 2.0 * again) * len(seen)


def _digests(rows: Rows) -> Iterator[int]:
    """Digest inputs and target of each row."""
    columns = []
    for name in (*sorted(rows.inputs), None):
        values = (rows.target if name is None else rows.inputs[name]).detach().reshape(len(rows), -1)
        step = max(-(-values.shape[-1] // NUMBERS), 1)
        columns.append(values[:, ::step].cpu().double().numpy())
    for row in zip(*columns, strict=True):
        yield hash(tuple(values.tobytes() for values in row))

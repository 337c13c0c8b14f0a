"""Answers that are given away: rows to be judged by among training rows, tasks that stand twice, copies of rows."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from pyro_lift.models.rows import Rows
from pyro_lift.models.task import Task
from pyro_lift.support.wording import some_names

__all__ = ["are_in_both", "warn_of_what_is_given_away"]

log = logging.getLogger("pyro_lift")

#: Share of the rows to be judged by that are training rows too, from which on it is told, past what chance may do.
SHARE = 0.1
#: Share of a task's rows that another task has from which on they are one task.
SAME = 0.9
#: Tokens of a text from which on it does not meet another by chance.
LONG = 12
#: Numbers of an input that rows are compared by, at most: more say no more, and take their time.
NUMBERS = 4096

Digests = NDArray[np.uint64]


def warn_of_what_is_given_away(tasks: Sequence[Task]) -> None:
    """Say in the log which tasks have training rows among their test or dev rows, another's rows, or rows again."""
    known = [_digests(task.train) for task in tasks]
    if copied := [task.name for task, mine in zip(tasks, known, strict=True) if _has_copies(task.train, mine)]:
        log.warning(
            "training rows of %s stand more than once, inputs and targets: each counts as a row of its own, and where "
            "rows are left out to choose by, their copies give the answers away, so that predictions become too sure. "
            "Keep each row once.", some_names(copied),
        )  # fmt: skip
    for part in ("test", "dev"):
        parts = [getattr(task, part) for task in tasks]
        names = [task.name for task, mine, rows in zip(tasks, known, parts, strict=True) if _among(mine, rows)]
        if names:
            log.warning(
                "%s rows of %s are training rows too, inputs and targets, more than would meet by chance: what is "
                "measured on them is better than of a new row. Give %s= rows that are not among those to learn from.",
                part, some_names(names), part,
            )  # fmt: skip
    if again := _twice([task.name for task in tasks], known):
        log.warning(
            "training rows of %s stand twice: each counts as a task of its own, and where one is held out, the other "
            "gives its answers away. Leave one of them out.", some_names(again),
        )  # fmt: skip


def are_in_both(train: Rows, others: Rows | None) -> bool:
    """Tell whether more of the other rows are training rows than would be by chance.

    How often rows meet by chance is read off those that stand in one part more than once: of c pairs among P the rate
    is at most about :math:`(c + 3 + 2 \\sqrt{c}) / P`, and as many of the pairs between the parts are expected.

    Args:
        train: rows to learn from.
        others: rows to be judged by; None has none.
    """
    return others is not None and _among(_digests(train), others)


def _among(known: Digests, others: Rows | None) -> bool:
    if others is None:
        return False
    seen = _digests(others)
    both = int(np.isin(seen, known).sum())
    if both <= SHARE * len(seen):
        return False
    met = _meetings(known) + _meetings(seen)
    if met == 0 and both == len(seen) > 1 and _has_fractions(others):
        return True
    pairs = math.comb(len(known), 2) + math.comb(len(seen), 2)
    rate = min((met + 3.0 + 2.0 * math.sqrt(met)) / max(pairs, 1), 1.0)
    expected = len(seen) * (1.0 - (1.0 - rate) ** len(known))
    return both > expected + 2.0 * math.sqrt(expected)


def _has_copies(rows: Rows, known: Digests) -> bool:
    """Whether many rows are copies of others, and are not such as meet by themselves: of measured numbers, or texts."""
    copies = len(known) - len(np.unique(known))
    return copies > SHARE * len(known) and (_has_fractions(rows) or _is_text(rows))


def _is_text(rows: Rows) -> bool:
    """Whether inputs are texts of some length, as most rows' are."""
    mask = rows.inputs.get("attention_mask")
    return mask is not None and float(mask.reshape(len(rows), -1).sum(-1).float().median()) >= LONG


def _has_fractions(rows: Rows) -> bool:
    """Whether inputs are measured, not counted: rows of several such numbers do not meet by chance."""
    return any(
        x.is_floating_point() and x[0].numel() > 1 and bool((x != x.round()).any()) for x in rows.inputs.values()
    )


def _meetings(digests: Digests) -> int:
    """Count the pairs of equal rows."""
    counts = np.unique(digests, return_counts=True)[1].astype(np.int64)
    return int((counts * (counts - 1) // 2).sum())


def _twice(names: Sequence[str], digests: Sequence[Digests]) -> list[str]:
    """Return names of tasks nearly all rows of which stand in an earlier one, and its name with each."""
    # Few different rows meet by themselves, and two of three rows say little.
    rows = [np.unique(x) if len(x) > 2 and _meetings(x) == 0 else x[:0] for x in digests]
    if sum(map(len, rows)) == 0:
        return []
    owner = np.repeat(np.arange(len(rows)), [len(x) for x in rows])
    _, place = np.unique(np.concatenate(rows), return_inverse=True)
    first = np.full(int(place.max()) + 1, len(rows))
    np.minimum.at(first, place, owner)
    found = []
    for k, others in enumerate(np.split(first[place], np.cumsum([len(x) for x in rows])[:-1])):
        earlier = others[others < k]
        if len(earlier) and len(earlier) >= SAME * len(others):
            found.append(f"{names[k]} (as {names[int(np.bincount(earlier).argmax())]})")
    return found


def _digests(rows: Rows) -> Digests:
    """Digest inputs and target of each row to 64 bits, ``[n]``: equal for the same numbers of whatever type."""
    total = np.zeros(len(rows), dtype=np.uint64)
    for number, name in enumerate((*sorted(rows.inputs), None)):
        values = (rows.target if name is None else rows.inputs[name]).detach().reshape(len(rows), -1)
        values = values[:, :: max(-(-values.shape[-1] // NUMBERS), 1)]
        weights = np.random.default_rng(number).integers(1, 2**63, values.shape[-1], dtype=np.uint64)
        bits = (values.cpu().double().numpy() + 0.0).view(np.uint64)  # one zero, not two
        total += (_mixed(bits) * weights).sum(-1, dtype=np.uint64)
    return total


def _mixed(bits: Digests) -> Digests:
    """Spread each number's bits over all 64, as SplitMix64 does."""
    bits = (bits ^ (bits >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    bits = (bits ^ (bits >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return bits ^ (bits >> np.uint64(31))

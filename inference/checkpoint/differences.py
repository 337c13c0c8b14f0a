"""How a saved value and today's differ, in words that are short and show the difference whatever their length."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pyro_lift.support.wording import some_names

__all__ = ["difference"]

#: Characters of a value that a message shows.
LONGEST = 80
#: Of those, what stands before the first character that differs.
BEFORE = 20


def difference(name: str, was: Any, now: Any) -> str:
    """Say what a value was and is: whole where it is short, else the part that differs.

    Args:
        name: of the value.
        was: plain data as it was saved. Lists of lists that begin with a name, of tasks or tensors, are compared by
            name, other lists place by place.
        now: the same of today.

    Example:
        >>> difference("block_size", 2, 3)
        'block_size = 2 and is now 3'
        >>> rows = [[f"task-{k}", "classification", 25] for k in range(30)]
        >>> difference("tasks", rows, [*rows[:-1], ["other", "classification", 25]])
        "other tasks: added since: 'other'; gone: 'task-29'"
    """
    if len(repr(was)) <= LONGEST and len(repr(now)) <= LONGEST:
        return f"{name} = {was!r} and is now {now!r}"
    if isinstance(was, list) and isinstance(now, list):
        if _has_names(was) and _has_names(now):
            return f"other {name}: {_by_name(was, now)}"
        if was and len(was) == len(now):
            places = [k for k, (a, b) in enumerate(zip(was, now, strict=True)) if a != b]
            k = places[0]
            return f"{difference(f'{name}[{k}]', was[k], now[k])} ({len(places)} of {len(was)} places differ)"
    one, other = _around_difference(repr(was), repr(now))
    return f"{name} = {one} and is now {other}"


def _has_names(rows: Sequence[Any]) -> bool:
    """Whether rows are lists that begin with a name each, no name twice."""
    if not all(isinstance(row, list) and row and isinstance(row[0], str) for row in rows):
        return False
    return len({row[0] for row in rows}) == len(rows)


def _by_name(was: Sequence[list[Any]], now: Sequence[list[Any]]) -> str:
    old, new = ({row[0]: row[1:] for row in rows} for rows in (was, now))
    parts = []
    if added := [name for name in new if name not in old]:
        parts.append(f"added since: {some_names(added)}")
    if gone := [name for name in old if name not in new]:
        parts.append(f"gone: {some_names(gone)}")
    if changed := [name for name in old if name in new and new[name] != old[name]]:
        first = changed[0]
        parts.append(f"changed: {some_names(changed)} ({difference(repr(first), old[first], new[first])})")
    if not parts:
        k = next(k for k, (a, b) in enumerate(zip(old, new, strict=True)) if a != b)
        parts.append(f"the order: at place {k} stood {list(old)[k]!r}, and now {list(new)[k]!r}")
    return "; ".join(parts)


def _around_difference(one: str, other: str) -> tuple[str, str]:
    """Cut two texts to the same window, which has the first character that differs."""
    same = next((k for k, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
    begin = max(same - BEFORE, 0) if same > LONGEST // 2 else 0
    return _cut(one, begin), _cut(other, begin)


def _cut(text: str, begin: int) -> str:
    before, after = "..." if begin else "", "..." if len(text) > begin + LONGEST else ""
    return f"{before}{text[begin : begin + LONGEST]}{after}"

"""A run that is gone on with under something else says what differs, however long the values are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pyro_lift.inference.checkpoint.differences import difference
from pyro_lift.inference.checkpoint.folder import check_config

ROWS: list[list[Any]] = [[f"a task of a long name, number {k}", "classification", 25] for k in range(40)]


def changed(rows: list[list[Any]], k: int, to: list[Any]) -> list[list[Any]]:
    return [*rows[:k], to, *rows[k + 1 :]]


@pytest.mark.parametrize(
    ("now", "told"),
    [
        ([*ROWS, ["one more", "tokens", 3]], "added since: 'one more'"),
        (ROWS[:-7], "gone: 'a task of a long name, number 33', .* and 2 more"),
        (
            changed(ROWS, 30, [ROWS[30][0], "classification", 24]),
            r"changed: 'a task of a long name, number 30' \(.*number 30' = \['classification', 25\] and is now "
            r"\['classification', 24\]\)",
        ),
        (changed(ROWS, 39, ["other", "tokens", 25]), "added since: 'other'; gone: 'a task of a long name, number 39'"),
        ([ROWS[1], ROWS[0], *ROWS[2:]], "the order: at place 0 stood '.*number 0', and now '.*number 1'"),
    ],
)
def test_other_tasks_are_named(now: list[list[Any]], told: str) -> None:
    with pytest.raises(ValueError, match=f"saved with other tasks: {told}") as raised:
        check_config(Path("state.json"), {"tasks": ROWS}, {"tasks": now})
    assert len(str(raised.value)) < 500


@pytest.mark.parametrize(
    ("was", "now", "told"),
    [
        ([0.1] * 90, [0.1] * 80 + [0.2] * 10, "it[80] = 0.1 and is now 0.2 (10 of 90 places differ)"),
        ("x" * 200 + "y", "x" * 200 + "z", f"it = ...{'x' * 20}y' and is now ...{'x' * 20}z'"),
        ([1, 2, 3], [1, 2], "it = [1, 2, 3] and is now [1, 2]"),
        (["a"] * 50, ["a"] * 51, "either"),
        (None, "x" * 90, "it = None and is now 'xxx"),
    ],
)  # fmt: skip
def test_other_values_are_shown_where_they_differ(was: Any, now: Any, told: str) -> None:
    words = difference("it", was, now)
    if told == "either":  # one is the beginning of the other
        one, other = words.removeprefix("it = ").split(" and is now ")
        assert one != other and len(words) < 300
    else:
        assert told in words and len(words) < 300

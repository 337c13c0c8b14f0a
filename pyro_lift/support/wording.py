"""Pieces of messages that many of them share."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["some_names", "some_tasks"]

#: Names that a message gives.
MOST = 5


def some_names(names: Sequence[str]) -> str:
    """List the first names in quotes, and say how many there are beside them.

    Example:
        >>> some_names(["a", "b"])
        "'a', 'b'"
        >>> some_names("abcdefg")
        "'a', 'b', 'c', 'd', 'e' and 2 more"
    """
    more = f" and {len(names) - MOST} more" if len(names) > MOST else ""
    return ", ".join(map(repr, names[:MOST])) + more


def some_tasks(names: Sequence[str]) -> str:
    """List the first tasks by name, and say how many there are beside them.

    Example:
        >>> some_tasks(["a"]), some_tasks(["a", "b"])
        ("task 'a'", "tasks 'a', 'b'")
    """
    return f"task{'' if len(names) == 1 else 's'} {some_names(names)}"

"""Some of a sequence, spread evenly over it: neighbours in a list of tasks are often relatives."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

__all__ = ["spread_evenly"]

T = TypeVar("T")


def spread_evenly(items: Sequence[T], most: int) -> list[T]:
    """Return at most so many items, in their order.

    Example:
        >>> spread_evenly("abcdefg", 3)
        ['a', 'c', 'e']
    """
    count = min(most, len(items))
    return [items[k * len(items) // count] for k in range(count)]

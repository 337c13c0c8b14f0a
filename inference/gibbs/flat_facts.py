"""Nested plain data as one level, for processes that hold their set-ups against each other."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

__all__ = ["flat_facts"]


def flat_facts(facts: Mapping[str, Any], at: str = "") -> dict[str, Any]:
    """Nested plain data by dotted names, as JSON gives it back."""
    found: dict[str, Any] = {}
    for name, value in facts.items():
        inner = flat_facts(value, f"{at}{name}.") if isinstance(value, Mapping) else {f"{at}{name}": value}
        found |= inner
    return found

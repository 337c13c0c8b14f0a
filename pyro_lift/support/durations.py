"""Lengths of time as people write them: ``"10 min"``, ``"1 h 30 min"``, ``90``."""

from __future__ import annotations

import re

from pyro_lift.support.options import check_number

__all__ = ["format_duration", "seconds_of"]

_UNITS = {"s": 1.0, "sec": 1.0, "second": 1.0, "m": 60.0, "min": 60.0, "minute": 60.0, "h": 3600.0, "hour": 3600.0}
_PART = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([a-z]+?)s?(?=[\s\d]|$)", re.IGNORECASE)


def seconds_of(budget: str | float, name: str = "budget") -> float:
    """Return a length of time in seconds; a number is of seconds.

    Args:
        budget: ``"10 min"``, ``"1.5 h"``, ``"1 h 30 min"``, ``"90 s"``, ``90``.
        name: of the option, for messages.

    Raises:
        ValueError: another form, or no time at all.

    Example:
        >>> seconds_of("1 h 30 min"), seconds_of(90), seconds_of("10min")
        (5400.0, 90.0, 600.0)
    """
    if not isinstance(budget, str):
        check_number(name, budget)
        return float(budget)
    text = budget.strip().lower()
    if re.fullmatch(r"\d+(\.\d+)?", text):
        return seconds_of(float(text), name)
    total, place = 0.0, 0
    while place < len(text):
        part = _PART.match(text, place)
        unit = None if part is None else _UNITS.get(part[2]) or _UNITS.get(f"{part[2]}s")
        if part is None or unit is None:
            raise ValueError(f"{name}={budget!r} is no length of time; write '10 min', '1.5 h' or a number of seconds.")
        total, place = total + float(part[1]) * unit, part.end()
    check_number(name, total)
    return total


def format_duration(seconds: float) -> str:
    """Format seconds as people write them.

    Example:
        >>> format_duration(12.3), format_duration(615), format_duration(5400)
        ('12 s', '10 min 15 s', '1 h 30 min')
    """
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    if minutes < 60:
        return f"{minutes} min {rest} s" if rest else f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if minutes else f"{hours} h"

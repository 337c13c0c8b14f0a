"""Options that are chosen by name: one check, one message."""

from __future__ import annotations

import difflib
import functools
import inspect
import math
from collections.abc import Callable, Iterable
from typing import ParamSpec, TypeVar

__all__ = ["check_choice", "check_number", "named_options"]

P = ParamSpec("P")
R = TypeVar("R")


def named_options(function: Callable[P, R]) -> Callable[P, R]:
    """Suggest the closest known option when a keyword is unknown."""
    known = [name for name in inspect.signature(function).parameters if name != "self"]

    @functools.wraps(function)
    def checked(*args: P.args, **kwargs: P.kwargs) -> R:
        for name in kwargs:
            if name not in known:
                near = difflib.get_close_matches(name, known, n=1)
                hint = f"did you mean {near[0]!r}?" if near else f"known are: {', '.join(known)}."
                raise TypeError(f"unknown option {name!r}={kwargs[name]!r}; {hint}")
        return function(*args, **kwargs)

    return checked


def check_choice(name: str, value: object, choices: Iterable[str]) -> None:
    """Refuse a value that is not one of the choices, naming the nearest one.

    Example:
        >>> check_choice("integrator", "eulr", ["exponential", "euler"])
        Traceback (most recent call last):
        ...
        ValueError: integrator='eulr' is not known; did you mean 'euler'? (one of: 'exponential', 'euler')
    """
    known = list(choices)
    if value in known:
        return
    near = difflib.get_close_matches(str(value), known, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else "."
    raise ValueError(f"{name}={value!r} is not known{hint} (one of: {', '.join(map(repr, known))})")


def check_number(name: str, value: float, *, least: float = 0.0, open_below: bool = True, whole: bool = False) -> None:
    """Refuse a number that is not finite or lies below ``least`` (or at it, when ``open_below``)."""
    kind = int if whole else (int, float)
    if isinstance(value, bool) or not isinstance(value, kind):
        raise TypeError(f"{name}={value!r}: expected {'a whole number' if whole else 'a number'}.")
    below = value <= least if open_below else value < least
    if not math.isfinite(value) or below:
        raise ValueError(
            f"{name}={value!r}: expected a finite number {'above' if open_below else 'of at least'} {least:g}."
        )

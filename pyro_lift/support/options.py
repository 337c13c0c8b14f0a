"""Options that are chosen by name: one check, one message."""

from __future__ import annotations

import difflib
import functools
import inspect
import math
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any, ParamSpec, TypeVar, get_args

__all__ = [
    "check_choice",
    "check_distinct",
    "check_literal",
    "check_number",
    "check_ordered",
    "current_names",
    "named_options",
    "renamed_keywords",
    "settings_of",
]

P = ParamSpec("P")
R = TypeVar("R")
T = TypeVar("T")


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


def renamed_keywords(**new_names: str) -> Callable[[type[T]], type[T]]:
    """Let a class accept old names of its keywords for one version, with a warning that tells the new ones.

    Example:
        >>> @renamed_keywords(zoo="library")
        ... class Method:
        ...     def __init__(self, library: int) -> None:
        ...         self.library = library
        >>> import warnings
        >>> with warnings.catch_warnings(record=True) as caught:
        ...     warnings.simplefilter("always")
        ...     Method(zoo=3).library
        3
        >>> print(caught[0].message)
        Method: 'zoo' is now called 'library'; the old name goes with the next version.
    """

    def decorate(cls: type[T]) -> type[T]:
        construct = cls.__init__

        @functools.wraps(construct)
        def checked(self: T, /, *args: Any, **kwargs: Any) -> None:
            construct(self, *args, **current_names(cls, kwargs))

        cls.__init__ = checked  # type: ignore[method-assign, assignment]
        cls._old_names = new_names  # type: ignore[attr-defined]
        return cls

    return decorate


def current_names(cls: type[Any], options: Mapping[str, Any], *, warn: bool = True) -> dict[str, Any]:
    """Return options of a class with their names of today; an old name is warned of, unless a file holds it.

    Args:
        cls: decorated by :func:`renamed_keywords`; any other has no old names.
        options: by old or new names.
        warn: whether an old name is a caller's, who should write the new one.

    Raises:
        TypeError: an option given by both of its names.
    """
    renamed = dict(options)
    for old, new in getattr(cls, "_old_names", {}).items():
        if old not in renamed:
            continue
        if new in renamed:
            raise TypeError(f"{cls.__name__}: {old!r} is the old name of {new!r}; give the new one alone.")
        if warn:
            message = f"{cls.__name__}: {old!r} is now called {new!r}; the old name goes with the next version."
            warnings.warn(message, FutureWarning, stacklevel=3)
        renamed[new] = renamed.pop(old)
    return renamed


def check_literal(name: str, value: object, literal: Any) -> None:
    """Refuse a value that is not one of the values of a ``Literal`` type, naming the nearest one.

    Example:
        >>> from typing import Literal
        >>> check_literal("solver", "cgs", Literal["cg", "neumann"])
        Traceback (most recent call last):
        ...
        ValueError: solver='cgs' is not known; did you mean 'cg'? (one of: 'cg', 'neumann')
    """
    check_choice(name, value, get_args(literal))


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
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise ValueError(f"{name}={value!r} is not known{hint} (one of: {', '.join(map(repr, known))})")


def check_number(name: str, value: float, *, least: float = 0.0, open_below: bool = True, whole: bool = False) -> None:
    """Refuse a number that is not finite or lies below ``least`` (or at it, when ``open_below``)."""
    kind = int if whole else (int, float)
    if isinstance(value, bool) or not isinstance(value, kind):
        raise TypeError(f"{name}={value!r}: expected {'a whole number' if whole else 'a number'}.")
    below = value <= least if open_below else value < least
    # A whole number past 64 bits is infinite for all that computes with it.
    finite = abs(value) < 2**63 if isinstance(value, int) else math.isfinite(value)
    if whole and not finite and value > 0:
        raise ValueError(f"{name}={value!r}: expected a whole number below 2**63.")
    if not finite or below:
        raise ValueError(
            f"{name}={value!r}: expected a finite number {'above' if open_below else 'of at least'} {least:g}."
        )


def settings_of(name: str, value: T | None, kind: type[T]) -> T:
    """Return settings as they were given, and the defaults of their kind where they are None.

    Raises:
        TypeError: something else than settings of that kind, a dictionary of them, say.
    """
    if value is None:
        return kind()
    if not isinstance(value, kind):
        raise TypeError(f"{name} is a {type(value).__name__}; expected {kind.__name__}(...), of pyro_lift.")
    return value


def check_ordered(what: str, names: object) -> None:
    """Refuse names in a set: their places are their numbers, and a set has them in another order in each process.

    One string in their place is refused too: it would be taken for a name a letter.

    Example:
        >>> check_ordered("labels", {"crane"})
        Traceback (most recent call last):
        ...
        TypeError: labels={'crane'} is a set, which has no order of classes: give a list of names.
    """
    if isinstance(names, str):
        raise TypeError(f"{what}={names!r} is one name, not a list of them: [{names!r}, ...].")
    if isinstance(names, (set, frozenset)):
        kind = type(names).__name__
        raise TypeError(f"{what}={names!r} is a {kind}, which has no order of classes: give a list of names.")


def check_distinct(what: str, names: Iterable[object], advice: str = "Give each its own name.") -> None:
    """Refuse names of which one stands twice; the message gives it and its two places.

    Example:
        >>> check_distinct("labels", ["crane", "kite", "crane"])
        Traceback (most recent call last):
        ...
        ValueError: labels: 'crane' stands twice (places 0 and 2). Give each its own name.
    """
    first: dict[object, int] = {}
    for place, name in enumerate(names):
        if name in first:
            raise ValueError(f"{what}: {name!r} stands twice (places {first[name]} and {place}). {advice}")
        first[name] = place

"""Dataclasses made from plain data with every key and type checked."""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from dataclasses import fields
from typing import Any, Literal, TypeVar, get_args, get_origin

from pyro_lift.support.options import current_names

__all__ = ["C", "from_dict", "named_type"]


C = TypeVar("C")


def from_dict(cls: type[C], data: Any, where: str) -> C:
    """Make a dataclass from a mapping, nested ones from nested mappings; ``where`` begins the error messages."""
    if not isinstance(data, dict):
        raise ValueError(f"{where}: {data!r} given; expected a table.")
    data = current_names(cls, data, warn=False)  # a file of an earlier version reads as it did
    hints = typing.get_type_hints(cls)
    known = {f.name: f for f in fields(cls)}  # type: ignore[arg-type]
    for key in data:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known are: {', '.join(known)}."
            raise ValueError(f"{where}: unknown key {key!r}; {hint}")
    for key, f in known.items():
        required = f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
        if required and key not in data:
            raise ValueError(f"{where}: {key!r} is missing ({f.metadata.get('help', 'a table')}).")
    values = {key: _value(hints[key], value, f"{where}: {key}") for key, value in data.items()}
    try:
        return cls(**values)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}: {error}") from error


def _value(hint: Any, value: Any, where: str) -> Any:
    if dataclasses.is_dataclass(hint):
        return from_dict(typing.cast(type[Any], hint), value, where)
    if not _fits(hint, value):
        raise ValueError(f"{where} = {value!r}: expected {named_type(hint)}.")
    if hint is not float:
        # A whole number where a fraction is as good becomes one.
        if (
            isinstance(value, int)
            and not isinstance(value, bool)
            and float in get_args(hint)
            and int not in get_args(hint)
        ):
            return _value(float, value, where)
        return value
    try:
        return float(value)
    except OverflowError:
        raise ValueError(f"{where}: a number of {len(str(abs(value)))} digits is too large.") from None


def _fits(hint: Any, value: Any) -> bool:
    origin = get_origin(hint)
    if origin is Literal:
        return isinstance(value, str)  # which one is checked by the dataclass, with the nearest choice
    if origin in (typing.Union, types.UnionType):
        return any(_fits(option, value) for option in get_args(hint))
    if origin is list:
        return isinstance(value, list) and all(_fits(get_args(hint)[0], option) for option in value)
    if origin is dict or hint is Any:
        return isinstance(value, dict) or hint is Any
    if hint is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, hint)


def named_type(hint: Any) -> str:
    """Name a type as the author of a TOML file knows it."""
    origin = get_origin(hint)
    if origin is Literal:
        return "one of " + ", ".join(map(repr, get_args(hint)))
    if origin in (typing.Union, types.UnionType):
        return " or ".join(named_type(option) for option in get_args(hint) if option is not type(None))
    if origin is list:
        return f"a list, each {named_type(get_args(hint)[0])}"
    names = {int: "a whole number", float: "a number", str: "a string", bool: "true or false", dict: "a table"}
    return names.get(hint, str(hint))

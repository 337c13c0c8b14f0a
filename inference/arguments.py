"""The arguments of a program, checked at the door: what is missing, and arrays that are no tensors."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from numbers import Number
from typing import Any

from torch import Tensor

__all__ = ["arguments_named", "check_arguments", "no_tensor"]


def check_arguments(model: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    """Refuse to call a program without what it needs, or with more than it takes.

    Raises:
        TypeError: with what to pass to ``run``.
    """
    try:
        signature = inspect.signature(model)
    except (TypeError, ValueError):  # of a callable that has none to show
        return
    try:
        signature.bind(*args, **kwargs)
    except TypeError as error:
        named = getattr(model, "__name__", type(model).__name__)
        bare = [p.replace(annotation=p.empty) for p in signature.parameters.values()]
        shown = signature.replace(parameters=bare, return_annotation=signature.empty)
        given = ", ".join([*(type(value).__name__ for value in args), *(f"{name}=..." for name in kwargs)])
        wanted = ", ".join(
            p.name for p in bare if p.default is p.empty and p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)
        )
        raise TypeError(
            f"the program {named}{shown} cannot be called with {given or 'no arguments'}: {error}. What run is "
            f"given goes to the program: mcmc.run({wanted})."
        ) from None


@contextmanager
def arguments_named(model: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Iterator[None]:
    """Say of a program that fails that it was given arrays which are no tensors, where it was.

    Raises:
        TypeError: as :func:`check_arguments` does; of the failure.
    """
    check_arguments(model, args, kwargs)
    try:
        yield
    except (AttributeError, IndexError, TypeError, ValueError, RuntimeError) as error:
        if (hint := _arrays_hint(model, args, kwargs)) is None:
            raise
        raise TypeError(f"{hint} The program failed with {type(error).__name__}: {error}") from error


def _arrays_hint(model: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> str | None:
    """Return a sentence about arguments that are arrays and no tensors; None where there is none."""
    try:
        given = inspect.signature(model).bind(*args, **kwargs).arguments
    except (TypeError, ValueError):
        given = {f"argument {k}": value for k, value in enumerate(args)} | dict(kwargs)
    for name, value in given.items():
        parts = value.items() if isinstance(value, Mapping) else [(None, value)]
        for key, part in parts:
            if _is_array(part):
                where = repr(name) if key is None else f"{name}[{key!r}]"
                return (
                    f"{where} is a {_kind(part)}, and a Pyro program computes with tensors: "
                    f"run(torch.as_tensor({name}), ...), or torch.as_tensor inside the program."
                )
    return None


def no_tensor(site: str, value: Any) -> str:
    """Return the message about an observed value that is no tensor."""
    return (
        f"the site {site!r} observes a {_kind(value)}, and a Pyro program computes with tensors: "
        f"pyro.sample({site!r}, ..., obs=torch.as_tensor(...)), or hand tensors to run."
    )


def _is_array(value: Any) -> bool:
    if isinstance(value, Tensor):
        return False
    while isinstance(value, (list, tuple)) and value:
        value = value[0]
        if isinstance(value, Number):
            return True
    return not isinstance(value, Tensor) and hasattr(value, "__array__")


def _kind(value: Any) -> str:
    kind = type(value)
    module = kind.__module__.split(".")[0]
    shape = f" of shape {list(value.shape)}" if hasattr(value, "shape") else ""
    return (kind.__name__ if module == "builtins" else f"{module} {kind.__name__}") + shape

"""The shapes and types of a task's rows, which are saved in place of the rows: a loaded posterior reads by them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from pyro_lift.models.task import Rows
from pyro_lift.support.archive import DamagedError

__all__ = ["forms_of", "row_of_zeros", "target_of_zeros"]


def forms_of(rows: Rows) -> dict[str, dict[str, Any]]:
    """Return the shape of a row and the type of its numbers, by input, as plain values."""
    return {
        name: {"shape": list(x.shape[1:]), "dtype": str(x.dtype).removeprefix("torch.")}
        for name, x in rows.inputs.items()
    }


def row_of_zeros(forms: Mapping[str, Any] | None, where: str) -> dict[str, Tensor]:
    """Make inputs of one row of these forms, which takes no memory; none where nobody has saved them.

    Args:
        forms: of :func:`forms_of`, or None.
        where: begins the error messages.

    Raises:
        DamagedError: what is no shape, or no type of PyTorch's; names the input.
    """
    made = {}
    for name, form in (forms or {}).items():
        try:
            shape, dtype = form["shape"], getattr(torch, form["dtype"])
            if not isinstance(dtype, torch.dtype) or min(shape, default=0) < 0 or math.prod(shape) > 2**62:
                raise ValueError(f"{form}")
            made[name] = torch.zeros((), dtype=dtype).expand(1, *shape)
        except (AttributeError, KeyError, TypeError, ValueError, RuntimeError) as error:
            raise DamagedError(f"{where}: {name!r} is {form!r}; expected a row's shape and type.") from error
    return made


def target_of_zeros(kind: object, shape: Any, where: str) -> Tensor:
    """Make the target of one row of a task's kind.

    Args:
        kind: of the task.
        shape: of a regression's target of one row; None, as of one saved before shapes were, gives means ``[n, C]``.
        where: begins the error messages.

    Raises:
        DamagedError: what is no shape.
    """
    if kind != "regression":
        return torch.zeros((1, 1) if kind == "tokens" else 1, dtype=torch.long)
    shape = [1] if shape is None else shape
    if not (isinstance(shape, list) and all(type(n) is int and n > 0 for n in shape)):
        raise DamagedError(f"{where}: the target's shape is {shape!r}; expected [], or [M] of M values a row.")
    return torch.zeros(()).expand(1, *shape)

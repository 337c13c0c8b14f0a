"""The spread of a regression's solved head, among a posterior's tensors."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from pyro_lift.models.value_spread import ValueSpread
from pyro_lift.support.archive import DamagedError

__all__ = ["saved_spread", "spread_tensors"]

_PREFIX = "head_spread."


def spread_tensors(spread: ValueSpread | None) -> dict[str, Tensor]:
    """Return its tensors, by the names under which they are saved."""
    return {} if spread is None else {f"{_PREFIX}{name}": x for name, x in spread._asdict().items()}


def saved_spread(file: Path, tensors: Mapping[str, Tensor]) -> ValueSpread | None:
    """Return the spread among the tensors of a file; None where there is none.

    Raises:
        DamagedError: some of its tensors are missing, or their shapes do not go together.
    """
    found = {name: tensors[_PREFIX + name] for name in ValueSpread._fields if _PREFIX + name in tensors}
    if not found:
        return None
    missing = [f"{_PREFIX}{name}" for name in ValueSpread._fields if name not in found]
    if missing:
        raise DamagedError(f"{file}: no tensor {', '.join(map(repr, missing))}.")
    spread = ValueSpread(**found)
    k, width = len(spread.left), len(spread.scale)
    if spread.basis.shape != (k, width) or spread.centre.shape != (width - 1,):
        shapes = ", ".join(f"{_PREFIX}{name} {tuple(x.shape)}" for name, x in found.items())
        raise DamagedError(f"{file}: the shapes of these do not go together: {shapes}.")
    return spread

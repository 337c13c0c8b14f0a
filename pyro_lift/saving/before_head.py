"""Where in a network the tasks' heads stand, in a folder's config.json: nothing where it is the network's output."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pyro_lift.models.adapters import RandomAdapter
from pyro_lift.models.before_head import named_before_head
from pyro_lift.support.archive import DamagedError

__all__ = ["described_reading", "read_as_saved"]

#: Key of the module before whose network's own head is read.
BEFORE_HEAD = "before_head"


def described_reading(adapter: RandomAdapter) -> dict[str, str]:
    """Return what is written of where an adapter reads its network."""
    return {} if adapter.before_head is None else {BEFORE_HEAD: adapter.before_head.name}


def read_as_saved(adapter: RandomAdapter, saved: Mapping[str, Any], path: Path) -> RandomAdapter:
    """Read the network where the adapter that was saved does.

    Raises:
        ValueError: the network has no such module; names the file.
    """
    name = saved.get(BEFORE_HEAD)
    if name is None:
        return adapter if adapter.before_head is None else adapter.reading(None)
    if not isinstance(name, str):
        raise DamagedError(f"{path}: adapter: {BEFORE_HEAD!r} is {name!r}, not the name of a module.")
    try:
        return adapter.reading(named_before_head(adapter.backbone, name))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error

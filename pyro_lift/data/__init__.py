"""Tasks: what a task is, and the families of tasks the package can load or make."""

from __future__ import annotations

from typing import Any

__all__ = ["load_tasks"]


def __getattr__(name: str) -> Any:
    """``load_tasks``, imported when first used: :mod:`pyro_lift.data.text` stands on a lower floor."""
    if name == "load_tasks":
        from pyro_lift.data.load import load_tasks

        return load_tasks
    raise AttributeError(f"module 'pyro_lift.data' has no attribute {name!r}.")

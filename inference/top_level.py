"""Our own surroundings of a call: gradients are on, and no handler or plate of the caller's is around a program."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from pyro.poutine.runtime import _DIM_ALLOCATOR, _PYRO_STACK

__all__ = ["at_top_level"]

#: Held by the thread that runs: Pyro has one stack of handlers for the whole process.
_door = threading.RLock()


def _new_door() -> None:
    """Open a forked process's own door: the thread that held its parent's is not in it."""
    global _door
    _door = threading.RLock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_new_door)


@contextmanager
def at_top_level(*, runs: bool = True) -> Iterator[None]:
    """Run a call as if the caller stood outside every mode; also a decorator. The caller's modes come back after it.

    Under ``no_grad`` or ``inference_mode`` a chain would see no likelihood, and sample its prior without a word; a
    plate around it would shift the dimensions of the program's own. Pyro's MCMC hides the caller's handlers likewise.

    Args:
        runs: whether a program of Pyro's is run; a call that runs none, such as loading, leaves Pyro's handlers alone
            and may be made in any thread.

    Raises:
        RuntimeError: another thread of the process runs.
    """
    if not runs:
        with torch.inference_mode(False), torch.enable_grad():
            yield
        return
    door = _door
    if not door.acquire(blocking=False):
        raise RuntimeError(
            "another thread of this process runs a chain or trains, and runs cannot share a process: Pyro's handlers "
            "belong to all of its threads. Give each run a process of its own (multiprocessing, or a command each), or "
            "wait until the other has ended."
        )
    try:
        with _without_handlers(), torch.inference_mode(False), torch.enable_grad():
            yield
    finally:
        door.release()


@contextmanager
def _without_handlers() -> Iterator[None]:
    """Take the caller's handlers and plates away, and bring them back."""
    handlers, dims = list(_PYRO_STACK), list(_DIM_ALLOCATOR._stack)
    _PYRO_STACK.clear()
    _DIM_ALLOCATOR._stack.clear()
    try:
        yield
    finally:
        _PYRO_STACK[:] = handlers
        _DIM_ALLOCATOR._stack[:] = dims

"""Our own surroundings of a call: gradients are on, and no handler or plate of the caller's is around a program."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from pyro.poutine.runtime import _DIM_ALLOCATOR, _PYRO_STACK

__all__ = ["at_top_level"]


@contextmanager
def at_top_level() -> Iterator[None]:
    """Run a call as if the caller stood outside every mode; also a decorator. The caller's modes come back after it.

    Under ``no_grad`` or ``inference_mode`` a chain would see no likelihood, and sample its prior without a word; a
    plate around it would shift the dimensions of the program's own. Pyro's MCMC hides the caller's handlers likewise.
    """
    handlers, dims = list(_PYRO_STACK), list(_DIM_ALLOCATOR._stack)
    _PYRO_STACK.clear()
    _DIM_ALLOCATOR._stack.clear()
    try:
        with torch.inference_mode(False), torch.enable_grad():
            yield
    finally:
        _PYRO_STACK[:] = handlers
        _DIM_ALLOCATOR._stack[:] = dims

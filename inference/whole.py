"""Taking the subsampling out of a program, so that samplers and predictions that see all data can run it.

``pyro.plate("tasks", N, subsample_size=1)`` shows one task at a run. NUTS refuses such a program, SVI takes it with
minibatches, and ``pyro.infer.Predictive`` would ask for one task's worth of a theta of all N. Pyro compares what a
plate was declared to take with what it is given, in ``SubsampleMessenger._subsample``, before any handler can have a
word; so for as long as a program runs under :func:`whole`, and in its thread alone, plates are made there as if nothing
had been said of a subsample.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any

from pyro.poutine.subsample_messenger import SubsampleMessenger

__all__ = ["Whole", "whole"]

_lock = threading.Lock()
_running = 0
_active = threading.local()
_subsample = SubsampleMessenger._subsample


def whole(model: Callable[..., Any], plates: str | Collection[str] | None = None) -> Whole:
    """Return a program whose plates take all their indices, whatever ``subsample_size`` they were given.

    NUTS, SVI and ``pyro.infer.Predictive`` run it, and its log density is that of all the data. A plate that is given
    its indices from outside (``subsample=``) keeps them.

    Args:
        model: a Pyro program, or a guide.
        plates: names of the plates that it is done to; None is all.

    Raises:
        TypeError: no program.

    Example:
        >>> import pyro, torch, pyro.distributions as dist
        >>> def model():
        ...     with pyro.plate("tasks", 4, subsample_size=1) as index:
        ...         return index
        >>> len(model()), len(whole(model)())
        (1, 4)
    """
    if not callable(model):
        raise TypeError(f"model={model!r}: expected a Pyro program, that is a function.")
    return Whole(model, None if plates is None else frozenset([plates] if isinstance(plates, str) else plates))


class Whole:
    """A program without subsampling; see :func:`whole`. It pickles where the program does.

    Attributes:
        model: the program as it was.
        plates: that it is done to; None is all.
    """

    def __init__(self, model: Callable[..., Any], plates: frozenset[str] | None) -> None:
        self.model, self.plates = model, plates
        if hasattr(model, "__name__"):
            functools.update_wrapper(self, model)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the program with full plates."""
        with _full_plates(self.plates):
            return self.model(*args, **kwargs)


@contextmanager
def _full_plates(plates: frozenset[str] | None) -> Iterator[None]:
    """Make plates full in this thread; Pyro's method stands in its place again once no program runs so."""
    global _running
    with _lock:
        _running += 1
        SubsampleMessenger._subsample = staticmethod(_in_full)
    stack: list[frozenset[str] | None] = _active.__dict__.setdefault("stack", [])
    stack.append(plates)
    try:
        yield
    finally:
        stack.pop()
        with _lock:
            _running -= 1
            if not _running:
                SubsampleMessenger._subsample = staticmethod(_subsample)


def _in_full(name: str, size: int | None = None, subsample_size: int | None = None, *rest: Any, **options: Any) -> Any:
    given = rest[0] if rest else options.get("subsample")
    if size is not None and given is None:
        for plates in getattr(_active, "stack", []):
            if plates is None or name in plates:
                subsample_size = None
    return _subsample(name, size, subsample_size, *rest, **options)

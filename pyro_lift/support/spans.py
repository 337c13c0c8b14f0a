"""Named spans of a step: read by a stopwatch of ours, and shown by ``torch.profiler``."""

from __future__ import annotations

import time
from contextlib import AbstractContextManager, ContextDecorator
from types import TracebackType

import torch.autograd.profiler
from torch.profiler import record_function

__all__ = ["Stopwatch", "span"]

#: Stopwatches that are running, the last started at the end.
_running: list[Stopwatch] = []


class Stopwatch:
    """Processor seconds by span while it runs; those of inner spans are taken out of outer ones.

    Attributes:
        seconds: spent so far, by the span's name.

    Example:
        >>> with Stopwatch() as watch:
        ...     with span("outer"), span("inner"):
        ...         pass
        >>> sorted(watch.seconds)
        ['inner', 'outer']
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._open: list[_OpenSpan] = []

    def __enter__(self) -> Stopwatch:
        _running.append(self)
        return self

    def __exit__(self, *error: object) -> None:
        _running.remove(self)

    def _begin(self, name: str) -> None:
        self._open.append(_OpenSpan(name))

    def _end(self) -> None:
        closed = self._open.pop()
        spent = time.process_time() - closed.begin
        self.seconds[closed.name] = self.seconds.get(closed.name, 0.0) + spent - closed.inner
        if self._open:
            self._open[-1].inner += spent


class _OpenSpan:
    """A span that has begun: its name, when, and the seconds of the spans inside it."""

    __slots__ = ("begin", "inner", "name")

    def __init__(self, name: str) -> None:
        self.name, self.begin, self.inner = name, time.process_time(), 0.0


class span(ContextDecorator):  # noqa: N801 - a verb's place: `with span(...)`, `@span(...)`
    """A context, or the decorator of a function, whose time is told under a name.

    Where no :class:`Stopwatch` runs and torch's profiler is off it takes a microsecond or two (``record_function``
    takes some twenty), so that the steps can always have them.

    Args:
        name: ``"pyro_lift.theta"`` and the like; the profiler shows it as it is.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self._watches: tuple[Stopwatch, ...] = ()
        self._record: AbstractContextManager[object] | None = None

    def _recreate_cm(self) -> span:
        """Make a fresh span at every call of a decorated function, which may call itself."""
        return span(self.name)

    def __enter__(self) -> span:
        if torch.autograd.profiler._is_profiler_enabled:
            self._record = record_function(self.name)
            self._record.__enter__()
        if _running:
            self._watches = tuple(_running)
            for watch in self._watches:
                watch._begin(self.name)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for watch in self._watches:
            watch._end()
        if self._record is not None:
            self._record.__exit__(kind, error, trace)

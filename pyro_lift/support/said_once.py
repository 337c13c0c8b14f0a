"""Log lines that are said once a run, however often what they tell of is met in it."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["said_once"]

log = logging.getLogger("pyro_lift")


class _Said(logging.Filter):
    """Let each line of each level through once."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: set[tuple[int, str]] = set()

    def filter(self, record: logging.LogRecord) -> bool:
        line = (record.levelno, record.getMessage())
        known = line in self.lines
        self.lines.add(line)
        return not known


@contextmanager
def said_once() -> Iterator[None]:
    """Leave out the package's log lines that were said already in this context; also a decorator.

    A run has shorter runs inside, which put its settings on trial, and each of them would say again of the same tasks
    and the same network what the first has said. Contexts may be nested: the outermost one counts.

    Example:
        >>> with said_once():
        ...     log.debug("once"); log.debug("once")  # the second is not written
    """
    if any(isinstance(known, _Said) for known in log.filters):
        yield
        return
    said = _Said()
    log.addFilter(said)
    try:
        yield
    finally:
        log.removeFilter(said)

"""What a stretch of work is, in front of all that the log says of it."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["said_of"]


@contextmanager
def said_of(what: str) -> Iterator[None]:
    """Put some words in front of what the package's log says meanwhile; nothing where there are none.

    Where two ways are tried and one is gone on with, the warnings of the other would else be read as that one's.

    Args:
        what: words without a percent sign.
    """
    if not what:
        yield
        return

    def put_in_front(record: logging.LogRecord) -> bool:
        record.msg = f"{what}: {record.msg}"
        return True

    log = logging.getLogger("pyro_lift")
    log.addFilter(put_in_front)
    try:
        yield
    finally:
        log.removeFilter(put_in_front)

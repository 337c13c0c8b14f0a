"""SIGTERM and Ctrl-C: a run ends with a word on what is kept, and how to go on with it."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import wraps
from typing import Any, TypeVar, cast

__all__ = ["Handlers", "RunStopped", "handled", "restore", "stops_with_a_word"]

#: Signals that ask a run to stop.
SIGNALS = (signal.SIGINT, signal.SIGTERM)
#: What stood for each signal before, as :func:`signal.getsignal` gives it.
Handlers = Mapping[signal.Signals, Any]

Run = TypeVar("Run", bound=Callable[..., Any])


class RunStopped(SystemExit):
    """A run that was asked to stop by a signal, and has saved itself."""

    def __init__(self, message: str, signal_number: int) -> None:
        super().__init__(message)
        self.message, self.signal_number = message, signal_number


def stops_with_a_word(run: Run) -> Run:
    """Decorate a run that takes ``session=``: a signal ends the work around its chain with what is kept, and where."""

    @wraps(run)
    def stopping(*args: Any, **options: Any) -> Any:
        session = options.get("session")
        with nullcontext() if session is None else session.signals_around_chain():
            return run(*args, **options)

    return cast(Run, stopping)


@contextmanager
def handled(handler: Callable[[int, Handlers], None]) -> Iterator[None]:
    """Give both signals a handler, which is told of those that stood before; only the main thread can."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in SIGNALS}
    for number in before:
        signal.signal(number, lambda number, frame: handler(number, before))
    try:
        yield
    finally:
        restore(before)


def restore(handlers: Handlers) -> None:
    """Put handlers back that stood before."""
    for number, handler in handlers.items():
        signal.signal(number, signal.SIG_DFL if handler is None else handler)

"""From a run's steps to its callbacks: what they are told, when, and what happens if one of them fails."""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyro_lift.support import distributed
from pyro_lift.watching.steps import Callback, Run, Step

__all__ = ["Watchers", "callbacks_of", "tell", "watch"]

log = logging.getLogger("pyro_lift")


class Watchers:
    """The callbacks of a run, and of the runs inside it.

    Calling it without arguments counts a step, as ``on_step`` of every method does; :meth:`tell` says more of it. A
    callback that raises is left out from then on, with its error in the log: the run goes on and loses nothing.
    ``KeyboardInterrupt`` and ``SystemExit`` go through. Python's, numpy's and torch's random streams of the host are
    after each call where they were before, so that a watched run has the draws of one that nobody watches.

    Args:
        callbacks: of the run: callbacks, functions of a step, or one of them.
        run: that is watched.
        rows: training rows of each task; with them a loss is known a row.
        names: of the tasks.
        on_step: called at each step without arguments; what it raises goes through.

    Raises:
        TypeError: what is no callback.
    """

    def __init__(
        self,
        callbacks: Any,
        run: Run,
        rows: Sequence[int] = (),
        names: Sequence[str] = (),
        on_step: Callable[[], None] | None = None,
    ) -> None:
        self.run, self.rows, self.names, self.on_step = run, list(rows), list(names), on_step
        given = callbacks_of(callbacks)
        self._callbacks = given if distributed.is_first() else []
        self._step, self._since = run.done, time.perf_counter()

    def of(self, kind: str, name: str = "", rows: Sequence[int] = (), names: Sequence[str] = ()) -> Watchers:
        """Make those of a run inside this one, which are the same: one that has failed is left out of both.

        Args:
            kind, name: of the run.
            rows, names: of its tasks.
        """
        inside = Watchers((), Run(kind, name), rows, names, self.on_step)
        inside._callbacks = self._callbacks
        return inside

    @contextmanager
    def running(self, total: int | None = None, done: int = 0) -> Iterator[Watchers]:
        """Tell all that the run begins, and at the end of the context that it has ended.

        Args:
            total: steps in all.
            done: of these, made before.
        """
        self.run = replace(self.run, total=total, done=done)
        self._step, self._since = done, time.perf_counter()
        self._call(self._callbacks, "begin", self.run)
        try:
            yield self
        except BaseException as error:
            self._call(self._callbacks, "end", self.run, error)
            raise
        self._call(self._callbacks, "end", self.run, None)

    def __bool__(self) -> bool:
        """Whether there is any callback."""
        return bool(self._callbacks)

    def __call__(self) -> None:
        """Count a step of which nothing is known."""
        self.tell()

    def tell(self, **measures: Any) -> None:
        """Count a step and tell it to those callbacks that it is due for.

        Args:
            measures: fields of :class:`~pyro_lift.watching.steps.Step`, numbers as tensors too; nobody waits for a
                device where no callback is due.
        """
        self._step += 1
        last = self._step == self.run.total
        due = [each for each in self._callbacks if last or self._step % max(each.every, 1) == 0]
        if due:
            plain: dict[str, Any] = {"seconds": time.perf_counter() - self._since}
            plain |= {name: value.item() if isinstance(value, Tensor) else value for name, value in measures.items()}
            self._call(due, "step", Step(self.run, self._step, **plain))
        if self.on_step is not None:
            self.on_step()

    def see(self, kernel: Any, stage: str) -> None:
        """Tell of a kernel's last transition.

        Args:
            kernel: of ours, which knows its last visit; of Pyro's no more is known than the stage.
            stage: begins with ``"Warmup"`` or ``"Sample"``, as Pyro has it.
        """
        visit = getattr(kernel, "last_visit", None)
        phase = "burn-in" if stage.startswith("Warmup") else "sample"
        if visit is None or not self._callbacks:
            self.tell(phase=phase)
            return
        tasks = getattr(visit, "tasks", None)
        rows = self.rows_of(visit)
        names = ("log_likelihood", "step_size", "grad_norm", "clipped", "acceptance", "phase")
        measures = {"phase": phase} | {name: getattr(visit, name) for name in names if hasattr(visit, name)}
        if rows:
            measures["loss"] = -visit.log_likelihood / rows
        if tasks is not None:
            measures["tasks"] = tuple(self.names[k] if self.names else str(k) for k in tasks)
        self.tell(**measures)

    def rows_of(self, visit: Any) -> int:
        """Return the training rows of a visit's tasks, of all where it does not name them; 0 where none are known."""
        tasks = getattr(visit, "tasks", None)
        return sum(self.rows) if tasks is None or not self.rows else sum(self.rows[k] for k in tasks)

    def _call(self, callbacks: Sequence[Callback], what: str, *arguments: Any) -> None:
        for each in list(callbacks):
            try:
                with _streams_as_they_were():
                    getattr(each, what)(*arguments)
            except Exception as error:
                if each in self._callbacks:
                    self._callbacks.remove(each)
                log.warning(
                    "the callback %r failed at step %d of %s and is left out from now on; the run goes on: %s: %s",
                    each, self._step, self.run.title, type(error).__name__, error, exc_info=True,
                )  # fmt: skip


class _Function(Callback):
    """A function of a step as a callback."""

    def __init__(self, function: Callable[[Step], None]) -> None:
        self.function = function

    def __repr__(self) -> str:
        return repr(self.function)

    def step(self, step: Step) -> None:
        """Call the function."""
        self.function(step)


def callbacks_of(callbacks: Any) -> list[Callback]:
    """Make a list of callbacks of a callback, a function of a step, or several.

    Raises:
        TypeError: anything else.
    """
    several = callbacks if isinstance(callbacks, (list, tuple)) else [] if callbacks is None else [callbacks]
    made: list[Callback] = []
    for each in several:
        if isinstance(each, Callback):
            made.append(each)
        elif callable(each) and not isinstance(each, type):
            made.append(_Function(each))
        else:
            raise TypeError(
                f"callbacks: {each!r} is neither a pyro_lift.watching.Callback nor a function of a step; expected a "
                'list such as [JsonLines("run.jsonl")].'
            )
    return made


@contextmanager
def watch(callbacks: Any, kind: str, total: int | None = None, **settings: Any) -> Iterator[Watchers]:
    """Watch a run of any method: what this gives is an ``on_step``.

    Args:
        callbacks: one or several.
        kind: of the run, for example the method's name.
        total: steps in all.
        settings: to be noted with the run.

    Example:
        >>> from pyro_lift.watching import JsonLines, watch
        >>> with watch(JsonLines("run.jsonl"), "union-train") as on_step:  # doctest: +SKIP
        ...     state = method.meta_train(tasks, on_step=on_step)
    """
    with Watchers(callbacks, Run(kind, settings=settings)).running(total) as watchers:
        yield watchers


def tell(on_step: Callable[[], None] | None, **measures: Any) -> None:
    """Tell an ``on_step`` of a step: with measures where it is :class:`Watchers`, else as a plain function."""
    if isinstance(on_step, Watchers):
        on_step.tell(**measures)
    elif on_step is not None:
        on_step()


@contextmanager
def _streams_as_they_were() -> Iterator[None]:
    before = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])  # noqa: NPY002
        torch.set_rng_state(before[2])

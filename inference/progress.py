"""The bar of a chain: loss, step size, time left, and its callbacks. Pyro's own bar shows no time left."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from tqdm import tqdm

from pyro_lift.support import distributed
from pyro_lift.support.durations import format_duration
from pyro_lift.watching.steps import Run
from pyro_lift.watching.watch import Watchers

__all__ = ["chain_bar"]

log = logging.getLogger("pyro_lift")

#: Seconds between lines in the log, where no bar is shown.
LOGGED_EVERY = 60.0


@contextmanager
def chain_bar(
    total: int, description: str, show: bool = True, done: int = 0, on_step: Callable[[], None] | None = None
) -> Iterator[Callable[..., None]]:
    """A bar on stderr, moved by the hook it gives; hidden, as Pyro's, under CI and xdist, and where not process 0.

    Where it is hidden the log of process 0 has a line a minute.

    Its loss is a row's where ``on_step`` knows the rows of the tasks, else the sum over the visited rows.

    Args:
        total: transitions of the chain, warm-up included.
        description: before the bar.
        show: whether there is a bar at all.
        done: transitions made before, by the run that is gone on with.
        on_step: called after each transition too; of callbacks (:class:`~pyro_lift.watching.watch.Watchers`) also at
            the beginning and at the end, and with measures.

    Yields:
        A ``hook_fn`` for Pyro's MCMC.
    """
    unseen = not show or "CI" in os.environ or "PYTEST_XDIST_WORKER" in os.environ
    first = distributed.is_first()
    lines = _Lines(description, total, done) if unseen and first else None
    watchers = on_step if isinstance(on_step, Watchers) else Watchers((), Run(description), on_step=on_step)
    with (
        watchers.running(total, done),
        tqdm(total=total, initial=done, desc=description, disable=unseen or not first, dynamic_ncols=True) as bar,
    ):
        looked: int | None = None

        def hook(kernel: Any, samples: Any, stage: str, i: int) -> None:
            nonlocal looked
            del samples, i
            told = kernel.logging()
            at = getattr(kernel, "logged_at", None)
            if at is None or at != looked:  # a sum over the rows of this visit; later visits have other rows
                looked = at
                if "loglik" in told:  # what is known everywhere as a loss, a row where rows are known
                    rows = watchers.rows_of(getattr(kernel, "last_visit", None)) or 1
                    told = {"loss": f"{-float(told.pop('loglik')) / rows:.3e}", **told}
                bar.set_postfix(told, refresh=False)
            bar.update()
            if lines is not None:
                lines.step(told)
            watchers.see(kernel, stage)

        yield hook


class _Lines:
    """Lines in the log in place of a bar: a run of hours is not silent.

    Args:
        description: of the chain.
        total: its transitions.
        done: made before.
    """

    def __init__(self, description: str, total: int, done: int) -> None:
        self.description, self.total, self.before, self.done = description, total, done, done
        self.began = self.told = time.monotonic()
        self.loss = ""

    def step(self, told: Mapping[str, Any]) -> None:
        """Count a transition, and say how far the chain is if a minute has gone by."""
        self.done += 1
        self.loss = f", loss {told['loss']}" if "loss" in told else self.loss
        now = time.monotonic()
        if now - self.told < LOGGED_EVERY or self.done >= self.total:
            return
        self.told = now
        left = (now - self.began) / (self.done - self.before) * (self.total - self.done)
        log.info(
            "%s: step %d of %d%s, %s left", self.description, self.done, self.total, self.loss, format_duration(left)
        )

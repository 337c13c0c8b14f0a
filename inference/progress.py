"""The bar of a chain: loss, step size, time left, and its callbacks. Pyro's own bar shows no time left."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from tqdm import tqdm

from pyro_lift.support import distributed
from pyro_lift.watching.steps import Run
from pyro_lift.watching.watch import Watchers

__all__ = ["chain_bar"]


@contextmanager
def chain_bar(
    total: int, description: str, show: bool = True, done: int = 0, on_step: Callable[[], None] | None = None
) -> Iterator[Callable[..., None]]:
    """A bar on stderr, moved by the hook it gives; hidden, as Pyro's, under CI and xdist, and where not process 0.

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
    hidden = not show or "CI" in os.environ or "PYTEST_XDIST_WORKER" in os.environ
    hidden = hidden or not distributed.is_first()
    watchers = on_step if isinstance(on_step, Watchers) else Watchers((), Run(description), on_step=on_step)
    with (
        watchers.running(total, done),
        tqdm(total=total, initial=done, desc=description, disable=hidden, dynamic_ncols=True) as bar,
    ):
        looked: int | None = None

        def hook(kernel: Any, samples: Any, stage: str, i: int) -> None:
            nonlocal looked
            del samples, i
            log = kernel.logging()
            at = getattr(kernel, "logged_at", None)
            if at is None or at != looked:  # a sum over the rows of this visit; later visits have other rows
                looked = at
                if "loglik" in log:  # what is known everywhere as a loss, a row where rows are known
                    rows = watchers.rows_of(getattr(kernel, "last_visit", None)) or 1
                    log = {"loss": f"{-float(log.pop('loglik')) / rows:.3e}", **log}
                bar.set_postfix(log, refresh=False)
            bar.update()
            watchers.see(kernel, stage)

        yield hook

"""Stores that a chain keeps beside that of theta: velocities, and references of control variates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from pyro_lift.inference.gibbs.control_variates import of_all_rows
from pyro_lift.inference.gibbs.rows import Values, task_rows, write_values
from pyro_lift.inference.gibbs.state import Chain, ControlVariates
from pyro_lift.inference.gibbs.translation_plan import second_store
from pyro_lift.inference.stores.store import ThetaStore
from pyro_lift.inference.watch import Watch

__all__ = ["with_stores_beside", "write_beside"]


def with_stores_beside(chain: Chain, store: str | ThetaStore, row_bytes: int, device: torch.device) -> Chain:
    """Give a chain the stores that its settings need.

    Args:
        chain: as it was planned.
        store: kind of theta's store, or the caller's own: the others are of its kind.
        row_bytes: of one task's theta.
        device: that computes.
    """
    settings, N = chain.settings, chain.structure.num_tasks
    if settings.theta_update == "underdamped":
        chain = chain._replace(momenta=second_store(store, N, row_bytes, device))
    if settings.control_variates:
        rows = second_store(store, N, 2 * row_bytes, device)
        chain = chain._replace(variates=ControlVariates(rows, settings.control_variates, of_all_rows(chain.program)))
    return chain


def write_beside(
    chain: Chain, store: ThetaStore, tasks: tuple[int, ...], rows: Sequence[Tensor] | Values, watch: Watch | None
) -> None:
    """Write what a visit that has succeeded keeps of its block; with a watch, what was there is kept where it failed.

    Args:
        chain: of the visit.
        store: one of its stores beside theta's.
        tasks: of the block.
        rows: one a task; or values by family, laid out as theta is.
        watch: of a chain on an accelerator.
    """
    if isinstance(rows, Mapping):
        if watch is None:
            write_values(chain._replace(store=store), tasks, rows)
            return
        rows = task_rows(chain, tasks, rows)
    if watch is not None and all(store.has(task) for task in tasks):
        rows = [watch.kept(*pair) for pair in zip(rows, store.read(tasks), strict=True)]
    store.write(tasks, rows)

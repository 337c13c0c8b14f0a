r"""Control variates for minibatches of rows: the noise of a task's gradient is that of a difference.

Each task keeps a reference r_i, a theta of its own past, and the gradient of all its rows there. With a minibatch's
gradient g_b, which the plates of rows scale to all rows,

.. math:: \hat g(\theta_i) = g(r_i) + g_b(\theta_i) - g_b(r_i)

is unbiased for every r_i, and its variance falls with the square of :math:`\theta_i - r_i` (Baker, Fearnhead, Fox and
Nemeth 2019): where each row curves alike it has none. A visit costs a second run of the minibatch; at every
``control_variates``-th visit of a task its theta becomes the reference, at the cost of a run of all its rows.

A stored gradient must not go stale with phi: the likelihood, and all that is not a normal prior, may depend on theta
alone.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from pyro_lift.inference.gibbs.rows import Values, regrouped, task_rows
from pyro_lift.inference.gibbs.state import Chain, ControlVariates, Settings, SGLDGibbsState, Streams, Structure
from pyro_lift.inference.program import Evaluation, Program
from pyro_lift.inference.sgld import Drift
from pyro_lift.inference.stores.store import ThetaStore
from pyro_lift.inference.whole import whole

__all__ = ["Corrected", "check_control_variates", "corrected", "of_all_rows"]


class Corrected(NamedTuple):
    """A minibatch's drift with its noise taken out, and the rows to keep for its tasks."""

    drift: Drift
    rows: list[Tensor]


def check_control_variates(settings: Settings, structure: Structure, run: Evaluation, distributed: bool) -> None:
    """Refuse control variates where a stored gradient would be another density's, or there is nothing to gain.

    Raises:
        ValueError: with the reason and the way out.
    """
    if not settings.control_variates:
        return
    faults = {
        f'phi_update="{settings.phi_update}"': settings.phi_update != "gibbs" and "phi may stand in the likelihood",
        f'theta_update="{settings.theta_update}"': settings.theta_update not in ("sgld", "underdamped")
        and "it takes no minibatches",
        f'translation="{settings.translation}"': settings.translation not in ("none", "auto")
        and "it keeps gradients of its own",
        "site_update": bool(settings.site_update) and "a site that is solved sees all rows",
        "distributed=True": distributed and "a pass is shared by processes",
        "max_grad_norm": settings.max_grad_norm is not None and "a gradient that is scaled down is no difference",
        "max_move": settings.max_move is not None and "a gradient that is shortened is no difference",
    }
    for option, reason in faults.items():
        if reason:
            raise ValueError(f"control_variates={settings.control_variates} does not go with {option}: {reason}.")
    for site in run.locals.values():
        if site.gaussian() is None or site.family in structure.coupled:
            raise ValueError(
                f"control_variates={settings.control_variates}: the local site {site.name!r} has no normal prior of "
                "its own, and its gradient would go stale as phi moves. Use control_variates=0."
            )


def of_all_rows(program: Program) -> Program:
    """Return a program whose plates of rows are whole, that names its families as the other one does."""
    full = Program(whole(program.model), program.plate, program.args, program.kwargs, program.initial)
    full.families, full.supports = program.families, program.supports
    return full


def corrected(
    state: SGLDGibbsState,
    chain: Chain,
    run: Evaluation,
    drift: Drift,
    streams: Streams,
    rows_state: Tensor | None,
    known: list[Tensor] | None = None,
) -> Corrected:
    """Take the noise out of a minibatch's gradient by that at the tasks' references; set new references where due.

    Args:
        state: of the chain.
        chain: with its control variates.
        run: of the minibatch.
        drift: its gradients.
        streams: of minibatches, at where the run has left it.
        rows_state: of that stream before the run, so that the same minibatch is drawn once more.
        known: the rows to keep from an earlier step of the same visit.
    """
    variates, index = _variates(chain), torch.tensor(run.tasks)
    kept = known or _read(variates.store, run.tasks)
    n_inflate, coupled = chain.settings.n_inflate, chain.cache.coupled
    if kept is None or (known is None and max(float(row[-1]) for row in kept) >= variates.every):
        values = regrouped(run, {name: site.leaf.detach() for name, site in run.locals.items()})
        full = variates.program.run(state.phi, values, index, streams.rows)
        whole_drift = full.drift(full.locals, coupled, n_inflate, keep_graph=False)
        gradient = {name: whole_drift.gradient[name] for name in drift.gradient}
        return Corrected(drift._replace(gradient=gradient), _rows(chain, run, values, gradient, 1.0))
    size = (len(kept[0]) - 1) // 2
    reference, at_reference = (_unpacked(chain, run, [row[k * size : (k + 1) * size] for row in kept]) for k in (0, 1))
    if streams.rows is not None and rows_state is not None:
        streams.rows.set_state(rows_state)
    again = chain.program.run(state.phi, reference, index, streams.rows)
    there = again.drift(again.locals, coupled, n_inflate, keep_graph=False)
    gradient = {
        name: drift.gradient[name] - there.gradient[name] + at_reference[site.task][site.family]
        for name, site in run.locals.items()
    }
    rows = known or [torch.cat([row[:-1], row[-1:] + 1.0]) for row in kept]
    return Corrected(drift._replace(gradient=gradient), rows)


def _variates(chain: Chain) -> ControlVariates:
    assert chain.variates is not None
    return chain.variates


def _read(store: ThetaStore, tasks: tuple[int, ...]) -> list[Tensor] | None:
    if not all(store.has(task) for task in tasks):
        return None
    return store.read(tasks)


def _rows(chain: Chain, run: Evaluation, values: Values, gradient: dict[str, Tensor], age: float) -> list[Tensor]:
    """One row a task: reference, gradient, and the visits that have used it."""
    parts = zip(task_rows(chain, run.tasks, values), task_rows(chain, run.tasks, regrouped(run, gradient)), strict=True)
    return [torch.cat([*part, part[0].new_full((1,), age)]) for part in parts]


def _unpacked(chain: Chain, run: Evaluation, rows: list[Tensor]) -> Values:
    """Values by task and family from flat rows, laid out as those of theta are."""
    layouts = chain.cache.layouts
    values: dict[int | None, dict[str, Tensor]] = {}
    for k, task in enumerate(run.tasks):
        layout, begin = layouts[task if chain.structure.sequential else None], 0
        values[task] = {}
        for site in layout:
            end = begin + site.shape.numel()
            values[task][site.family] = rows[k][begin:end].view(site.shape)
            begin = end
    if chain.structure.sequential:
        return values
    return {
        None: {
            site.family: torch.stack([values[task][site.family] for task in run.tasks], site.plate_dim)
            for site in layouts[None]
        }
    }

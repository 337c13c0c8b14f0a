"""The joint training before the chain: all tasks share one vector, which Adam moves."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from pyro_lift.inference.gibbs.rows import Values, block_values, mean_square, put_at_start, regrouped, task_rows
from pyro_lift.inference.gibbs.solved_sites import solved
from pyro_lift.inference.gibbs.state import (
    Chain,
    SGLDGibbsInfo,
    SGLDGibbsState,
    Streams,
    Structure,
    init,
    kept_state,
)
from pyro_lift.inference.gibbs.steadiness import rate_factor, steadied, window_of
from pyro_lift.inference.gibbs.task_factors import factor_of, mean_factor
from pyro_lift.inference.program import Rows
from pyro_lift.inference.sgld import check_finite, check_moved, precondition, update_second_moment

__all__ = ["SGDGradient", "end_of_sgd", "sgd_gradient", "sgd_step", "sgd_update"]


def sgd_step(
    state: SGLDGibbsState, chain: Chain, index: Tensor, streams: Streams
) -> tuple[SGLDGibbsState, SGLDGibbsInfo]:
    """Take one step of Adam on one vector shared by all tasks, without prior and noise; other local sites follow alone.

    With ``theta_i := phi`` for all i, it is joint training; the chain then starts where S = N phi exactly.

    A training that becomes unsteady goes back (:mod:`~pyro_lift.inference.gibbs.steadiness`).

    Raises:
        DivergedError: a loss or gradient that is not finite; nothing has changed.
    """
    values = block_values(state, chain, index, streams)
    computed = _gradient(state, chain, index, values, streams)
    moments = {**state.second_moment, **computed.second_moment}
    watch, tasks, rows = chain.cache.watch, computed.info.tasks, computed.rows
    after = sgd_update(state, chain.structure, computed.gradient, moments, float(computed.info.step_size))
    check_moved(after.phi, state.step, tasks, watch)
    if watch is not None:
        after = kept_state(watch, after, state)
        rows = [watch.kept(*pair) for pair in zip(rows, task_rows(chain, tasks, values), strict=True)]
    chain.store.write(tasks, rows)
    loss = -computed.info.log_likelihood * mean_factor(tasks, chain.settings.sgd_weights)
    window = window_of(-(-chain.structure.num_tasks // len(tasks)))
    return steadied(state, after, loss, window), computed.info


class SGDGradient(NamedTuple):
    """The gradient of one pass of the joint training, and all that goes with it.

    Attributes:
        gradient: of the log likelihood in the shared vector, by global site.
        second_moment: running mean squares of the other local families.
        rows: of the pass's tasks, with the other families moved.
        info: of the pass.
    """

    gradient: dict[str, Tensor]
    second_moment: dict[str, Tensor]
    rows: list[Tensor]
    info: SGLDGibbsInfo


def sgd_gradient(state: SGLDGibbsState, chain: Chain, index: Tensor, streams: Streams) -> SGDGradient:
    """Compute one pass of the joint training, without its step; the tasks' rows are in the store when it returns."""
    values = block_values(state, chain, index, streams)
    computed = _gradient(state, chain, index, values, streams)
    chain.store.write(computed.info.tasks, computed.rows)
    return computed


def _gradient(state: SGLDGibbsState, chain: Chain, index: Tensor, values: Values, streams: Streams) -> SGDGradient:
    structure, settings = chain.structure, chain.settings
    tasks = tuple(index.tolist())
    lr = settings.sgd_step_size(state.step) * rate_factor(state)
    shared: Values = {task: _with_shared(structure, state, rows, task is None) for task, rows in values.items()}
    shared = solved(state, chain, shared, index, streams)
    run = chain.program.run(state.phi, shared, index, streams.rows)
    drift = run.drift(run.locals, chain.cache.coupled, settings.n_inflate)
    norm = check_finite(drift, state.step, tasks, chain.cache.watch)
    moments = dict(state.second_moment)
    total: dict[str, Tensor] = {}
    moved = {}
    for name, site in run.locals.items():
        gradient = drift.gradient[name]
        if site.family in structure.pair_of:
            part = gradient if settings.sgd_weights is None else gradient * factor_of(site, tasks, settings.sgd_weights)
            part = part if site.task is not None else part.sum(site.plate_dim)
            shared_site = structure.pair_of[site.family].global_site
            part = part.reshape(state.phi[shared_site].shape)
            total[shared_site] = total[shared_site] + part if shared_site in total else part
            moved[name] = site.leaf.detach()
        elif site.family in settings.site_update:
            moved[name] = site.leaf.detach()
        else:
            square = mean_square(gradient, site.family, site.plate_dim, structure)
            moments[site.family] = update_second_moment(moments.get(site.family), square.sqrt(), ADAM_DECAY)
            rate = lr * settings.site_step_scale.get(site.family, 1.0)
            moved[name] = site.leaf.detach() + rate * gradient * precondition(moments[site.family], 1e-3)
    rows = task_rows(chain, tasks, regrouped(run, moved))
    info = SGLDGibbsInfo(tasks, drift.log_likelihood, norm, lr, False, "sgd")
    others = {family: v for family, v in moments.items() if family not in structure.pair_of}
    return SGDGradient(total, others, rows, info)


def sgd_update(
    state: SGLDGibbsState,
    structure: Structure,
    gradient: Mapping[str, Tensor],
    second_moment: Mapping[str, Tensor],
    lr: float,
) -> SGLDGibbsState:
    """The step of Adam on the shared vector.

    Args:
        gradient: by global site, summed over the block.
        second_moment: running mean squares of all local families; those of the pairs are moved here.
        lr: learning rate.

    Returns:
        The state after it, whose vector has not been looked at.
    """
    phi, momentum, moments = dict(state.phi), dict(state.momentum), dict(second_moment)
    for name, total in gradient.items():
        family = structure.pairs[name].family
        phi[name], momentum[name], moments[family] = _adam(
            phi[name], total.to(phi[name].dtype), momentum.get(name), moments.get(family), state.step, lr
        )
    return SGLDGibbsState(state.step + 1, phi, state.sums, state.J, moments, momentum, squares=state.squares)


ADAM_MOMENTUM, ADAM_DECAY, ADAM_EPSILON = 0.9, 0.99, 1e-8


def _adam(
    x: Tensor, gradient: Tensor, mean: Tensor | None, square: Tensor | None, steps: int, lr: float
) -> tuple[Tensor, Tensor, Tensor]:
    """One ascent step of Adam; the mean square is kept free of its start-up bias, ready to precondition with."""
    mean = (1 - ADAM_MOMENTUM) * gradient + (ADAM_MOMENTUM * mean if mean is not None else 0.0)
    # A running average whose weights always sum to one: the bias-corrected form of Adam's second moment.
    keep = ADAM_DECAY * (1 - ADAM_DECAY**steps) / (1 - ADAM_DECAY ** (steps + 1))
    square = gradient.square() if square is None else torch.lerp(gradient.square(), square, keep)
    corrected = mean / (1 - ADAM_MOMENTUM ** (steps + 1))
    return x + lr * corrected / (square.sqrt() + ADAM_EPSILON), mean, square


def _with_shared(structure: Structure, state: SGLDGibbsState, rows: Rows, stacked: bool) -> Rows:
    """The block's rows with every paired family put at phi."""
    shared = dict(rows)
    for family, pair in structure.pair_of.items():
        phi = state.phi[pair.global_site]
        shared[family] = torch.broadcast_to(phi, rows[family].shape)
    return shared


def end_of_sgd(state: SGLDGibbsState, chain: Chain) -> SGLDGibbsState:
    """Put theta_i := phi for every task and S := N phi: where the shared training ended, the chain begins."""
    for name, pair in chain.structure.pairs.items():
        chain.cache.start[pair.family] = state.phi[name].clone()
    put_at_start(chain)
    fresh = init(chain.structure, chain.cache, state.phi)
    return fresh._replace(step=state.step, second_moment=state.second_moment)

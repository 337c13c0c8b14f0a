"""One visit of SGLD-Gibbs (Eq. 9-11): SGLD moves a block of theta_i, then phi gets an exact or a Langevin draw.

The paper's loop is phi, theta_i, J, phi, theta_i, J, ...; a visit here is theta_i, J, phi. It is the same loop entered
one phase later, and lets one run of the program serve a whole visit: the gradient for theta_i, the conditional
p(theta_i | phi) for J and the prior of phi all belong to the same phi.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from pyro_lift.inference.gibbs import (
    conjugate,
    long_vectors,
    metropolis,
    regression,
    scaling,
    solved_sites,
    step_adaptation,
    translation,
    underdamped,
)
from pyro_lift.inference.gibbs.accumulator import exact
from pyro_lift.inference.gibbs.control_variates import corrected
from pyro_lift.inference.gibbs.longest_move import limited
from pyro_lift.inference.gibbs.movers import Move, mover_of
from pyro_lift.inference.gibbs.rows import (
    Values,
    block_values,
    mean_square,
    regrouped,
    shifted_values,
    task_rows,
    write_values,
)
from pyro_lift.inference.gibbs.scale_draws import draw_scales, squares_around
from pyro_lift.inference.gibbs.state import (
    Chain,
    Phase,
    SGLDGibbsInfo,
    SGLDGibbsState,
    Streams,
    Structure,
    kept_state,
)
from pyro_lift.inference.gibbs.step_adaptation import eta_of
from pyro_lift.inference.gibbs.stores_beside import write_beside
from pyro_lift.inference.gibbs.task_factors import factor_of
from pyro_lift.inference.program import Evaluation, Rows
from pyro_lift.inference.sgld import Drift, check_finite, check_moved, gaussian_noise, running_mean
from pyro_lift.inference.stores.store import ThetaStore
from pyro_lift.support.spans import span

__all__ = ["draw_globals", "draw_phi", "step", "visited"]


class _ThetaMove(NamedTuple):
    """The block after its theta have moved.

    Attributes:
        run: the last run of the program.
        sites: moved values by site name.
        values: the same by task and family.
        sums: S of those pairs whose S came with the move.
        moments: the preconditioner's mean squares.
        info: diagnostics of the move.
        first: the first run of the program, and the gradient by site that moved theta from where it stood.
        tuned: what a tested step is tuned by.
        beside: rows of the block for stores beside theta's.
    """

    run: Evaluation
    sites: dict[str, Tensor]
    values: Values
    sums: dict[str, Tensor]
    moments: dict[str, Tensor]
    info: SGLDGibbsInfo
    first: tuple[Evaluation, dict[str, Tensor]]
    tuned: dict[str, Tensor]
    beside: tuple[tuple[ThetaStore, list[Tensor] | Values], ...] = ()


def step(
    state: SGLDGibbsState,
    chain: Chain,
    index: Tensor,
    streams: Streams,
    phase: Phase = "sample",
    move_phi: bool = True,
) -> tuple[SGLDGibbsState, SGLDGibbsInfo]:
    """Visit the block of tasks ``index`` once.

    Nothing is kept of a visit that fails: state, store and table change only at its end. The given state stays as it
    is; with ``chain.cache.recycle``, the memory of its S is used again by the visit after this one.

    Args:
        state: of the chain.
        chain: what was set at set-up.
        index: the block's tasks.
        streams: of minibatches and noise.
        phase: ``"burn-in"`` adapts the preconditioner, ``"sample"`` does not.
        move_phi: whether phi is drawn; not where other passes' changes of S are still to come.

    Raises:
        DivergedError: a loss or gradient that is not finite.
    """
    return visited(state, chain, index, streams, phase, move_phi)[:2]


def visited(
    state: SGLDGibbsState, chain: Chain, index: Tensor, streams: Streams, phase: Phase, move_phi: bool
) -> tuple[SGLDGibbsState, SGLDGibbsInfo, translation.Pull | None]:
    """Do as :func:`step` does, and return what the block says of a translation beside it; None where there is none."""
    before, watch = block_values(state, chain, index, streams), chain.cache.watch
    # (10)  theta_i | phi, D_i
    moved = _move_theta(state, chain, before, index, streams, phase)
    # (11)  what the tasks pull phi with: S and J, one block's part replaced
    sums = _updated_sums(state, chain.structure, moved, before)
    pull, J, table_row = _pull_on_phi(state, chain, moved, sums, index, streams)
    # (9)  phi | theta_1..N
    squares = updated_squares(state, chain.structure, moved.run, moved.values, before)
    for level in chain.structure.regressions.values():
        around = state.squares[level.cross], state.squares[level.square]
        known = chain.cache.coefficients[level.family]
        around = regression.moved(level, known, moved.run, around, moved.values, before)
        squares |= {level.cross: around[0], level.square: around[1]}
    block, offset, gradients, shifts = None, state.offset, state.gradients, None
    if chain.translation is not None:
        block = translation.pull_of(state, chain, *moved.first, before)
        if move_phi:
            shifts = translation.shift(state, chain, block, moved.moments, streams.noise)
            sums, offset, gradients = translation.shifted(state, chain, sums, block, shifts)
    phi = state.phi
    if move_phi and chain.settings.phi_update == "gibbs":
        phi, squares = draw_globals(state, chain, sums, squares, streams.noise, shifts)
    elif move_phi:
        phi = _langevin_phi(state, chain, moved.run, pull, streams.noise)
    scaled, stored = scaling.Scaled(moved.values, phi, sums, squares, state.widths), state.offset
    if chain.structure.scaling and move_phi and state.step >= chain.structure.hold:
        # The likelihood is asked about theta where they are, so that the shift is put into them first.
        scaled, stored = scaled._replace(values=shifted_values(chain, moved.values, shifts or {})), offset
        scaled = scaling.scale(chain, index, scaled, state.step, phase == "burn-in", streams.noise)

    made, moments = state.step + 1, moved.moments
    parts = {"offset": offset, "gradients": gradients, "squares": scaled.squares, "widths": scaled.widths}
    parts["tuned"] = moved.tuned
    after = SGLDGibbsState(made, scaled.phi, scaled.sums, J, moments, {}, **parts)
    if watch is None:
        write_values(chain, moved.info.tasks, scaled.values, stored)
    else:
        after, old = kept_state(watch, after, state), task_rows(chain, moved.info.tasks, before, state.offset)
        rows = task_rows(chain, moved.info.tasks, scaled.values, stored)
        chain.store.write(moved.info.tasks, [watch.kept(*pair) for pair in zip(rows, old, strict=True)])
    for store, beside in moved.beside:
        write_beside(chain, store, moved.info.tasks, beside, watch)
    if block is not None:
        translation.keep(chain, moved.info.tasks, block)
    if table_row is not None and chain.cache.table is not None:
        chain.cache.table.store(_block_of(chain.structure, index), table_row, watch)
    return after, moved.info, block


def _move_theta(
    state: SGLDGibbsState, chain: Chain, values: Values, index: Tensor, streams: Streams, phase: Phase
) -> _ThetaMove:
    """Move the block's theta by one or more steps of SGLD, or by tested ones."""
    program, structure, settings, cache = chain.program, chain.structure, chain.settings, chain.cache
    tasks, moments = tuple(index.tolist()), _Moments(state, chain, phase)
    values = solved_sites.solved(state, chain, values, index, streams)
    if settings.theta_update in metropolis.TARGETS:
        m = metropolis.move(state, chain, values, index, streams, phase)
        check_moved(m.sites, state.step, tasks, cache.watch)
        return _ThetaMove(m.first[0], m.sites, m.values, {}, moments.values, m.info, m.first, m.tuned)
    first: tuple[Evaluation, dict[str, Tensor]] | None = None
    moving = None if chain.momenta is None else underdamped.velocities(chain, tasks, values, streams.noise)
    kept: list[Tensor] | None = None
    for _ in range(settings.theta_steps_per_visit):
        before = None if chain.variates is None or streams.rows is None else streams.rows.get_state()
        if moving is not None:
            values = underdamped.half_step(state, chain, values, moving)
        run = program.run(state.phi, values, index, streams.rows)
        if first is None:
            stepping = run.without(settings.site_update)
            state = state._replace(tuned=step_adaptation.adapted(state, chain, stepping, phase))
        keep_graph = settings.phi_update != "gibbs"
        drift = run.drift(run.locals, cache.coupled, settings.n_inflate, keep_graph=keep_graph)
        if chain.variates is not None:
            drift, kept = corrected(state, chain, run, drift, streams, before, kept)
        norm = check_finite(drift, state.step, tasks, cache.watch)
        drift, clipped = _clipped(drift, norm, settings.max_grad_norm, wait=cache.watch is None)
        squares = {} if moving is not None else moments.of(run, drift.gradient)
        if settings.max_move is not None:
            drift, shortened = limited(run, drift, squares, settings)
            clipped = clipped | (shortened if cache.watch is not None else bool(shortened))
        first = first or (run, drift.gradient)
        sums: dict[str, Tensor] = {}
        if moving is not None:
            sites, moving = underdamped.end_step(state, chain, run, drift, moving, streams.noise)
        else:
            sites, sums = _moved_sites(state, chain, run, drift, squares, streams.noise)
        # A long vector with a finite gradient stays finite; looking at it would cost another pass over it.
        short = {name: value for name, value in sites.items() if run.locals[name].family not in structure.long}
        check_moved(short, state.step, tasks, cache.watch)
        values = regrouped(run, sites)
    eta = min(eta_of(state.tuned, settings, state.step, site.family) for site in stepping.locals.values())
    info = SGLDGibbsInfo(tasks, drift.log_likelihood, norm, eta, clipped, phase)
    assert first is not None
    beside: list[tuple[ThetaStore, list[Tensor] | Values]] = []
    if chain.momenta is not None and moving is not None:
        beside.append((chain.momenta, moving))
    if chain.variates is not None and kept is not None:
        beside.append((chain.variates.store, kept))
    return _ThetaMove(run, sites, values, sums, moments.values, info, first, state.tuned, tuple(beside))


class _Moments:
    """The preconditioner's mean squares by family: they move in the burn-in, and at the first sight of a family."""

    def __init__(self, state: SGLDGibbsState, chain: Chain, phase: Phase) -> None:
        self.values = dict(state.second_moment)
        self._structure, self._settings, self._adapts = chain.structure, chain.settings, phase == "burn-in"

    def of(self, run: Evaluation, gradients: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the mean square for each site that steps, its own gradient seen; none without a preconditioner.

        Args:
            run: of the block.
            gradients: by site. They count times the factor on the task's steps, so that one task's size does not rule
                the steps of the others.
        """
        decay, factors, found = self._settings.decay, self._settings.task_step_scale, {}
        if decay is None:
            return {}
        for name, site in run.locals.items():
            family = site.family
            if family in self._settings.site_update:  # solved before the others step
                continue
            if self._adapts or family not in self.values:
                gradient = gradients[name]
                if factors is not None:
                    gradient = factor_of(site, run.tasks, factors) * gradient
                square = mean_square(gradient, family, site.plate_dim, self._structure)
                self.values[family] = running_mean(self.values.get(family), square, decay)
            found[name] = self.values[family]
        return found


@span("pyro_lift.theta")
def _moved_sites(
    state: SGLDGibbsState,
    chain: Chain,
    run: Evaluation,
    drift: Drift,
    squares: Mapping[str, Tensor],
    noise: torch.Generator | None,
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Move every local site by its mover; return the values by site, and S by global site where it came along."""
    settings, structure = chain.settings, chain.structure
    moved, sums = {}, {}
    for name, site in run.locals.items():
        if site.family in settings.site_update:  # solved before the others step
            moved[name] = site.leaf.detach()
            continue
        move = Move(
            site,
            drift.gradient[name],
            drift.gaussian[name],
            factor_of(site, run.tasks, settings.task_step_scale)
            * eta_of(state.tuned, settings, state.step, site.family)
            * settings.site_step_scale.get(site.family, 1.0),
            settings.temperature * settings.site_temperature.get(site.family, 1.0),
            squares.get(name),
        )
        moved[name], S = mover_of(structure, site.family)(move, state, chain, noise)
        if S is not None:
            sums[structure.pair_of[site.family].global_site] = S
    return moved, sums


@span("pyro_lift.phi")
def _langevin_phi(
    state: SGLDGibbsState,
    chain: Chain,
    run: Evaluation,
    pull: Mapping[str, Tensor],
    noise: torch.Generator | None,
) -> dict[str, Tensor]:
    settings = chain.settings
    eta = settings.phi_eta(state.step)
    leaves = {name: site.leaf for name, site in run.globals.items()}
    # What pulls on phi beside the tasks: its own prior, and data observed outside the plate.
    rest = run.log_prior(run.globals) + sum(
        (settings.n_inflate * o.log_prob() for o in run.observed if not o.local), torch.zeros(())
    )
    own, phi = _gradients(rest, leaves), {}
    for name, leaf in leaves.items():
        drift = pull[name] + own[name]
        phi[name] = (
            leaf.detach() + 0.5 * eta * drift + (settings.temperature * eta) ** 0.5 * gaussian_noise(leaf, noise)
        )
    check_moved(phi, state.step, (), chain.cache.watch)
    return phi


@span("pyro_lift.phi")
def draw_globals(
    state: SGLDGibbsState,
    chain: Chain,
    sums: Mapping[str, Tensor],
    squares: dict[str, Tensor],
    noise: torch.Generator | None,
    shifts: Rows | None = None,
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Draw every global site exactly: the means given the scales, then the scales given the means.

    Args:
        state: of the chain; its phi is the one that theta_i have moved under.
        chain: what was set at set-up.
        sums: S.
        squares: Q around the state's phi.
        noise: of the draws.
        shifts: of phi and all theta together, which S has in it and Q does not see.

    Returns:
        All global sites, and Q around them.
    """
    structure = chain.structure
    phi = {**state.phi, **draw_phi(state, chain, sums, noise)}
    phi, regressed = _draw_regressions(chain, phi, squares, noise)
    if not structure.scales:
        return phi, {**squares, **regressed}
    centre = {name: value.double() for name, value in state.phi.items()}
    centre |= {name: centre[name] + shift.double() for name, shift in (shifts or {}).items()}
    squares = {**squares_around(structure, squares, sums, centre, phi), **regressed}
    if state.step >= structure.hold and all(known.complete for known in chain.cache.coefficients.values()):
        phi |= draw_scales(structure, phi, squares, chain.settings.temperature, noise)
        check_moved(phi, state.step, ())
    return phi, squares


def _draw_regressions(
    chain: Chain, phi: dict[str, Tensor], squares: Mapping[str, Tensor], noise: torch.Generator | None
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Draw the global sites of every regression; return all global sites, and the regressions' sums around them."""
    sums: dict[str, Tensor] = {}
    for family, level in chain.structure.regressions.items():
        at, known = level.at(chain.structure.scales, phi), chain.cache.coefficients[family]
        xi = gaussian_noise(level.prior_mean, noise)
        around = squares[level.cross], squares[level.square]
        drawn, around = regression.draw(at, known.gram, around, phi, chain.settings.temperature, xi)
        phi = {**phi, **drawn}
        sums |= {level.cross: around[0], level.square: around[1]}
    return phi, sums


def draw_phi(
    state: SGLDGibbsState, chain: Chain, sums: Mapping[str, Tensor], noise: torch.Generator | None
) -> dict[str, Tensor]:
    """Draw every paired global site exactly, given S (:func:`pyro_lift.inference.gibbs.conjugate.draw`)."""
    structure, T, draws = chain.structure, chain.settings.temperature, {}
    for name, pair in structure.pairs.items():
        S, phi, pair = sums[name], state.phi[name], pair.at(structure.scales, state.phi)
        if pair.family in structure.long:
            workspace = chain.cache.workspace(name, phi)
            draws[name] = long_vectors.draw_phi(workspace, pair, S, structure.num_tasks, T, noise, phi)
        else:
            draws[name] = conjugate.draw(pair, S, structure.num_tasks, T, gaussian_noise(phi, noise))
    return draws


def _pull_on_phi(
    state: SGLDGibbsState,
    chain: Chain,
    moved: _ThetaMove,
    sums: Mapping[str, Tensor],
    index: Tensor,
    streams: Streams,
) -> tuple[dict[str, Tensor], dict[str, Tensor], Tensor | None]:
    """Return J by global site as the Langevin step needs it, the accumulator's state, and the block's table row."""
    structure, settings, table = chain.structure, chain.settings, chain.cache.table
    if settings.phi_update == "gibbs":
        return {}, {}, None
    if settings.accumulator == "exact":
        pairs = structure.pairs
        return {k: exact(p, state.phi[k], sums[k], structure.num_tasks) for k, p in pairs.items()}, {}, None
    gradient = _conditional_gradient(state, chain, moved, index, streams)
    if settings.accumulator == "single":
        scale = structure.num_tasks / len(index) if settings.single_scale == "N" else 1.0
        return {k: scale * g for k, g in gradient.items()}, {}, None
    assert table is not None
    flat = torch.cat([g.reshape(-1) for g in gradient.values()])
    change = table.change(_block_of(structure, index), flat)
    parts = change.split([g.numel() for g in gradient.values()])
    J = {k: state.J[k] + part.view_as(state.J[k]) for k, part in zip(gradient, parts, strict=True)}
    return {k: v.to(state.phi[k].dtype) for k, v in J.items()}, J, flat


def _block_of(structure: Structure, index: Tensor) -> int:
    return int(index[0]) // structure.block_size


def _conditional_gradient(
    state: SGLDGibbsState, chain: Chain, moved: _ThetaMove, index: Tensor, streams: Streams
) -> dict[str, Tensor]:
    """Gradient in phi of the block's log p(theta_i | phi), and of p(D_i | theta_i, phi) where phi enters there."""
    run = moved.run
    if chain.cache.reruns:
        run = chain.program.run(state.phi, moved.values, index, streams.rows)
        total = run.log_prior(run.locals) + chain.settings.n_inflate * run.log_likelihood
    else:
        # The conditionals' parameters hang on phi alone: evaluate the same distributions at the moved theta.
        total = sum((site.log_prob_at(moved.sites[name]) for name, site in run.locals.items()), torch.zeros(()))
    return _gradients(total, {name: site.leaf for name, site in run.globals.items()})


def _gradients(total: Tensor, leaves: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Gradient by leaf; zero where the graph does not reach it, as where a task hangs on no global site."""
    if not total.requires_grad:
        return {name: torch.zeros_like(leaf) for name, leaf in leaves.items()}
    grads = torch.autograd.grad(total, list(leaves.values()), allow_unused=True, retain_graph=True)
    return {
        name: torch.zeros_like(leaf) if g is None else g for (name, leaf), g in zip(leaves.items(), grads, strict=True)
    }


def _updated_sums(state: SGLDGibbsState, structure: Structure, moved: _ThetaMove, before: Values) -> dict[str, Tensor]:
    """S + sum over the block of (new theta - old theta), in float64; some came with the move of theta."""
    updated = dict(moved.sums)
    for name, pair in structure.pairs.items():
        if name in updated:
            continue
        total = state.sums[name]
        for task, rows in moved.values.items():
            if not structure.exact and pair.family not in rows:
                continue  # nothing rests on S then, and this task has no theta of the pair
            change = rows[pair.family].double() - before[task][pair.family].double()
            if task is None:
                change = change.sum(moved.run.locals[pair.family].plate_dim)
            if structure.exact or change.numel() == total.numel():
                total = total + change.reshape(total.shape)
        updated[name] = total
    return updated


def updated_squares(
    state: SGLDGibbsState, structure: Structure, run: Evaluation, after: Values, before: Values
) -> dict[str, Tensor]:
    """Q + sum over the block of (new - phi)^2 - (old - phi)^2, around the state's phi, in float64."""
    updated = {}
    for name, total in state.squares.items():
        if name not in structure.pairs:
            continue  # of a regression
        family, phi = structure.pairs[name].family, state.phi[name].double()
        for task, rows in after.items():
            new, old = rows[family].double(), before[task][family].double()
            if structure.pairs[name].dense is not None:
                new, old = (new - phi).reshape(-1, len(phi)), (old - phi).reshape(-1, len(phi))
                total = total + new.T @ new - old.T @ old
                continue
            change = (new - old) * (new + old - 2.0 * phi)
            if task is None:
                change = change.sum(run.locals[family].plate_dim)
            total = (total + change.reshape(total.shape)).clamp_min(0.0)
        updated[name] = total
    return updated


def _clipped(drift: Drift, norm: Tensor, limit: float | None, wait: bool) -> tuple[Drift, bool | Tensor]:
    """Likelihood gradient scaled down to a norm of at most ``limit``, and whether it was; known at once or later."""
    if limit is None or (wait and norm <= limit):
        return drift, False
    scale = limit / norm if wait else (limit / norm).clamp_max(1.0)
    gradient = {name: g * scale for name, g in drift.gradient.items()}
    return drift._replace(gradient=gradient), True if wait else norm > limit

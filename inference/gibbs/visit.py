"""SGLD-Gibbs (Eq. 9-11): one visit moves a block of theta_i by SGLD and phi by an exact or a Langevin draw.

The paper's loop is phi, theta_i, J, phi, theta_i, J, ...; a visit here is theta_i, J, phi. It is the same loop entered
one phase later, and lets one run of the program serve a whole visit: the gradient for theta_i, the conditional
p(theta_i | phi) for J and the prior of phi all belong to the same phi.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from pyro_lift.inference.gibbs import conjugate
from pyro_lift.inference.gibbs.accumulator import exact
from pyro_lift.inference.gibbs.conjugate import NormalPair
from pyro_lift.inference.gibbs.long_vectors import Workspace, is_flat, mean_root, move_theta
from pyro_lift.inference.gibbs.long_vectors import draw_phi as draw_flat
from pyro_lift.inference.gibbs.state import (
    Settings,
    SGLDGibbsInfo,
    SGLDGibbsState,
    Structure,
    first_visit,
    per_coordinate,
    plate_dim_of,
    regrouped,
    task_rows,
    task_values,
)
from pyro_lift.inference.gibbs.warmup import sgd_step
from pyro_lift.inference.program import Evaluation, Program, Rows
from pyro_lift.inference.sgld import (
    INTEGRATORS,
    Drift,
    check_finite,
    check_moved,
    gaussian_noise,
    precondition,
    running_mean,
)
from pyro_lift.inference.stores.store import ThetaStore

__all__ = ["draw_phi", "step"]


def step(
    state: SGLDGibbsState,
    program: Program,
    structure: Structure,
    store: ThetaStore,
    index: Tensor,
    settings: Settings,
    *,
    phase: Literal["sgd", "burn-in", "sample"] = "sample",
    generator: torch.Generator | None = None,
    noise_generator: torch.Generator | None = None,
    move_phi: bool = True,
) -> tuple[SGLDGibbsState, SGLDGibbsInfo]:
    """One visit to the block of tasks ``index``.

    Nothing is kept of a visit that fails: state, store and table change only at its end. A state may be held for one
    visit more; where the vectors are long, the memory of its S is used again after that.

    Args:
        generator: source of minibatch indices (host).
        noise_generator: source of noise, on the values' device.
        move_phi: whether phi is drawn; not where other passes' changes of S are still to come.

    Raises:
        DivergedError: a loss or gradient that is not finite.
    """
    tasks = tuple(index.tolist())
    values: Mapping[int | None, Rows] | None = task_values(structure, store, tasks)
    if values is None:
        values = first_visit(state, program, structure, store, index, generator)
    if phase == "sgd":
        return sgd_step(state, program, structure, store, index, values, settings, generator)
    return _gibbs_step(
        state, program, structure, store, index, values, settings, phase, generator, noise_generator, move_phi
    )


def _gibbs_step(
    state: SGLDGibbsState,
    program: Program,
    structure: Structure,
    store: ThetaStore,
    index: Tensor,
    values: Mapping[int | None, Rows],
    settings: Settings,
    phase: str,
    generator: torch.Generator | None,
    noise_generator: torch.Generator | None,
    move_phi: bool,
) -> tuple[SGLDGibbsState, SGLDGibbsInfo]:
    tasks = tuple(index.tolist())
    eta = settings.step_size(state.step)
    moments = dict(state.second_moment)
    start = values
    gibbs = settings.phi_update == "gibbs"

    # (10)  theta_i | phi, D_i: one or more steps of SGLD
    for _ in range(settings.theta_steps_per_visit):
        run = program.run(state.phi, values, index, generator)
        drift = run.drift(run.locals, structure.coupled, settings.n_inflate, keep_graph=not gibbs)
        norm = check_finite(drift, state.step, tasks)
        drift, refused = _clipped(drift, norm, settings.max_grad_norm)
        flat = _flat_pairs(run, structure, settings)
        adapting = phase == "burn-in"
        moved, known = _move_theta(
            run, drift, eta, settings, moments, adapting, structure, noise_generator, flat, state.sums
        )
        check_moved({name: value for name, value in moved.items() if name not in flat}, state.step, tasks)
        values = regrouped(run, moved)

    # (11)  what the tasks pull phi with: S and J, one block's part replaced
    sums = _updated_sums(state.sums, structure, run, start, values, known)
    pull, J, stored = _pull_on_phi(state, program, structure, settings, run, moved, values, index, sums, generator)

    # (9)  phi | theta_1..N
    phi = state.phi
    if move_phi:
        phi = _move_phi(state, structure, settings, run, sums, pull, noise_generator)

    store.write(tasks, task_rows(structure, tasks, values))
    if stored is not None and structure.table is not None:
        structure.table.store(_block_of(structure, index), stored)
    info = SGLDGibbsInfo(tasks, drift.log_likelihood, norm, eta, refused, phase)
    return SGLDGibbsState(state.step + 1, phi, sums, J, moments, {}), info


def _flat_pairs(run: Evaluation, structure: Structure, settings: Settings) -> dict[str, NormalPair]:
    """The local sites that one visit moves piece by piece together with S and phi: long, paired, one task's own."""
    pairs = structure.pair_of
    return {
        name: pairs[site.family]
        for name, site in run.locals.items()
        if site.family in pairs and _goes_flat(structure, settings, pairs[site.family], site.leaf)
    }


def _goes_flat(structure: Structure, settings: Settings, pair: NormalPair, value: Tensor) -> bool:
    plain = settings.phi_update != "gibbs" or settings.integrator != "exponential" or structure.pass_size > 1
    if plain or settings.theta_steps_per_visit > 1 or not structure.sequential or pair.family in structure.coupled:
        return False
    return is_flat(pair, value)


def _move_theta(
    run: Evaluation,
    drift: Drift,
    eta: float,
    settings: Settings,
    moments: dict[str, Tensor],
    adapt: bool,
    structure: Structure,
    generator: torch.Generator | None,
    flat: Mapping[str, NormalPair],
    sums: Mapping[str, Tensor],
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The moved local sites by name, and S of those pairs whose S came with the move."""
    moved, known = {}, {}
    for name, site in run.locals.items():
        gradient = drift.gradient[name]
        if settings.decay is not None and (adapt or site.family not in moments):
            square = per_coordinate(gradient.square(), site.family, site.plate_dim, structure)
            moments[site.family] = running_mean(moments.get(site.family), square, settings.decay)
        step_size = eta * settings.site_step_scale.get(site.family, 1.0)
        temperature = settings.temperature * settings.site_temperature.get(site.family, 1.0)
        if name in flat:
            pair, moment = flat[name], None if settings.decay is None else moments[site.family]
            workspace = structure.workspace(pair.global_site, site.leaf.detach())
            moved[name], known[pair.global_site] = move_theta(
                workspace,
                site.leaf.detach(),
                run.globals[pair.global_site].leaf.detach(),
                gradient,
                sums[pair.global_site],
                1.0 / float(pair.local_variance),
                step_size=step_size,
                temperature=temperature,
                generator=generator,
                second_moment=moment,
                damping=0.0 if moment is None else _damping(settings, moment, workspace),
            )
            continue
        moved[name] = INTEGRATORS[settings.integrator](
            site.leaf.detach(),
            gradient,
            drift.gaussian[name],
            step_size=step_size,
            temperature=temperature,
            noise=gaussian_noise(site.leaf, generator),
            preconditioner=1.0 if settings.decay is None else precondition(moments[site.family], settings.damping),
        )
    return moved, known


def _damping(settings: Settings, moment: Tensor, workspace: Workspace) -> float:
    """What the preconditioner adds to the root, as :func:`~pyro_lift.inference.sgld.precondition` does."""
    if workspace.root_of is not moment:  # frozen after the warm-up, it needs no second look
        workspace.root_of, workspace.root = moment, mean_root(moment, workspace)
    return settings.damping * workspace.root + torch.finfo(moment.dtype).tiny


def _move_phi(
    state: SGLDGibbsState,
    structure: Structure,
    settings: Settings,
    run: Evaluation,
    sums: Mapping[str, Tensor],
    pull: Mapping[str, Tensor],
    generator: torch.Generator | None,
) -> dict[str, Tensor]:
    if settings.phi_update == "gibbs":
        return draw_phi(state, structure, settings, sums, generator)
    eta = settings.phi_step_size(state.step)
    leaves = {name: site.leaf for name, site in run.globals.items()}
    # What pulls on phi beside the tasks: its own prior, and data observed outside the plate.
    rest = run.log_prior(run.globals) + sum(
        (settings.n_inflate * o.log_prob() for o in run.observed if not o.local), torch.zeros(())
    )
    grads = torch.autograd.grad(rest, list(leaves.values()), allow_unused=True, retain_graph=True)
    phi = {}
    for (name, leaf), own in zip(leaves.items(), grads, strict=True):
        drift = pull[name] if own is None else pull[name] + own
        noise = gaussian_noise(leaf, generator)
        phi[name] = leaf.detach() + 0.5 * eta * drift + (settings.temperature * eta) ** 0.5 * noise
    check_moved(phi, state.step, ())
    return phi


def draw_phi(
    state: SGLDGibbsState,
    structure: Structure,
    settings: Settings,
    sums: Mapping[str, Tensor],
    generator: torch.Generator | None,
) -> dict[str, Tensor]:
    """The exact draw of every paired global site, given S."""
    return {name: _draw(name, state, structure, settings, sums[name], generator) for name in structure.pairs}


def _draw(
    name: str,
    state: SGLDGibbsState,
    structure: Structure,
    settings: Settings,
    S: Tensor,
    generator: torch.Generator | None,
) -> Tensor:
    pair, phi, T = structure.pairs[name], state.phi[name], settings.temperature
    if _goes_flat(structure, settings, pair, phi):
        return draw_flat(structure.workspace(name, phi), pair, S, structure.num_tasks, T, generator, phi)
    return conjugate.draw(pair, S, structure.num_tasks, T, gaussian_noise(phi, generator))


def _pull_on_phi(
    state: SGLDGibbsState,
    program: Program,
    structure: Structure,
    settings: Settings,
    run: Evaluation,
    moved: Mapping[str, Tensor],
    values: Mapping[int | None, Rows],
    index: Tensor,
    sums: Mapping[str, Tensor],
    generator: torch.Generator | None,
) -> tuple[dict[str, Tensor], dict[str, Tensor], Tensor | None]:
    """J by global site as the Langevin step needs it, the accumulator's state, and the block's row of the table."""
    if settings.phi_update == "gibbs":
        return {}, {}, None
    if settings.accumulator == "exact":
        pairs = structure.pairs
        return {k: exact(p, state.phi[k], sums[k], structure.num_tasks) for k, p in pairs.items()}, {}, None
    gradient = _conditional_gradient(state, program, structure, settings, run, moved, values, index, generator)
    if settings.accumulator == "single":
        scale = structure.num_tasks / len(index) if settings.single_scale == "N" else 1.0
        return {k: scale * g for k, g in gradient.items()}, {}, None
    assert structure.table is not None
    flat = torch.cat([g.reshape(-1) for g in gradient.values()])
    change = structure.table.change(_block_of(structure, index), flat)
    parts = change.split([g.numel() for g in gradient.values()])
    J = {k: state.J[k] + part.view_as(state.J[k]) for k, part in zip(gradient, parts, strict=True)}
    return {k: v.to(state.phi[k].dtype) for k, v in J.items()}, J, flat


def _block_of(structure: Structure, index: Tensor) -> int:
    return int(index[0]) // structure.block_size


def _conditional_gradient(
    state: SGLDGibbsState,
    program: Program,
    structure: Structure,
    settings: Settings,
    run: Evaluation,
    moved: Mapping[str, Tensor],
    values: Mapping[int | None, Rows],
    index: Tensor,
    generator: torch.Generator | None,
) -> dict[str, Tensor]:
    """Gradient in phi of the block's log p(theta_i | phi), and of p(D_i | theta_i, phi) where phi enters there."""
    if structure.reruns:
        run = program.run(state.phi, values, index, generator)
        total = run.log_prior(run.locals) + settings.n_inflate * run.log_likelihood
    else:
        # The conditionals' parameters hang on phi alone: evaluate the same distributions at the moved theta.
        total = sum((site.log_prob_at(moved[name]) for name, site in run.locals.items()), torch.zeros(()))
    leaves = {name: site.leaf for name, site in run.globals.items()}
    grads = torch.autograd.grad(total, list(leaves.values()), allow_unused=True, retain_graph=True)
    return {
        name: torch.zeros_like(leaf) if g is None else g for (name, leaf), g in zip(leaves.items(), grads, strict=True)
    }


def _updated_sums(
    sums: Mapping[str, Tensor],
    structure: Structure,
    run: Evaluation,
    before: Mapping[int | None, Rows],
    after: Mapping[int | None, Rows],
    known: Mapping[str, Tensor],
) -> dict[str, Tensor]:
    """S + sum over the block of (new theta - old theta), in float64; some came with the move of theta."""
    updated = dict(known)
    for name, pair in structure.pairs.items():
        if name in known:
            continue
        total = sums[name]
        for task, rows in after.items():
            change = rows[pair.family].double() - before[task][pair.family].double()
            if task is None:
                change = change.sum(plate_dim_of(run, pair.family))
            total = total + change
        updated[name] = total
    return updated


def _clipped(drift: Drift, norm: Tensor, limit: float | None) -> tuple[Drift, bool]:
    """Likelihood gradient scaled down to a norm of at most ``limit``, and whether it was."""
    if limit is None or norm <= limit:
        return drift, False
    gradient = {name: g * (limit / norm) for name, g in drift.gradient.items()}
    return drift._replace(gradient=gradient), True


# ------------------------------------------------------------------------------------------------ SGD warm-up


# ------------------------------------------------------------------------------------------------ rows and values

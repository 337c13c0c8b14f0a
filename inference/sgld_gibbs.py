"""SGLD-Gibbs (Eq. 9-11): one visit moves a block of theta_i by SGLD and phi by an exact or a Langevin draw.

The paper's loop is phi, theta_i, J, phi, theta_i, J, ...; a visit here is theta_i, J, phi. It is the same loop entered
one phase later, and lets one run of the program serve a whole visit: the gradient for theta_i, the conditional
p(theta_i | phi) for J and the prior of phi all belong to the same phi.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from pyro_lift.inference import conjugate
from pyro_lift.inference.accumulator import Accumulator, GradientTable, exact
from pyro_lift.inference.conjugate import NormalPair, values_of
from pyro_lift.inference.flat_visit import Workspace, is_flat, mean_root, move_theta
from pyro_lift.inference.flat_visit import draw_phi as draw_flat
from pyro_lift.inference.program import Evaluation, LocalSite, Program, Rows
from pyro_lift.inference.schedules import Schedule, constant
from pyro_lift.inference.sgld import (
    INTEGRATORS,
    DivergedError,
    Drift,
    Integrator,
    check_finite,
    gaussian_noise,
    precondition,
    running_mean,
    update_second_moment,
)
from pyro_lift.inference.store import ThetaStore

__all__ = [
    "PhiUpdate",
    "SGDGradient",
    "SGLDGibbsInfo",
    "SGLDGibbsState",
    "Settings",
    "Structure",
    "draw_phi",
    "init",
    "sgd_gradient",
    "sgd_update",
    "step",
    "task_values",
]

PhiUpdate = Literal["gibbs", "langevin"]


class SGLDGibbsState(NamedTuple):
    """What the next visit needs beside the store of theta_i and the table of gradients.

    Attributes:
        step: visits made.
        phi: global sites, unconstrained.
        sums: S per normal pair, in float64.
        J: sum of the stored gradients per global site, in float64 (``accumulator="table"`` only).
        second_moment: running mean square of the likelihood gradient per local family.
        momentum: running mean of the gradient per normal pair, in the SGD warm-up only.
    """

    step: int
    phi: dict[str, Tensor]
    sums: dict[str, Tensor]
    J: dict[str, Tensor]
    second_moment: dict[str, Tensor]
    momentum: dict[str, Tensor]


class SGLDGibbsInfo(NamedTuple):
    """What a reader of the log wants to know of one visit."""

    tasks: tuple[int, ...]
    log_likelihood: Tensor
    grad_norm: Tensor
    step_size: float
    refused: bool
    phase: str


@dataclass(frozen=True)
class Settings:
    """How a visit moves; see :class:`pyro_lift.inference.kernels.SGLDGibbs` for each."""

    step_size: Schedule
    phi_step_size: Schedule
    phi_update: PhiUpdate = "gibbs"
    accumulator: Accumulator = "exact"
    single_scale: Literal["N", "1"] = "N"
    integrator: Integrator = "exponential"
    temperature: float = 1.0
    n_inflate: float = 1.0
    decay: float | None = None
    damping: float = 0.1
    theta_steps_per_visit: int = 1
    max_grad_norm: float | None = None
    sgd_step_size: Schedule = field(default_factory=lambda: constant(1e-3))
    site_step_scale: Mapping[str, float] = field(default_factory=dict)
    site_temperature: Mapping[str, float] = field(default_factory=dict)


@dataclass
class Structure:
    """What was learned about the program at set-up.

    Attributes:
        num_tasks: N.
        block_size: B.
        sequential: whether the task plate is iterated over (sites named by task) or vectorised.
        pairs: global sites that are the mean of one normal local family.
        reasons: for each other global site, why not.
        coupled: local families whose distribution depends on another local site.
        reruns: whether the gradient of phi needs a second run after theta has moved: the likelihood depends on a
            global site directly, or local sites depend on each other.
        start: unconstrained starting value of each pair's local family.
        layouts: what a task's row is made of; filled at the first visit.
        workspaces: buffers per pair whose vectors are long (:mod:`~pyro_lift.inference.flat_visit`).
        pass_size: tasks that one run of the program takes; fewer than B where several runs make a visit, 0 for B.
    """

    num_tasks: int
    block_size: int
    sequential: bool
    pairs: dict[str, NormalPair]
    reasons: dict[str, str]
    coupled: frozenset[str]
    reruns: bool
    start: dict[str, Tensor]
    layouts: dict[int | None, tuple[LocalSite, ...]] = field(default_factory=dict)
    table: GradientTable | None = None
    workspaces: dict[str, Workspace] = field(default_factory=dict)
    pass_size: int = 0

    def __post_init__(self) -> None:
        self.pass_size = self.pass_size or self.block_size

    def workspace(self, site: str, like: Tensor) -> Workspace:
        """The buffers of one pair."""
        if site not in self.workspaces:
            self.workspaces[site] = Workspace(like)
        return self.workspaces[site]

    @property
    def pair_of(self) -> dict[str, NormalPair]:
        """The pairs by local family."""
        return {pair.family: pair for pair in self.pairs.values()}


def init(structure: Structure, phi: Rows) -> SGLDGibbsState:
    """A chain whose theta_i all stand at phi's own start: S = N phi, and J = 0 is exactly right."""
    sums = {name: structure.num_tasks * structure.start[pair.family].double() for name, pair in structure.pairs.items()}
    J = {name: torch.zeros_like(value, dtype=torch.float64) for name, value in phi.items()}
    return SGLDGibbsState(0, dict(phi), sums, J if structure.table is not None else {}, {}, {})


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
        values = _first_visit(state, program, structure, store, index, generator)
    if phase == "sgd":
        return _sgd_step(state, program, structure, store, index, values, settings, generator)
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
        _check_moved({name: value for name, value in moved.items() if name not in flat}, state.step, tasks)
        values = _regrouped(run, moved)

    # (11)  what the tasks pull phi with: S and J, one block's part replaced
    sums = _updated_sums(state.sums, structure, run, start, values, known)
    pull, J, stored = _pull_on_phi(state, program, structure, settings, run, moved, values, index, sums, generator)

    # (9)  phi | theta_1..N
    phi = state.phi
    if move_phi:
        phi = _move_phi(state, structure, settings, run, sums, pull, noise_generator)

    store.write(tasks, _rows(structure, tasks, values))
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
            square = _per_coordinate(gradient.square(), site.family, site.plate_dim, structure)
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


def _per_coordinate(square: Tensor, family: str, plate_dim: int | None, structure: Structure) -> Tensor:
    """Mean square by coordinate, over the block; by family alone where the tasks' shapes may differ."""
    if structure.sequential:
        return square if family in structure.pair_of else square.mean()
    return square.mean(plate_dim, keepdim=True)


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
    _check_moved(phi, state.step, ())
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
                change = change.sum(_plate_dim(run, pair.family))
            total = total + change
        updated[name] = total
    return updated


def _plate_dim(run: Evaluation, family: str) -> int:
    plate_dim = run.locals[family].plate_dim
    assert plate_dim is not None
    return plate_dim


def _regrouped(run: Evaluation, moved: Mapping[str, Tensor]) -> dict[int | None, dict[str, Tensor]]:
    """Values by site name to values by task and family."""
    grouped: dict[int | None, dict[str, Tensor]] = {}
    for name, site in run.locals.items():
        grouped.setdefault(site.task, {})[site.family] = moved[name]
    return grouped


def _clipped(drift: Drift, norm: Tensor, limit: float | None) -> tuple[Drift, bool]:
    """Likelihood gradient scaled down to a norm of at most ``limit``, and whether it was."""
    if limit is None or norm <= limit:
        return drift, False
    gradient = {name: g * (limit / norm) for name, g in drift.gradient.items()}
    return drift._replace(gradient=gradient), True


def _check_moved(moved: Mapping[str, Tensor], step: int, tasks: tuple[int, ...]) -> None:
    for name, value in moved.items():
        if not torch.isfinite(value).all():
            where = f"step {step}" + (f", task {', '.join(map(str, tasks))}" if tasks else "")
            raise DivergedError(
                f"{where}: the site {name!r} left the finite numbers. The chain has stopped at its last good state. "
                "Use a smaller step_size.",
                step,
                tasks,
            )


# ------------------------------------------------------------------------------------------------ SGD warm-up


def _sgd_step(
    state: SGLDGibbsState,
    program: Program,
    structure: Structure,
    store: ThetaStore,
    index: Tensor,
    values: Mapping[int | None, Rows],
    settings: Settings,
    generator: torch.Generator | None,
) -> tuple[SGLDGibbsState, SGLDGibbsInfo]:
    """One step of Adam on one vector shared by all tasks, without prior and noise; other local sites follow alone.

    With ``theta_i := phi`` for all i, it is joint training; the chain then starts where S = N phi exactly.
    """
    found = _sgd_gradient(state, program, structure, index, values, settings, generator)
    lr = settings.sgd_step_size(state.step)
    moments = {**state.second_moment, **found.second_moment}
    after = sgd_update(state, structure, found.gradient, moments, lr, found.info.tasks)
    store.write(found.info.tasks, found.rows)
    return after, found.info


class SGDGradient(NamedTuple):
    """What one pass of the joint training finds.

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


def sgd_gradient(
    state: SGLDGibbsState,
    program: Program,
    structure: Structure,
    store: ThetaStore,
    index: Tensor,
    settings: Settings,
    *,
    generator: torch.Generator | None = None,
) -> SGDGradient:
    """One pass of the joint training, without its step; the tasks' rows are in the store when it returns."""
    values: Mapping[int | None, Rows] | None = task_values(structure, store, tuple(index.tolist()))
    if values is None:
        values = _first_visit(state, program, structure, store, index, generator)
    found = _sgd_gradient(state, program, structure, index, values, settings, generator)
    store.write(found.info.tasks, found.rows)
    return found


def _sgd_gradient(
    state: SGLDGibbsState,
    program: Program,
    structure: Structure,
    index: Tensor,
    values: Mapping[int | None, Rows],
    settings: Settings,
    generator: torch.Generator | None,
) -> SGDGradient:
    tasks = tuple(index.tolist())
    lr = settings.sgd_step_size(state.step)
    shared = {task: _with_shared(structure, state, rows, len(tasks), task is None) for task, rows in values.items()}
    run = program.run(state.phi, shared, index, generator)
    drift = run.drift(run.locals, structure.coupled, settings.n_inflate)
    norm = check_finite(drift, state.step, tasks)
    moments = dict(state.second_moment)
    total: dict[str, Tensor] = {}
    moved = {}
    for name, site in run.locals.items():
        gradient = drift.gradient[name]
        if site.family in structure.pair_of:
            part = gradient.sum(site.plate_dim) if site.task is None else gradient
            shared_site = structure.pair_of[site.family].global_site
            total[shared_site] = total[shared_site] + part if shared_site in total else part
            moved[name] = site.leaf.detach()
        else:
            square = _per_coordinate(gradient.square(), site.family, site.plate_dim, structure)
            moments[site.family] = update_second_moment(moments.get(site.family), square.sqrt(), ADAM_DECAY)
            rate = lr * settings.site_step_scale.get(site.family, 1.0)
            moved[name] = site.leaf.detach() + rate * gradient * precondition(moments[site.family], 1e-3)
    rows = _rows(structure, tasks, _regrouped(run, moved))
    info = SGLDGibbsInfo(tasks, drift.log_likelihood, norm, lr, False, "sgd")
    others = {family: v for family, v in moments.items() if family not in structure.pair_of}
    return SGDGradient(total, others, rows, info)


def sgd_update(
    state: SGLDGibbsState,
    structure: Structure,
    gradient: Mapping[str, Tensor],
    second_moment: Mapping[str, Tensor],
    lr: float,
    tasks: tuple[int, ...],
) -> SGLDGibbsState:
    """The step of Adam on the shared vector.

    Args:
        gradient: by global site, summed over the block.
        second_moment: running mean squares of all local families; those of the pairs are moved here.
        lr: learning rate.
        tasks: of the block, for the error.

    Raises:
        DivergedError: a vector that left the finite numbers.
    """
    phi, momentum, moments = dict(state.phi), dict(state.momentum), dict(second_moment)
    for name, total in gradient.items():
        family = structure.pairs[name].family
        phi[name], momentum[name], moments[family] = _adam(
            phi[name], total.to(phi[name].dtype), momentum.get(name), moments.get(family), state.step, lr
        )
    _check_moved(phi, state.step, tasks)
    return SGLDGibbsState(state.step + 1, phi, state.sums, state.J, moments, momentum)


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


def _with_shared(structure: Structure, state: SGLDGibbsState, rows: Rows, block: int, stacked: bool) -> Rows:
    """The block's rows with every paired family put at phi."""
    shared = dict(rows)
    for family, pair in structure.pair_of.items():
        phi = state.phi[pair.global_site]
        shared[family] = torch.broadcast_to(phi, rows[family].shape) if stacked else phi
    return shared


def end_of_sgd(state: SGLDGibbsState, structure: Structure, store: ThetaStore) -> SGLDGibbsState:
    """theta_i := phi for every task, S := N phi: where the shared training ended, the chain begins."""
    for name, pair in structure.pairs.items():
        structure.start[pair.family] = state.phi[name].clone()
    for task in list(store.tasks()):
        values = task_values(structure, store, (task,))
        assert values is not None
        store.write((task,), _rows(structure, (task,), {k: _at_start(structure, v) for k, v in values.items()}))
    fresh = init(structure, state.phi)
    return fresh._replace(step=state.step, second_moment=state.second_moment)


def _at_start(structure: Structure, rows: Rows) -> Rows:
    return {
        family: torch.broadcast_to(structure.start[family], value.shape).clone() if family in structure.start else value
        for family, value in rows.items()
    }


# ------------------------------------------------------------------------------------------------ rows and values


def task_values(
    structure: Structure, store: ThetaStore, tasks: tuple[int, ...]
) -> dict[int | None, dict[str, Tensor]] | None:
    """The block's local values by task and family; None when one of its tasks was never visited."""
    if not all(store.has(task) for task in tasks):
        return None
    rows = store.read(tasks)
    if structure.sequential:
        return {task: _unpacked(structure.layouts[task], row) for task, row in zip(tasks, rows, strict=True)}
    layout = structure.layouts[None]
    parts = [_unpacked(layout, row) for row in rows]
    return {None: {s.family: torch.stack([part[s.family] for part in parts], s.plate_dim) for s in layout}}


def _unpacked(layout: tuple[LocalSite, ...], row: Tensor) -> dict[str, Tensor]:
    if len(layout) == 1:
        return {layout[0].family: row.view(layout[0].shape)}
    parts = row.split([site.shape.numel() for site in layout])
    return {site.family: part.view(site.shape) for site, part in zip(layout, parts, strict=True)}


def _rows(structure: Structure, tasks: tuple[int, ...], values: Mapping[int | None, Rows]) -> list[Tensor]:
    rows = []
    for k, task in enumerate(tasks):
        layout = structure.layouts[task if structure.sequential else None]
        source = values[task if structure.sequential else None]
        parts = [
            (source[s.family] if structure.sequential else source[s.family].select(s.plate_dim, k)).reshape(-1)
            for s in layout
        ]
        # A task's only site is a vector of its own already; a block's rows are views of one.
        alone = parts[0] if structure.sequential else parts[0].clone()
        rows.append(alone if len(parts) == 1 else torch.cat(parts))
    return rows


def _first_visit(
    state: SGLDGibbsState,
    program: Program,
    structure: Structure,
    store: ThetaStore,
    index: Tensor,
    generator: torch.Generator | None,
) -> Mapping[int | None, Rows]:
    """Learn the block's layout and give its new tasks their start: phi's start for paired families."""
    tasks = tuple(index.tolist())
    run = program.run(state.phi, {}, index, generator, want_grad=False)
    for pair in structure.pairs.values():
        conjugate.check_pair(pair, run)
    for site in run.locals.values():
        dim = -1 if site.plate_dim is None else site.plate_dim
        shape = site.leaf.shape if structure.sequential else site.leaf.select(dim, 0).shape
        known = structure.layouts.get(site.task, ())
        if site.family not in {s.family for s in known}:
            structure.layouts[site.task] = (*known, LocalSite(site.family, shape, dim))
    values = {task: _at_start(structure, rows) for task, rows in values_of(run).items()}
    rows = _rows(structure, tasks, values)
    new = [k for k, task in enumerate(tasks) if not store.has(task)]
    store.write([tasks[k] for k in new], [rows[k] for k in new])
    found = task_values(structure, store, tasks)
    assert found is not None
    return found

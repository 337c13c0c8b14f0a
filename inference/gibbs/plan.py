"""The plan of a chain: a program is read once, checked, and given its structure, step sizes, store and start."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyro_lift.inference.admission import (
    NotExactError,
    check_block,
    check_fixed_supports,
    needs_rerun,
    refuse_discrete,
    site_transforms,
    start_values,
)
from pyro_lift.inference.data_support import check_start, check_values
from pyro_lift.inference.dependence import coupled_families, links_of
from pyro_lift.inference.gibbs import shared_visit
from pyro_lift.inference.gibbs.accumulator import GradientTable, langevin_limit
from pyro_lift.inference.gibbs.blocks import Request, Scan, block_size_of
from pyro_lift.inference.gibbs.conjugate import find_pairs
from pyro_lift.inference.gibbs.control_variates import check_control_variates
from pyro_lift.inference.gibbs.gaussian_reading import exact_theta
from pyro_lift.inference.gibbs.movers import long_families
from pyro_lift.inference.gibbs.normal_sites import listed
from pyro_lift.inference.gibbs.open_ways import open_ways
from pyro_lift.inference.gibbs.regression import Coefficients
from pyro_lift.inference.gibbs.scaling import can_scale
from pyro_lift.inference.gibbs.state import Cache, Chain, Settings, SGLDGibbsState, Structure, init
from pyro_lift.inference.gibbs.stores_beside import with_stores_beside
from pyro_lift.inference.gibbs.table_step import TABLE_SHARE, measured_table_limit
from pyro_lift.inference.gibbs.task_factors import check_factors, largest_factor
from pyro_lift.inference.gibbs.translation_plan import TranslationRequest, check_translation, plan_translation
from pyro_lift.inference.gibbs.underdamped import check_underdamped
from pyro_lift.inference.gibbs.whole_likelihood import check_metropolis, check_solved
from pyro_lift.inference.ignored_index import check_index_used
from pyro_lift.inference.kernel import log
from pyro_lift.inference.mistakes import (
    MissingPlateError,
    check_data,
    check_program,
    missing_plate,
    nested_hint,
    outside_hint,
    say_single_task,
)
from pyro_lift.inference.program import Evaluation, Program
from pyro_lift.inference.schedules import Schedule, constant
from pyro_lift.inference.stability import (
    DEFAULT_SHARE,
    check_curvature,
    check_prior_steps,
    curves_down,
    default_step,
    measured_curvature,
    step_too_large,
)
from pyro_lift.inference.stores.store import ThetaStore, check_own_store, make_store

__all__ = ["Plan", "Request", "Scan", "Start", "check_plate", "plan", "row_bytes_of", "store_for"]

#: Starting values of global sites, given the program, its density for the first tasks, eta if known, and the power.
Start = Callable[[Program, Callable[[dict[str, Tensor]], Evaluation], float | None, float], dict[str, Tensor]]
#: Blocks whose gradients are looked at before a start is taken for a saddle.
SADDLE_BLOCKS = 16
#: Rounds of the tasks before an unknown scale is drawn: theta_i start at phi, and a scale drawn from what is not spread
#: yet would be near zero and hold them there.
HELD_ROUNDS = 10


class Plan(NamedTuple):
    """All that set-up gives.

    Attributes:
        chain: what every visit needs.
        state: where the chain begins.
        transforms: from constrained to unconstrained space, by global site.
        start_log_likelihood: of the first block, at the start.
        report: step sizes without dimensions.
        row_bytes: of one task's theta.
        wider: the option by which a visit takes more tasks.
        ways: other options that this program could take (:mod:`~pyro_lift.inference.gibbs.open_ways`).
    """

    chain: Chain
    state: SGLDGibbsState
    transforms: dict[str, Any]
    start_log_likelihood: float
    report: dict[str, float | str]
    row_bytes: int
    wider: str = "block_size"
    ways: tuple[str, ...] = ()


def plan(
    program: Program, request: Request, settings: Settings, start: Start, generator: torch.Generator | None
) -> Plan:
    """Read a program, check it and the step sizes, and make a chain at its start.

    Args:
        program: the model with its arguments.
        request: options of set-up.
        settings: options of a visit; step sizes that are None are chosen here.
        start: gives the unconstrained starting values of global sites, with the means to look at others.
        generator: of minibatches.

    Raises:
        ValueError: a program that the kernel cannot sample, or a step size past its limit; with the way out.
        DivergedError: a density that is not finite at the start.
    """
    peeked, subsampled = program.peek(generator)
    check_program(program, peeked, says=request.says)
    check_plate(program, request.plate, peeked)
    if request.says:
        say_single_task(request.plate, peeked)
    refuse_discrete(peeked)
    num_tasks, declared = peeked.plates[request.plate]
    sequential = any(site.task is not None for site in peeked.locals.values())
    block = block_size_of(request, peeked, subsampled=subsampled[request.plate], sequential=sequential)
    pass_size = min(declared, block) if request.distributed else block
    index = torch.arange(pass_size)
    sgld_eta = None if settings.step_size is None or settings.decay is not None else settings.eta(0)
    preset = start(program, lambda values: program.run(values, {}, index, generator), sgld_eta, settings.n_inflate)
    run = program.run(start_values(preset, peeked), {}, index, generator)
    links = links_of(run)
    check_data(run, request.plate, says=request.says)
    check_values(run)
    check_index_used(program, run, says=request.says)
    check_block(run, links)
    check_fixed_supports(run, run.globals)
    unknown_scales = settings.phi_update == "gibbs"
    others = num_tasks - 1 - index
    pairs, scales, reasons, regressions = find_pairs(program, run, others, generator, unknown_scales=unknown_scales)
    structure = Structure(
        num_tasks,
        block,
        sequential,
        pairs,
        reasons,
        coupled_families(run, links),
        needs_rerun(run, links),
        pass_size,
        exact=_is_exact(settings) or request.sgd_steps > 0,
        scales=scales,
        hold=request.sgd_steps + _hold(-(-num_tasks // block), request.warmup_steps - request.sgd_steps),
        regressions=regressions,
    )
    check_translation(settings)
    held = "distributed=True" if request.distributed else "sgd_steps" if request.sgd_steps else None
    settings, gaussian = exact_theta(program, run, structure, settings, generator, held)
    structure = replace(
        structure, checks_steps=request.check_stability and settings.decay is None and _is_chosen(settings)
    )
    check_metropolis(settings, request.distributed, program, run)
    check_solved(settings, structure, program, run)
    check_underdamped(settings, structure, request.distributed)
    check_control_variates(settings, structure, run, request.distributed)
    hint = outside_hint(run, request.plate) or nested_hint(program)
    _check_phi_update(structure, settings, request, hint, mistake=bool(hint) and declared < num_tasks)
    _check_scales(structure, settings)
    _check_regressions(structure, settings, request)
    structure = replace(structure, scaling=can_scale(structure, settings, run))
    structure = replace(structure, long=long_families(structure, settings, run))
    if request.distributed:
        shared_visit.check_share(structure, settings, request.scan)
    tabled = settings.phi_update == "langevin" and settings.accumulator == "table"
    cache = Cache(
        {pair.family: run.globals[name].leaf.detach().clone() for name, pair in pairs.items()},
        table=GradientTable(num_tasks // block) if tabled else None,
        coupled=structure.coupled,
        reruns=structure.reruns,
        recycle=True,
        coefficients={family: Coefficients.empty(level, num_tasks) for family, level in regressions.items()},
    )
    _check_saddle(program, run, structure, settings, generator)
    settings, report = _with_steps(run, structure, settings, request.check_stability)
    phi = {name: site.leaf.detach().clone() for name, site in run.globals.items()}
    wanted = TranslationRequest(request.sgd_steps, request.distributed, request.check_stability, request.store)
    if settings.theta_update == "underdamped" or settings.control_variates:
        settings = replace(settings, translation="none")
    settings, translation, moves = plan_translation(program, phi, structure, settings, wanted)
    report |= moves
    known = {name: x for name, x in report.items() if not (isinstance(x, float) and math.isnan(x))}
    said = (f"{name} {x:.3g}" if isinstance(x, float) else f"{name} {x}" for name, x in known.items())
    log.info("dimensionless steps at the start: %s", ", ".join(said))
    row_bytes = row_bytes_of(run, structure)
    store = store_for(request, run, structure, row_bytes)
    chain = Chain(program, structure, store, settings, cache, translation, gaussian)
    chain = with_stores_beside(chain, request.store, row_bytes, next(iter(phi.values())).device)
    state = init(structure, cache, phi)
    transforms = {k: t for k, t in site_transforms(run).items() if k in run.globals}
    start_log_likelihood = float(run.log_likelihood.detach())
    wider = "subsample_size" if subsampled[request.plate] and not request.distributed else "block_size"
    ways = open_ways(program, run, structure, settings, request.distributed)
    return Plan(chain, state, transforms, start_log_likelihood, report, row_bytes, wider, ways)


def row_bytes_of(run: Evaluation, structure: Structure) -> int:
    """Return the bytes of a task's row; the mean over the tasks of the first pass."""
    return sum(x.leaf.numel() * x.leaf.element_size() for x in run.locals.values()) // structure.pass_size


def store_for(request: Request, run: Evaluation, structure: Structure, row_bytes: int) -> ThetaStore:
    """Return the store that was asked for, for tasks of such rows."""
    if not isinstance(request.store, str):
        check_own_store(request.store, structure.num_tasks)
    device = next((site.leaf.device for site in run.locals.values()), torch.device("cpu"))
    return make_store(request.store, structure.num_tasks, row_bytes, device)


def _hold(round_size: int, warmup: int) -> int:
    """Visits for which unknown scales stay at their start: rounds of the tasks, or half of a shorter warm-up."""
    return max(round_size, min(HELD_ROUNDS * round_size, warmup // 2))


def _is_exact(settings: Settings) -> bool:
    """Whether phi moves by what is known of normal pairs; the other accumulators take any program."""
    return settings.phi_update == "gibbs" or settings.accumulator == "exact"


def _check_phi_update(
    structure: Structure, settings: Settings, request: Request, hint: str = "", *, mistake: bool = False
) -> None:
    pairs, reasons, num_tasks, block = structure.pairs, structure.reasons, structure.num_tasks, structure.block_size
    if not pairs and not reasons and not structure.regressions:
        raise ValueError(
            f"the program has no latent site outside the plate {request.plate!r}: its tasks share nothing. "
            "Use SGLD for independent tasks."
        )
    exact = _is_exact(settings)
    if exact and reasons:
        site, reason = next(iter(reasons.items()))
        raise NotExactError(_refusal(settings, site, reason) + hint, f"{site!r} has no exact draw: {reason}.", mistake)
    if settings.accumulator == "table" and settings.phi_update == "langevin" and num_tasks % block:
        raise ValueError(
            f'accumulator="table" stores one gradient per block, and {num_tasks} tasks are no whole number of '
            f"blocks of {block}. Use a block_size that divides {num_tasks}."
        )
    check_factors(settings, structure.num_tasks)
    if request.sgd_steps and not pairs and not structure.regressions:
        site, reason = next(iter(reasons.items()))
        raise ValueError(
            f"sgd_steps={request.sgd_steps} trains one vector shared by all tasks, which needs a normal local family "
            f"around a global site; {site!r} is none: {reason}. Leave sgd_steps at 0."
        )


def _refusal(settings: Settings, site: str, reason: str) -> str:
    name, kinds = "exact", "normal and the mean of one normal local family"
    if settings.phi_update == "gibbs":
        name, kinds = (
            "gibbs",
            f"{kinds} (or one of several in which that mean is linear), or the scale of such families",
        )
    centred = ""
    if "observed site depends on it directly" in reason:
        centred = (
            "Where the program is non-centred (theta = phi + tau * raw), write it centred: theta ~ Normal(phi, tau) a "
            "site of its own, and phi and tau nowhere else. Otherwise use"
        )
    return (
        f"{name!r} needs every global site {kinds}, and {site!r} is not: {reason}. {centred or 'Use'} "
        'phi_update="langevin", accumulator="table", which works for any program; its phi_step_size must be '
        "small, 2 % of the table's limit (the default), and its chain long. Where one visit can see all tasks and all "
        'rows, phi_update="nuts" moves everything together, exactly, and needs no step_size.'
    )


def _check_scales(structure: Structure, settings: Settings) -> None:
    """Refuse options that an unknown scale does not allow."""
    dense = [k for k, pair in structure.pairs.items() if pair.dense is not None]
    for name in dense + [level.sites[0] for level in structure.regressions.values() if level.dense is not None]:
        if settings.integrator == "euler" or settings.decay is not None:
            raise ValueError(
                f"the local family around {name!r} is multivariate normal, whose step is exact under its prior: leave "
                'integrator at "exponential" and preconditioner at None.'
            )
    for name in structure.scales:
        if settings.integrator == "euler":
            raise ValueError(
                f"integrator='euler' with the unknown scale {name!r}: its step is stable below four times the variance "
                'alone, which the chain moves. Use integrator="exponential".'
            )
        if settings.temperature == 0.0:
            raise ValueError(
                f"temperature=0.0 with the unknown scale {name!r}: the density of a hierarchy has no mode, it grows "
                "without bound as the scale goes to zero. Use a temperature above zero, or a known scale."
            )


def _check_regressions(structure: Structure, settings: Settings, request: Request) -> None:
    """Refuse options that know of normal pairs alone."""
    faults = {
        "sgd_steps": request.sgd_steps > 0,
        "distributed=True": request.distributed,
        f"translation={settings.translation!r}": settings.translation in ("saga", "falling") and not structure.pairs,
    }
    for option in [name for name, holds in faults.items() if holds and structure.regressions]:
        sites = listed([name for level in structure.regressions.values() for name in level.sites])
        raise ValueError(
            f"{option} needs local families normal around one global site, and the mean of "
            f"{listed(list(structure.regressions))} is linear in several ({sites}). Leave {option.split('=')[0]} out."
        )


def _check_saddle(
    program: Program, run: Evaluation, structure: Structure, settings: Settings, generator: torch.Generator | None
) -> None:
    """Refuse a start without gradient: adapters at zero have none, and no chain would ever leave.

    The first tasks' rows may all be masked, or say nothing of theta where it starts; then others are asked.
    """
    phi, tasks = {name: site.leaf.detach() for name, site in run.globals.items()}, torch.arange(structure.pass_size)
    silent = True
    for _ in range(SADDLE_BLOCKS):
        drift = run.drift(run.locals, structure.coupled, settings.n_inflate)
        check_start(drift, run)
        if not run.log_likelihood.requires_grad or any(bool(g.any()) for g in drift.gradient.values()):
            return
        if curves_down(run.log_likelihood, [site.leaf for site in run.locals.values()]):
            return  # balanced data: it is their mode, and holds no chain
        silent = silent and not bool(run.log_likelihood.any())
        tasks = (tasks + structure.pass_size) % structure.num_tasks
        run = program.run(phi, {}, tasks, generator)
    if silent:
        return  # no row of any of them is seen: the chain is the prior's
    raise ValueError(
        "the likelihood's gradient is exactly zero at the start, for every local site: a saddle, as adapters "
        "at zero are. Start elsewhere: init_strategy=init_to_value(values={'phi': adapter.initial}) or "
        "MCMC(..., initial_params={'phi': ...})."
    )


def _is_chosen(settings: Settings) -> bool:
    """Whether theta moves by the step that the user chose, which is then held against each task's limit."""
    return settings.is_untested and not settings.adapts


def _with_steps(
    run: Evaluation, structure: Structure, settings: Settings, check_stability: bool
) -> tuple[Settings, dict[str, float | str]]:
    """Choose the step sizes that are None, check them, and report them without dimensions."""
    run = run.without(settings.site_update)
    curvature = measured_curvature(run, settings.n_inflate, wanted=settings.step_size is None)
    schedule = settings.step_size or default_step(curvature)
    phi_schedule = settings.phi_step_size
    if phi_schedule is None:
        phi_schedule = schedule
        if settings.phi_update == "langevin" and settings.accumulator == "table":
            phi_schedule = _table_schedule(run, structure, settings) or schedule
        elif settings.step_size is None and structure.pairs and settings.phi_update == "langevin":
            phi_schedule = constant(DEFAULT_SHARE * min(_phi_limits(structure, settings)))
    settings = replace(settings, step_size=schedule, phi_step_size=phi_schedule)
    if check_stability:
        _check_steps(run, structure, settings, curvature)
    return settings, _dimensionless(structure, settings, curvature)


def _table_schedule(run: Evaluation, structure: Structure, settings: Settings) -> Schedule | None:
    """The default step of phi with the table; None where its limit is not known."""
    measured = measured_table_limit(run, structure.num_tasks, settings.n_inflate)
    limits = _phi_limits(structure, settings) + ([] if measured is None else [measured])
    return constant(TABLE_SHARE * min(limits)) if limits else None


def _phi_limits(structure: Structure, settings: Settings) -> list[float]:
    """The stability limits of the Langevin step of phi, one a pair."""
    return [
        langevin_limit(settings.accumulator, pair, structure.num_tasks, structure.block_size)
        for pair in structure.pairs.values()
    ]


def _check_steps(run: Evaluation, structure: Structure, settings: Settings, curvature: float | None) -> None:
    eta = settings.eta(0) * largest_factor(run.tasks, settings.task_step_scale)
    if settings.decay is None and settings.is_untested:  # a tested step has no limit: it is not taken
        if settings.integrator == "euler":
            check_prior_steps(run, eta, settings.site_step_scale)
        check_curvature(run, curvature, eta, settings.limited_as, settings.n_inflate, settings.site_step_scale)
    if settings.phi_update == "langevin" and settings.accumulator != "single":
        for limit in _phi_limits(structure, settings):
            if settings.phi_eta(0) >= limit:
                formula = "4 β²/N" if settings.accumulator == "exact" else "π² β² B/N²"
                raise ValueError(step_too_large("phi_step_size", settings.phi_eta(0), limit, formula))


def _dimensionless(structure: Structure, settings: Settings, curvature: float | None) -> dict[str, float | str]:
    r"""Step sizes without dimensions: :math:`a_\theta = \eta / (2 \beta^2)`, and a_phi, the same of Eq. 9."""
    eta, phi_eta = settings.eta(0), settings.phi_eta(0)
    exact = settings.theta_update == "exact"
    # Momentum is kept for (1 + c) / (1 - c) steps in a row, where they are short.
    faster = (1.0 + settings.momentum) / (1.0 - settings.momentum) if settings.theta_update == "underdamped" else 1.0
    report: dict[str, float | str] = {
        "step_size": math.nan if exact else eta,
        "curvature": math.nan if curvature is None else curvature,
        "phi_update": settings.phi_update,
        "block_size": float(structure.block_size),
        "tasks": float(structure.num_tasks),
    }
    for name, pair in structure.pairs.items():
        variance = float(pair.local_variance.min())
        report[f"a_theta ({name})"] = math.inf if exact else faster * eta / (2.0 * variance)
        report[f"a_phi ({name})"] = (
            0.5 * phi_eta * (structure.num_tasks / variance + float(pair.prior_precision.max()))
            if settings.phi_update == "langevin"
            else 0.0
        )
    return report


def check_plate(program: Program, plate: str, run: Evaluation) -> None:
    """Refuse a program without the task plate, or without a latent site in it."""
    if plate not in run.plates:
        raise MissingPlateError(missing_plate(plate, run), program.only_plate)
    if not run.locals:
        raise ValueError(
            f"the plate {plate!r} holds no latent site, so there is nothing to sample for a task. Sample each task's "
            f'own variable inside it: with pyro.plate({plate!r}, N): pyro.sample("theta", ...).'
            + outside_hint(run, plate)
        )

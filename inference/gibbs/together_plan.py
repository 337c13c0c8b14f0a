"""The plan of a chain that moves phi and all theta together, and the choice between it and the exact draws."""

from __future__ import annotations

import math
import time
from dataclasses import replace

import torch
from torch import Tensor

from pyro_lift.inference.admission import (
    NotExactError,
    check_block,
    check_fixed_supports,
    refuse_discrete,
    site_transforms,
    start_values,
)
from pyro_lift.inference.data_support import check_values
from pyro_lift.inference.dependence import coupled_families, links_of
from pyro_lift.inference.gibbs.blocks import Request, is_small, size_hint
from pyro_lift.inference.gibbs.normal_sites import local_normal
from pyro_lift.inference.gibbs.plan import Plan, Start, check_plate, plan, row_bytes_of, store_for
from pyro_lift.inference.gibbs.regression import by_task
from pyro_lift.inference.gibbs.state import Cache, Chain, Settings, Structure, init
from pyro_lift.inference.gibbs.together import Posterior, raw_families
from pyro_lift.inference.kernel import log
from pyro_lift.inference.mistakes import MissingPlateError, check_data, check_program, say_single_task
from pyro_lift.inference.program import Evaluation, Latent, Program
from pyro_lift.inference.schedules import constant
from pyro_lift.inference.whole import whole

__all__ = ["chosen_plan", "strength"]

#: Most coordinates of the theta of a program that has exact draws and is moved together all the same.
MOST_TOGETHER = 2_000
#: Strength of the data below which exact draws of phi given theta are slow: where scales are known, and where one is
#: not; and random directions along which curvature is measured.
WEAK, WEAK_WITH_SCALES, PROBES = 3.0, 10.0, 4
#: Sites of a loop from which it is said that it is slow.
MANY_SITES = 200
#: How often the way from zero to a start without a density is halved.
HALVINGS = 12


def chosen_plan(
    program: Program, request: Request, settings: Settings, start: Start, generator: torch.Generator | None
) -> Plan:
    """Return the plan that ``phi_update`` asks for; of ``"auto"`` the exact draws where every global site has one.

    Where they do not apply and nothing was asked for that the no-U-turn sampler cannot give, it moves the program
    whole, its subsampling taken out if need be. So it does in a small program that visits all its tasks anyhow, if the
    data say little of a single one: theta_i then keep phi and the scales, and these keep theta_i.

    A program without a plate ``tasks``, where none was named, is read through the only plate with latent sites inside.

    Raises:
        ValueError: as :func:`~pyro_lift.inference.gibbs.plan.plan` does; what keeps ``phi_update="nuts"`` from a
            program.
    """
    before = None if generator is None else generator.get_state()
    try:
        return _chosen(program, request, settings, start, generator)
    except MissingPlateError as missing:
        if request.plate_named or missing.only is None:
            raise
        if request.says:
            log.info("the plate %r is the task plate: no other holds latent sites.", missing.only)
        request = replace(request, plate=missing.only)
        if generator is not None and before is not None:
            generator.set_state(before)
    program = Program(program.model, request.plate, program.args, program.kwargs, program.initial)
    return _chosen(program, request, settings, start, generator)


def _chosen(
    program: Program, request: Request, settings: Settings, start: Start, generator: torch.Generator | None
) -> Plan:
    if settings.phi_update == "nuts":
        fault = _options_fault(request, settings)
        if fault is not None:
            raise ValueError(f'phi_update="nuts" moves phi and all theta together, exactly, and {fault}')
        return _plan_together(program, request, settings, start, generator)
    if settings.phi_update != "auto":
        if settings.phi_update == "gibbs":
            _say_unused(settings)
        return plan(program, request, settings, start, generator)
    free = request.block_size is None and _options_fault(request, settings) is None
    try:
        planned = plan(program, request, replace(settings, phi_update="gibbs"), start, generator)
        if not free or not _is_slow(planned):
            _say_unused(settings)
            return planned
        reason = f"the data say little of single tasks ({strength(planned):.2g} times the precision of their prior)."
    except NotExactError as refusal:
        reason = refusal.reason
        if not free or refusal.mistake:
            raise
        whole_program = Program(whole(program.model), program.plate, program.args, program.kwargs, program.initial)
        seen = whole_program.peek(generator)[0]
        if not is_small(seen):
            raise NotExactError(f"{refusal} {size_hint(seen)}", reason) from None
        program = whole_program
    log.info("phi and all theta are moved together (phi_update='nuts'): %s", reason)
    fresh = Program(program.model, program.plate, program.args, program.kwargs, program.initial)
    request = replace(request, says=False)
    return _plan_together(fresh, request, replace(settings, phi_update="nuts"), start, generator)


def _say_unused(settings: Settings) -> None:
    """Log that a step of phi was given, which an exact draw does not take."""
    if settings.phi_step_size is not None:
        log.warning(
            "phi_step_size is not used: phi is drawn exactly, without a step. Leave it out, or take "
            'phi_update="langevin".'
        )


def _options_fault(request: Request, settings: Settings) -> str | None:
    """Return which option does not go with trajectories of all sites, and what to do; None where none is in the way."""
    faults = {
        "distributed=True": request.distributed and "every process would need all tasks; leave it out",
        "sgd_steps": request.sgd_steps > 0 and "needs no joint training before it; leave it at 0",
        "theta_update": settings.theta_update != "auto" and "it moves theta itself; leave it out",
        "control_variates": settings.control_variates > 0 and "it takes all rows; leave them out",
        "translation": settings.translation in ("saga", "falling") and "it moves them already; leave it out",
        "task_step_scale": settings.task_step_scale is not None and "it moves all tasks at once; leave it out",
        "preconditioner": settings.decay is not None and "it has a metric of its own; leave it out",
        "max_grad_norm": settings.max_grad_norm is not None and "a test holds any gradient; leave it out",
        "phi_step_size": settings.phi_step_size is not None and "its step tunes itself; leave it out",
        "step_size": settings.step_size is not None and "its step tunes itself; leave it out",
        "temperature=0": settings.temperature == 0.0 and "there is no law to move in; use a temperature above zero",
        "site_update": bool(settings.site_update) and "it moves all sites itself; leave it out",
        "site_temperature": any(t != 1.0 for t in settings.site_temperature.values())
        and "sites of several temperatures have no common density; leave it out",
    }
    return next((f"{option} does not go with it: {reason}." for option, reason in faults.items() if reason), None)


def _is_slow(planned: Plan) -> bool:
    """Whether exact draws of phi given theta would move slowly, in a program that can as well be moved whole."""
    structure = planned.chain.structure
    if planned.chain.gaussian is not None:  # phi is drawn with theta integrated out, and nothing follows anything
        return False
    if structure.pass_size < structure.num_tasks or structure.sequential:
        return False
    run = planned.chain.program.run(planned.state.phi, {}, torch.arange(structure.num_tasks), None, want_grad=False)
    if sum(site.leaf.numel() for site in run.locals.values()) > MOST_TOGETHER:
        return False
    weak = WEAK_WITH_SCALES if structure.scales else WEAK
    return all(size.taken == size.size for size in run.plates.values()) and strength(planned) < weak


def strength(planned: Plan) -> float:
    r"""Return how much the data say of single tasks beside their prior, in the coordinate of which they say least.

    With g and h gradient and curvature of a task's log likelihood at the start, that is the mean of h times the prior's
    variance. Where the prior's scale is unknown its variance is guessed from one Newton step of each task, as
    :math:`\mathrm{var}_i(g_i / h_i) - \mathrm{mean}_i(1 / h_i)`, if that is less than it is at the start.
    """
    chain, source = planned.chain, torch.Generator().manual_seed(0)
    run = chain.program.run(planned.state.phi, {}, torch.arange(chain.structure.num_tasks), None)
    sites = [site for site in run.locals.values() if chain.structure.level_of(site.family) is not None]
    leaves, likelihood = [site.leaf for site in sites], chain.settings.n_inflate * run.log_likelihood
    if not sites or not likelihood.requires_grad:
        return 0.0
    grads = torch.autograd.grad(likelihood, leaves, create_graph=True, allow_unused=True)
    least = float("inf")
    for site, g in zip(sites, grads, strict=True):
        if g is None or not g.requires_grad:
            return 0.0
        curved = torch.zeros_like(site.leaf)
        for _ in range(PROBES):
            v = 2.0 * torch.randint(0, 2, site.leaf.shape, generator=source).to(site.leaf) - 1.0
            (bent,) = torch.autograd.grad((g * v).sum(), site.leaf, retain_graph=True)
            curved = curved - bent * v / PROBES
        least = min(least, _least_strength(chain, site, by_task(site, g), by_task(site, curved)))
    return least


def _least_strength(chain: Chain, site: Latent, slope: Tensor, curved: Tensor) -> float:
    """The strength of the data of one site, from gradient and curvature by task ``[tasks, D]``."""
    level, prior = chain.structure.level_of(site.family), local_normal(site)
    assert level is not None and prior is not None
    variance = by_task(site, torch.broadcast_to(prior.precision, site.leaf.shape).reciprocal()).mean(0)
    least = float("inf")
    for d in range(slope.shape[1]):
        g, h, own = slope[:, d], curved[:, d], float(variance[d])
        told = h > 1e-3 * h.max().clamp_min(1e-30)  # the others say nothing
        if int(told.sum()) > 2 and (level.law is not None or (level.dense is not None and level.dense.site)):
            apart = float((g[told] / h[told]).var()) - float((1.0 / h[told]).mean())
            own = min(own, max(apart, 0.0))
        least = min(least, float(h.clamp_min(0.0).mean()) * own)
    return least


def _plan_together(
    program: Program, request: Request, settings: Settings, start: Start, generator: torch.Generator | None
) -> Plan:
    """Read a program whose visits see all tasks and rows, check it, and make a chain at its start."""
    peeked, _ = program.peek(generator)
    check_program(program, peeked, says=request.says)
    check_plate(program, request.plate, peeked)
    if request.says:
        say_single_task(request.plate, peeked)
    refuse_discrete(peeked)
    _check_whole(peeked, request)
    num_tasks = peeked.plates[request.plate].size
    index = torch.arange(num_tasks)
    preset = start(program, lambda values: program.run(values, {}, index, generator), None, settings.n_inflate)
    run = program.run(start_values(preset, peeked), {}, index, generator)
    links = links_of(run)
    check_block(run, links, together=True)
    check_data(run, request.plate, says=request.says)
    check_values(run)
    check_fixed_supports(run, run.globals)
    structure = Structure(
        num_tasks,
        num_tasks,
        any(site.task is not None for site in run.locals.values()),
        {},
        dict.fromkeys(run.globals, "it moves together with all others"),
        coupled_families(run, links),
        False,
        num_tasks,
        exact=False,
    )
    # The step of the report; each trajectory finds its own.
    settings = replace(settings, step_size=constant(0.01), phi_step_size=constant(0.01), adapts=request.warmup_steps)
    settings = replace(settings, theta_update="sgld", translation="none")
    row_bytes = row_bytes_of(run, structure)
    cache = Cache({}, coupled=structure.coupled, recycle=True)
    chain = Chain(program, structure, store_for(request, run, structure, row_bytes), settings, cache)
    chain = chain._replace(raw=raw_families(run))
    if not preset:
        run = _finite_start(program, chain, run, generator)
    _say_slow(chain, run)
    phi: dict[str, Tensor] = {name: site.leaf.detach().clone() for name, site in run.globals.items()}
    transforms = {k: t for k, t in site_transforms(run).items() if k in run.globals}
    report: dict[str, float | str] = {
        "step_size": settings.eta(0),
        "phi_update": "nuts",
        "block_size": float(num_tasks),
        "tasks": float(num_tasks),
    }
    return Plan(chain, init(structure, cache, phi), transforms, float(run.log_likelihood.detach()), report, row_bytes)


def _say_slow(chain: Chain, run: Evaluation) -> None:
    """Warn that a loop over many tasks is slow to run tens of times a draw, with what it takes."""
    sites = len(run.latents) + len(run.observed)
    if not chain.structure.sequential or sites < MANY_SITES:
        return
    posterior = Posterior(chain, run)
    vector = posterior.flat(run)
    begin = time.perf_counter()
    posterior.density(vector)
    seconds = time.perf_counter() - begin
    tasks = chain.structure.num_tasks
    log.warning(
        "the program iterates over its %d tasks, and phi and all theta are moved together: a draw runs it 10 to 100 "
        "times, %.2g s each. A vectorised plate takes a hundredth of that: with pyro.plate(%r, %d) as index, tasks of "
        "unequal rows padded and masked (dist....mask(known)). A loop whose theta are normal around phi, and phi in "
        "no likelihood, needs no such runs.",
        tasks,
        seconds,
        chain.program.plate,
        tasks,
    )


def _finite_start(program: Program, chain: Chain, run: Evaluation, generator: torch.Generator | None) -> Evaluation:
    """Return a run at a start where the density is finite: that of the priors' centres, drawn towards zero if need be.

    The median of a prior as wide as InverseGamma(1e-3, 1e-3) is beyond what a density can be computed for.
    """
    for _ in range(HALVINGS):
        posterior = Posterior(chain, run)
        if math.isfinite(posterior.density(posterior.flat(run))[0]):
            break
        phi = {name: 0.5 * site.leaf.detach() for name, site in run.globals.items()}
        run = program.run(phi, {}, torch.tensor(run.tasks), generator)
    return run


def _check_whole(run: Evaluation, request: Request) -> None:
    for plate, (size, taken) in run.plates.items():
        if taken < size:
            raise ValueError(
                f'phi_update="nuts" moves phi and all theta by the whole posterior, and the plate {plate!r} takes '
                f"{taken} of {size}. Hand over pyro_lift.whole(model), which takes all, or leave subsample_size out."
            )
    size = run.plates[request.plate].size
    if request.block_size not in (None, size):
        raise ValueError(
            f'block_size={request.block_size} with phi_update="nuts", which moves all {size} tasks at a visit: leave '
            "block_size out."
        )

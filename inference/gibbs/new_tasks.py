"""What is checked and learned of tasks at their first visit: what the first tasks showed may not hold for them."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from pyro_lift.inference.admission import check_block, needs_rerun
from pyro_lift.inference.dependence import coupled_families, links_of
from pyro_lift.inference.gibbs.conjugate import adopt, family_fault, pair_fault
from pyro_lift.inference.gibbs.normal_sites import listed
from pyro_lift.inference.gibbs.regression import regression_fault
from pyro_lift.inference.gibbs.state import Chain
from pyro_lift.inference.gibbs.task_factors import largest_factor
from pyro_lift.inference.gibbs.whole_likelihood import check_solved_rows, check_whole
from pyro_lift.inference.program import Evaluation
from pyro_lift.inference.stability import LATER_ITERATIONS, check_curvature, clears, measured_curvature

__all__ = ["learn"]


def learn(chain: Chain, run: Evaluation) -> frozenset[str]:
    """Hold the tasks of a run against the chain's structure, and take up what they add to it.

    Which families are coupled, and whether phi's gradient needs a run of its own, only ever grows: more than a task
    needs costs time and changes nothing.

    Args:
        chain: its cache is added to.
        run: of tasks that are visited for the first time, with gradients.

    Returns:
        Families of pairs that do not hold in these tasks; empty where the chain rests on the pairs.

    Raises:
        ValueError: what no chain can sample, or what the exact draw of a pair does not allow; names the tasks.
    """
    structure, cache, tasks = chain.structure, chain.cache, _named(run)
    known = {*structure.pairs, *structure.scales, *structure.reasons, *structure.regressed}
    if run.globals.keys() != known:
        odd = sorted(run.globals.keys() ^ known)
        raise ValueError(f"{tasks}: the global sites {odd} are not those of every task.")
    links = links_of(run)
    check_block(run, links, tasks, together=chain.raw is not None)
    check_whole(chain.settings, chain.program, run, tasks)
    check_solved_rows(chain.settings, chain.program, run, tasks)
    adopt(chain.program, structure.pairs, run, links)
    _check_layout(chain, run)
    cache.coupled |= coupled_families(run, links)
    cache.reruns |= needs_rerun(run, links)
    unpaired = set()
    for pair in structure.pairs.values():
        fault = pair_fault(pair, run, links, structure.sequential)
        if fault is None:
            continue
        if structure.exact:
            raise ValueError(
                f"{tasks}: {fault}. An exact draw of {pair.global_site!r} rests on every task being as the first ones "
                'are. Use phi_update="langevin", accumulator="table", which works for any program.'
            )
        unpaired.add(pair.family)
    for level in structure.regressions.values():
        fault = regression_fault(level, run, links)
        if fault is not None:
            raise ValueError(
                f"{tasks}: {fault}. An exact draw of {listed(level.sites)} rests on every task being as the first ones "
                'are. Use phi_update="nuts", or phi_update="langevin", accumulator="table".'
            )
    for name in structure.scales:
        fault = family_fault(name, {*structure.pair_of, *structure.regressions}, run, links)
        if fault is not None:
            raise ValueError(
                f"{tasks}: {fault}. An exact draw of {name!r} rests on every task being as the first ones are. "
                'Use phi_update="langevin", accumulator="table", which works for any program.'
            )
    _check_step(chain, run, tasks)
    return frozenset(unpaired)


def _check_step(chain: Chain, run: Evaluation, tasks: str) -> None:
    """Refuse a step size that is past the limit of these tasks, as set-up does for the first ones.

    A minibatch's curvature is no limit of the task's; a task that subsamples its rows is let pass.
    """
    settings, plates = chain.settings, run.plates.items()
    subsampled = any(size.taken < size.size for name, size in plates if name != chain.program.plate)
    if not chain.structure.checks_steps or subsampled:
        return
    eta = settings.eta(0) * largest_factor(run.tasks, settings.task_step_scale)
    power, scale = settings.n_inflate, settings.site_step_scale
    run = run.without(settings.site_update)
    if clears(run, power, eta, scale):
        return
    curvature = measured_curvature(run, power, wanted=False, iterations=LATER_ITERATIONS)
    check_curvature(run, curvature, eta, settings.limited_as, power, scale, say=f"{tasks}: ")


def _named(run: Evaluation) -> str:
    tasks = ", ".join(map(str, run.tasks))
    return f"task {tasks}" if len(run.tasks) == 1 else f"tasks {tasks}"


def _check_layout(chain: Chain, run: Evaluation) -> None:
    """Refuse tasks whose values do not fit where those of the first ones stand."""
    structure, layout = chain.structure, chain.cache.layouts.get(None)
    for site in run.locals.values():
        if site.family in structure.long and site.leaf.dim() != 1:
            raise ValueError(f"{_named(run)}: the site {site.name!r} is no vector, as that of the first tasks is.")
    if structure.sequential or layout is None:
        return
    known = {site.family: site.shape for site in layout}
    shapes = {site.family: site.leaf.select(site.plate_dim or 0, 0).shape for site in run.locals.values()}
    if shapes != known:
        raise ValueError(
            f"{_named(run)}: local sites {_shown(shapes)}, where the first tasks had {_shown(known)}. Tasks whose "
            "sites differ need a plate that is iterated over: for i in pyro.plate(...)."
        )


def _shown(shapes: Mapping[str, torch.Size]) -> str:
    return "{" + ", ".join(f"{family}: {list(shape)}" for family, shape in sorted(shapes.items())) + "}"

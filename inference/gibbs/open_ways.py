"""Which other options a program could take as well: the ways that are still open where a chain mixes slowly."""

from __future__ import annotations

from dataclasses import replace

from pyro_lift.inference.gibbs.state import Settings, Structure
from pyro_lift.inference.gibbs.whole_likelihood import check_metropolis
from pyro_lift.inference.program import Evaluation, Program

__all__ = ["open_ways"]


def open_ways(
    program: Program, run: Evaluation, structure: Structure, settings: Settings, distributed: bool
) -> tuple[str, ...]:
    """Return options and values, as the user writes them, that would move this chain faster and are not in force.

    Args:
        program: the model.
        run: of the first block.
        structure: of the program.
        settings: in force, nothing left open.
        distributed: whether processes share the chain.
    """
    ways = []
    if settings.phi_update == "langevin" and structure.pairs and not structure.reasons:
        ways.append('phi_update="gibbs"')
    if _can_translate(structure, settings):
        ways.append('translation="saga"')
    if _can_be_tested(program, run, settings, distributed):
        ways.append('theta_update="hmc"')
    return tuple(ways)


def _can_translate(structure: Structure, settings: Settings) -> bool:
    free = settings.translation == "none" and settings.phi_update == "gibbs" and settings.theta_update != "exact"
    alone = settings.theta_update != "underdamped" and not settings.control_variates and not settings.site_update
    return free and alone and bool(structure.pairs)


def _can_be_tested(program: Program, run: Evaluation, settings: Settings, distributed: bool) -> bool:
    """Whether long steps with a Metropolis test could take the place of the steps in force."""
    if settings.theta_update in ("exact", "hmc") or settings.site_update or settings.control_variates:
        return False
    try:
        check_metropolis(replace(settings, theta_update="hmc"), distributed, program, run)
    except ValueError:
        return False
    return True

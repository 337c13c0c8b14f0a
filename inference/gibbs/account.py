"""What an SGLD-Gibbs chain tells of itself: its steps without dimensions, and the options that it runs with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from pyro_lift.inference.gibbs import metropolis, step_adaptation, together
from pyro_lift.inference.gibbs.plan import Plan
from pyro_lift.inference.gibbs.state import Settings

__all__ = ["in_force", "steps_of"]


def steps_of(plan: Plan, tuned: Mapping[str, Tensor]) -> dict[str, float | str]:
    """Return the plan's report with the steps as the warm-up has tuned them."""
    chain = plan.chain
    if chain.raw is not None:
        return together.reported(plan.report, tuned)
    families = {name: pair.family for name, pair in chain.structure.pairs.items()}
    report = step_adaptation.reported(plan.report, tuned, chain.settings, families)
    return metropolis.with_tuned_step(report, tuned, chain.settings)


def in_force(plan: Plan, given: Settings) -> dict[str, Any]:
    """Return the options that a chain runs with, those that were left open filled in, and the ways still open to it.

    Args:
        plan: of the chain.
        given: the settings as the user gave them.

    Returns:
        Plain values by the options' names, and ``left_open``, the names of those that the user left to us; ``wider``,
        the option by which a visit takes more tasks, empty where it takes all; ``ways``, options and values that this
        program could take as well (:func:`~pyro_lift.inference.gibbs.open_ways.open_ways`).
    """
    structure, settings = plan.chain.structure, plan.chain.settings
    moves_all = plan.chain.raw is not None
    return {
        "kernel": "SGLDGibbs",
        "phi_update": "nuts" if moves_all else settings.phi_update,
        "theta_update": settings.theta_update,
        "temperature": settings.temperature,
        "leapfrog_steps": settings.leapfrog_steps,
        "phi_step_size": settings.phi_eta(0),
        "left_open": [name for name in ("step_size", "phi_step_size") if getattr(given, name) is None],
        "wider": "" if moves_all or structure.block_size >= structure.num_tasks else plan.wider,
        "ways": list(plan.ways),
    }

"""What to do about a chain that has not mixed: advice that goes by what the chain runs with, in its options' names."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

__all__ = ["ways_out"]

#: Share of the largest stable step above which no larger one is advised.
MOST_OF_LIMIT = 0.5
#: Visits of a warm-up in which the step and the metric of trajectories of everything settle.
ENOUGH_WARMUP = 300
#: What the ways that a program leaves open do, by the option as the user writes it.
WAYS = {
    'phi_update="gibbs"': "draws phi exactly",
    'translation="saga"': "moves phi and all theta together",
    'theta_update="hmc"': "makes long exact steps",
}


def ways_out(steps: Mapping[str, float | str], in_force: Mapping[str, Any], draws: int, more: int | None) -> str:
    """Say what would help, none of which is so already.

    Args:
        steps: as the kernel reports them.
        in_force: options that the chain runs with (:meth:`Kernel.in_force`); empty for a kernel that tells nothing of
            itself.
        draws: of each chain.
        more: draws of each that would do at this pace; None where that is not known.
    """
    if in_force.get("temperature") == 0.0:
        return (
            "temperature=0.0 takes the noise away: the chain ends at a mode, and its draws are no sample. Leave "
            "temperature out to sample."
        )
    if not in_force and "tasks" in steps:  # of a run that was made before kernels told more
        part = float(steps["block_size"]) < float(steps["tasks"])
        in_force = {"kernel": "SGLDGibbs", "wider": "subsample_size" if part else "", "ways": tuple(WAYS)[1:]}
    ways = [*_wider(steps, in_force), _draws(in_force, draws, more), *_warmup(in_force), *_steps(steps, in_force)]
    open_ways = [way for way in in_force.get("ways", ()) if _named(in_force, way.split("=")[0])]
    ways += [f"{way} {WAYS[way]}" for way in open_ways]
    return "What helps: " + "; ".join(ways) + "."


def _named(in_force: Mapping[str, Any], option: str) -> str:
    """Return what the caller calls an option; empty where the caller has none of the kind."""
    return str(in_force.get("names", {}).get(option, option))


def _wider(steps: Mapping[str, float | str], in_force: Mapping[str, Any]) -> list[str]:
    option = in_force.get("wider", "")
    if not option:
        return []
    visited = f"a visit takes {float(steps['block_size']):.0f} of {float(steps['tasks']):.0f}; the law is the same"
    name = _named(in_force, option)
    how = f"a larger {name}, or none" if name == "subsample_size" else f"a larger {name}"
    return [f"visit more tasks at once ({how}: {visited})"]


def _draws(in_force: Mapping[str, Any], draws: int, more: int | None) -> str:
    about = "" if more is None else f"; about {more:,} would do at this pace"
    thin = f", or keep one visit in more (thinning={in_force['thinning']} here)" if "thinning" in in_force else ""
    return f"draw more ({_named(in_force, 'num_samples')}={draws} here{about}){thin}"


def _warmup(in_force: Mapping[str, Any]) -> list[str]:
    warmup, nuts = in_force.get("warmup_steps"), in_force.get("phi_update") == "nuts"
    tuned = nuts or in_force.get("theta_update") in ("mala", "hmc")
    if "kernel" not in in_force:
        return ["warm up for longer (warmup_steps)"]
    if not tuned or warmup is None or warmup >= ENOUGH_WARMUP:
        return []
    name = _named(in_force, "warmup_steps")
    return [f"warm up for longer ({name}={warmup} here, in which the step is tuned: {ENOUGH_WARMUP} or more)"]


def _steps(steps: Mapping[str, float | str], in_force: Mapping[str, Any]) -> list[str]:
    """What a step that no test corrects could be, and what a trajectory could."""
    if in_force.get("phi_update") == "nuts" or "kernel" not in in_force:
        return []
    ways, left_open = [], in_force.get("left_open", ())
    update = in_force.get("theta_update", "sgld")
    if update == "hmc":
        ways.append(f"longer trajectories (leapfrog_steps={in_force['leapfrog_steps']} here)")
    eta, curvature = float(steps.get("step_size", math.nan)), float(steps.get("curvature", math.nan))
    if update in ("sgld", "underdamped") and not eta * curvature > 4.0 * MOST_OF_LIMIT:
        size = f"measured: {eta:.2g}" if "step_size" in left_open else f"{eta:.2g} here"
        name = _named(in_force, "step_size")  # under another name it is another number
        ways.append(f"a larger {name}{f' ({size})' if name == 'step_size' else ''} moves faster, at more bias")
    if in_force.get("phi_update") == "langevin":
        name = _named(in_force, "phi_step_size")
        size = f"{in_force['phi_step_size']:.2g} {'measured' if name in left_open else 'here'}"
        ways.append(
            f"a larger {name}{f' ({size})' if name == 'phi_step_size' else ''} moves phi faster, below its limit"
        )
    return ways

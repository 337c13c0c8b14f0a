"""Whether a chain has moved: its reach, and what R-hat and the effective sample size say, in words.

A visit moves one block's theta by a step, and phi is drawn around the mean of all theta. A chain that looks still may
therefore be one that has not begun to move, and its draws repeat the start. R-hat needs chains that began apart
(:mod:`~pyro_lift.inference.dispersed`) to see that; the effective sample size and the reach do not.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from pyro.ops.stats import effective_sample_size, split_gelman_rubin
from torch import Tensor

from pyro_lift.inference.ways_out import ways_out

__all__ = ["LEAST_DRAWS", "Mixing", "doubts_of", "judged", "mixing_of", "reach_of", "told_by"]

#: R-hat above which chains disagree, and effective draws a chain below which nothing can be said (Vehtari et al. 2021).
MOST_R_HAT, LEAST_ESS = 1.05, 100.0
#: Effective draws from which a longer run's length can be told.
FEWEST_TOLD = 5.0
#: Relaxation times of the fastest theta below which the start is remembered, whatever else is said.
LEAST_REACH = 10.0
#: Share of draws with a divergence from which it is said.
LEAST_DIVERGENCES = 0.005
#: Draws of a chain below which no verdict is given: a run this short is no attempt.
LEAST_DRAWS = 100
#: Coordinates of a site that are looked at.
COORDINATES = 64


class Mixing(NamedTuple):
    """One coordinate's R-hat and effective sample size over all chains; the latter is NaN where it never moved."""

    name: str
    r_hat: float
    ess: float


def reach_of(steps: Mapping[str, float | str], draws: int) -> dict[str, float | None]:
    """Compute how far one chain's draws can have come, from the step sizes (:meth:`Kernel.report`).

    Returns:
        ``visits_per_task``: how often each task's theta was moved. ``theta (site)``: that many times a_theta = eta /
        (2 beta^2), the relaxation times of theta_i towards phi that it has seen, ten of which forget a start.
        ``phi (site)``: the same of phi. None where theta or phi is drawn exactly. Empty for kernels without tasks.
    """
    if "tasks" not in steps:
        return {}
    visits = draws * float(steps["thinning"])
    each = visits * float(steps["block_size"]) / float(steps["tasks"])
    reach: dict[str, float | None] = {"visits_per_task": each}
    for key, a in steps.items():
        if key.startswith("a_theta"):
            reach[key.replace("a_theta", "theta")] = each * float(a) if math.isfinite(float(a)) else None
        elif key.startswith("a_phi"):
            reach[key.replace("a_phi", "phi")] = visits * float(a) if float(a) > 0.0 else None
    return reach


def mixing_of(samples: Mapping[str, Tensor]) -> list[Mixing]:
    """Split R-hat and effective sample size of some coordinates of every site, from draws ``[chains, draws, ...]``."""
    found = []
    for name, draws in samples.items():
        flat = draws.detach().double().flatten(2) if draws.dim() > 2 else draws.detach().double().unsqueeze(-1)
        chosen = torch.arange(min(flat.shape[-1], COORDINATES)) * flat.shape[-1] // min(flat.shape[-1], COORDINATES)
        flat = flat[..., chosen.to(flat.device)].cpu()
        r_hat, ess = split_gelman_rubin(flat), effective_sample_size(flat)
        for k, at in enumerate(chosen.tolist()):
            label = name if draws.dim() == 2 else f"{name}[{at}]"
            moved = bool((flat[..., k] != flat[:1, :1, k]).any())
            found.append(Mixing(label, float(r_hat[k]), float(ess[k]) if moved else math.nan))
    return found


def doubts_of(mcmc: Any) -> list[str]:
    """Say in words what speaks against a run that kept its draws, and what to do: the log's words and the summary's."""
    samples = mcmc.get_samples(group_by_chain=True)
    chains, draws = next((tuple(x.shape[:2]) for x in samples.values()), (0, 0))
    if draws < LEAST_DRAWS:
        return []
    reports = [report or {} for report in mcmc._diagnostics]
    return judged(mixing_of(samples), chains, draws, *told_by(reports))


def told_by(reports: Sequence[Mapping[str, Any]]) -> tuple[dict[str, float | str], dict[str, Any]]:
    """Return the first chain's steps, with the divergences of all chains, and the options that it ran with."""
    steps = dict(reports[0].get("report") or {})
    diverged = sum(len(report.get("divergences") or ()) for report in reports)
    return steps | ({"divergences": float(diverged)} if diverged else {}), dict(reports[0].get("in_force") or {})


def judged(
    mixing: list[Mixing],
    chains: int,
    draws: int,
    steps: Mapping[str, float | str],
    in_force: Mapping[str, Any] | None = None,
) -> list[str]:
    """Say in words what speaks against a run, and what to do; nothing where nothing does.

    Args:
        mixing: of every coordinate.
        chains: of the run.
        draws: of each chain.
        steps: without dimensions, as the kernel reports them; ``divergences`` of all chains.
        in_force: options that the chains ran with (:meth:`Kernel.in_force`).
    """
    if draws < LEAST_DRAWS or not mixing:
        return []
    words = []
    still = [m for m in mixing if not math.isfinite(m.ess)]
    if still:
        words.append(f"{still[0].name} has not moved at all.")
    moving = [m for m in mixing if m not in still]
    worst = max((m for m in moving if math.isfinite(m.r_hat)), key=lambda m: m.r_hat, default=None)
    if worst is not None and worst.r_hat > MOST_R_HAT:
        between = "the chains disagree" if chains > 1 else "the chain's halves disagree"
        words.append(f"{between}: R-hat of {worst.name} is {worst.r_hat:.2f}, and should be below {MOST_R_HAT}.")
    fewest = min(moving, key=lambda m: m.ess, default=None)
    if fewest is not None and fewest.ess < LEAST_ESS * chains:
        error = f"{1.0 / math.sqrt(max(fewest.ess, 1.0)):.0%} of its standard deviation"
        words.append(
            f"{chains * draws:,} draws of {fewest.name} are worth {fewest.ess:.0f} independent ones, fewer than "
            f"{LEAST_ESS * chains:.0f}: its mean is known to {error} at best."
        )
    left = int(float(steps.get("divergences", 0.0)))
    if left > LEAST_DIVERGENCES * chains * draws:
        words.append(
            f"{left} trajectories diverged: some region curves too much for the step; the draws may have kept out of "
            "it. Look at the draws of the scales near zero; a narrower prior of theirs, or more data, helps."
        )
    reach = reach_of(steps, draws)
    for name, far in _fastest(steps, reach).items():
        if far < LEAST_REACH:
            words.append(
                f"each task's {name} has been moved {reach['visits_per_task']:.3g} times, {far:.2g} relaxation times "
                f"of its fastest coordinate: below {LEAST_REACH:.0f} it is still near its start."
            )
    if words:
        more = None
        if fewest is not None and FEWEST_TOLD <= fewest.ess < LEAST_ESS * chains:
            more = math.ceil(draws * LEAST_ESS * chains / fewest.ess / 100.0) * 100
        words.append(ways_out(steps, in_force or {}, draws, more))
    return words


def _fastest(steps: Mapping[str, float | str], reach: Mapping[str, float | None]) -> dict[str, float]:
    """Relaxation times that a task's theta has seen where it moves fastest: at the rate eta / 2 times the curvature.

    Theta relaxes towards phi at a_theta where the data say nothing, and faster wherever they say something.
    """
    each, curvature = reach.get("visits_per_task"), float(steps.get("curvature", math.nan))
    fastest = 0.5 * float(steps.get("step_size", math.nan)) * curvature
    return {
        f"theta around {key.removeprefix('theta ').strip('()')}": max(far, each * fastest)
        for key, far in reach.items()
        if key.startswith("theta") and far is not None and each is not None and math.isfinite(fastest)
    }

"""The warm-up of the no-U-turn sampler: its step by dual averaging, its metric from windows of doubling length.

A first part finds the region, windows in the middle estimate the variances of all coordinates, each anew, and a last
part settles the step (Stan's schedule: 15 %, 75 % and 10 % of the warm-up, the outer two at most 75 and 50 transitions
long). After the warm-up nothing moves any more.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from pyro_lift.inference.nuts import Density, Point, reasonable_step

__all__ = ["begun", "inverse_mass_of", "step_of", "tuned", "window_ends"]

#: Mean acceptance that the step is tuned to, and how dual averaging gets there (Hoffman and Gelman 2014, section 3.2).
TARGET, SHRINKAGE, DELAY, FORGETTING = 0.8, 0.05, 10.0, 0.75
#: First and last part of a long warm-up, and its first window.
FIRST, LAST, WINDOW = 75, 50, 25
#: How many draws of the variance 1e-3 a window's estimate is mixed with.
PRIOR_DRAWS, PRIOR_VARIANCE = 5.0, 1e-3
Tuning = Mapping[str, Tensor]


def window_ends(warmup: int) -> tuple[int, list[int]]:
    """Return where the first window begins, and where each ends; no window in a warm-up of fewer than 20 steps."""
    if warmup < 20:
        return warmup, []
    first, last = (FIRST, LAST) if warmup >= FIRST + LAST + WINDOW else (int(0.15 * warmup), int(0.1 * warmup))
    end, ends, at, width = warmup - last, [], first, WINDOW if first == FIRST else warmup - first - last
    while at < end:
        # A window that could not be followed by one twice its length takes all that is left.
        at = end if at + 3 * width > end else at + width
        ends.append(at)
        width *= 2
    return first, ends


def begun(density: Density, here: Point, generator: torch.Generator | None) -> dict[str, Tensor]:
    """Return the tuning of a chain that begins: the unit metric, and a step that is reasonable there."""
    zeros = torch.zeros_like(here.position)
    step = reasonable_step(density, here, 0.1, torch.ones_like(zeros), generator)
    return {"inverse mass": torch.ones_like(zeros), **_empty(zeros), **_restarted(step, zeros)}


def _restarted(step: float, like: Tensor) -> dict[str, Tensor]:
    """Dual averaging from a step on; it is drawn towards ten times that, where trajectories are short."""
    number = torch.zeros((), dtype=torch.float64, device=like.device)
    log_step = number + math.log(step)
    return {"centre": log_step + math.log(10.0), "log step": log_step, "log mean": log_step, "gap": number, "t": number}


def _empty(like: Tensor) -> dict[str, Tensor]:
    """A window without draws."""
    return {"n": torch.zeros((), dtype=torch.float64, device=like.device), "mean": like, "squares": like}


def step_of(tuning: Tuning, warming: bool) -> float:
    """Return the step: the tuner's next trial in the warm-up, its mean after it."""
    return float(tuning["log step" if warming else "log mean"].exp())


def inverse_mass_of(tuning: Tuning) -> Tensor:
    """Return the diagonal of the inverse metric."""
    return tuning["inverse mass"]


def tuned(
    tuning: Tuning,
    acceptance: float,
    here: Point,
    transition: int,
    warmup: int,
    density: Density,
    generator: torch.Generator | None,
) -> dict[str, Tensor]:
    """Learn from one transition of the warm-up.

    Args:
        tuning: so far.
        acceptance: mean of the trajectory.
        here: its end.
        transition: number of it, from zero.
        warmup: transitions of the warm-up.
        density: for the new step where a window has ended.
        generator: likewise.
    """
    t = tuning["t"] + 1.0
    weight = 1.0 / (t + DELAY)
    gap = (1.0 - weight) * tuning["gap"] + weight * (TARGET - acceptance)
    log_step = tuning["centre"] - t.sqrt() / SHRINKAGE * gap
    share = t**-FORGETTING
    log_mean = share * log_step + (1.0 - share) * tuning["log mean"]
    now = {**tuning, "log step": log_step, "log mean": log_mean, "gap": gap, "t": t}
    begin, ends = window_ends(warmup)
    if not ends or not begin <= transition < ends[-1]:
        return now
    n = tuning["n"] + 1.0
    away = here.position - tuning["mean"]
    mean = tuning["mean"] + away / n
    now |= {"n": n, "mean": mean, "squares": tuning["squares"] + away * (here.position - mean)}
    if transition + 1 not in ends:
        return now
    variance = now["squares"] / (n - 1.0).clamp_min(1.0)
    inverse_mass = (n * variance + PRIOR_DRAWS * PRIOR_VARIANCE) / (n + PRIOR_DRAWS)
    step = reasonable_step(density, here, float(log_mean.exp()), inverse_mass, generator)
    return {"inverse mass": inverse_mass, **_empty(torch.zeros_like(mean)), **_restarted(step, mean)}

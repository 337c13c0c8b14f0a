r"""The no-U-turn sampler on one vector: trajectories that end where they turn back, of a step and a metric that tune
themselves.

A trajectory of leapfrog steps under :math:`H = -\log p(q) + \tfrac12 r^\top M^{-1} r` is doubled forwards or backwards
in time until it turns, and a point of it is drawn by its weight :math:`e^{-H}` (multinomial, with a bias to the newer
half). It leaves p exactly for every step and metric (Hoffman and Gelman 2014; Betancourt 2017, appendix A).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Density", "Point", "Trajectory", "reasonable_step", "trajectory"]

#: Log density and its gradient at a vector.
Density = Callable[[Tensor], tuple[float, Tensor]]
#: Doublings after which a trajectory ends.
MOST_DOUBLINGS = 10
#: Loss of log density along a trajectory that no step of a stable size has (Stan's number).
DIVERGED = 1_000.0


class Point(NamedTuple):
    """A vector, its log density and the gradient of that."""

    position: Tensor
    density: float
    gradient: Tensor


class Trajectory(NamedTuple):
    """Where a trajectory led, and how it went.

    Attributes:
        end: the point drawn from it.
        acceptance: mean over its points of the probability with which a test would take them.
        steps: leapfrog steps made.
        diverged: whether it left the region in which the step is stable.
    """

    end: Point
    acceptance: float
    steps: int
    diverged: bool


class _Edge(NamedTuple):
    """An end of a trajectory: the point and its momentum."""

    point: Point
    momentum: Tensor


class _Tree(NamedTuple):
    """A stretch of a trajectory: its two ends, the point drawn from it, and sums over it.

    Attributes:
        weight: logarithm of the summed weights.
        total: sum of the momenta, for the test of turning.
        stops: whether it has turned or diverged.
    """

    left: _Edge
    right: _Edge
    chosen: Point
    weight: float
    total: Tensor
    acceptance: float
    steps: int
    stops: bool
    diverged: bool


class _Flow(NamedTuple):
    """What every leapfrog step of one trajectory needs."""

    density: Density
    step: float
    inverse_mass: Tensor
    start: float
    generator: torch.Generator | None


def _uniform(like: Tensor, generator: torch.Generator | None) -> float:
    return float(torch.rand((), generator=generator, dtype=torch.float64, device=like.device))


def _joint(edge: _Edge, inverse_mass: Tensor) -> float:
    """Log density of position and momentum."""
    return edge.point.density - 0.5 * float((edge.momentum.square() * inverse_mass).sum())


def _leap(edge: _Edge, density: Density, step: float, inverse_mass: Tensor) -> _Edge:
    half = edge.momentum + 0.5 * step * edge.point.gradient
    position = edge.point.position + step * inverse_mass * half
    value, gradient = density(position)
    return _Edge(Point(position, value, gradient), half + 0.5 * step * gradient)


def _turns(left: Tensor, right: Tensor, total: Tensor, inverse_mass: Tensor) -> bool:
    """Whether a stretch with these momenta at its ends, and this sum, goes back on itself at one of them."""
    along = inverse_mass * total
    return float(along @ left) <= 0.0 or float(along @ right) <= 0.0


def _leaf(flow: _Flow, edge: _Edge, forward: bool) -> _Tree:
    new = _leap(edge, flow.density, flow.step if forward else -flow.step, flow.inverse_mass)
    gain = _joint(new, flow.inverse_mass) - flow.start
    gain = gain if math.isfinite(gain) else -math.inf
    diverged = gain < -DIVERGED
    chance = math.exp(min(0.0, gain))
    return _Tree(new, new, new.point, gain, new.momentum, chance, 1, diverged, diverged)


def _joined(flow: _Flow, old: _Tree, new: _Tree, forward: bool, biased: bool) -> _Tree:
    """Two stretches that follow each other, as one; ``biased`` prefers the newer one's point."""
    first, second = (old, new) if forward else (new, old)
    top = max(old.weight, new.weight)
    weight = top if top == -math.inf else top + math.log(math.exp(old.weight - top) + math.exp(new.weight - top))
    total = old.total + new.total
    against = old.weight if biased else weight
    chance = 0.0 if new.weight == -math.inf else math.exp(min(0.0, new.weight - against))
    chosen = old.chosen
    if not new.stops and _uniform(total, flow.generator) < chance:
        chosen = new.chosen
    inverse, left, right = flow.inverse_mass, first.left.momentum, second.right.momentum
    stops = (
        old.stops
        or new.stops
        or _turns(left, right, total, inverse)
        # Across the seam too: two stretches that each go half a period round see no turn in their sum.
        or _turns(left, second.left.momentum, first.total + second.left.momentum, inverse)
        or _turns(first.right.momentum, right, second.total + first.right.momentum, inverse)
    )
    return _Tree(
        first.left,
        second.right,
        chosen,
        weight,
        total,
        old.acceptance + new.acceptance,
        old.steps + new.steps,
        stops,
        old.diverged or new.diverged,
    )


def _grown(flow: _Flow, edge: _Edge, depth: int, forward: bool) -> _Tree:
    """A stretch of 2^depth steps from an end; shorter where it turns or diverges on its way."""
    if depth == 0:
        return _leaf(flow, edge, forward)
    tree = _grown(flow, edge, depth - 1, forward)
    if tree.stops:
        return tree
    more = _grown(flow, tree.right if forward else tree.left, depth - 1, forward)
    return _joined(flow, tree, more, forward, biased=False)


def trajectory(
    density: Density, here: Point, step: float, inverse_mass: Tensor, generator: torch.Generator | None
) -> Trajectory:
    """Move a point by one trajectory, which leaves the density as it is.

    Args:
        density: log density and gradient; minus infinity or NaN where there is none.
        here: the point, where the density is finite.
        step: epsilon, in units in which the density's standard deviations are the roots of ``inverse_mass``.
        inverse_mass: diagonal of the inverse of M, an estimate of the density's variances.
        generator: of all random numbers, on the device of the point.
    """
    noise = torch.randn(here.position.shape, generator=generator, dtype=torch.float64, device=here.position.device)
    edge = _Edge(here, noise * inverse_mass.rsqrt())
    flow = _Flow(density, step, inverse_mass, _joint(edge, inverse_mass), generator)
    tree = _Tree(edge, edge, here, 0.0, edge.momentum, 0.0, 0, False, False)
    for depth in range(MOST_DOUBLINGS):
        forward = _uniform(noise, generator) < 0.5
        more = _grown(flow, tree.right if forward else tree.left, depth, forward)
        tree = _joined(flow, tree, more, forward, biased=True)
        if tree.stops:
            break
    return Trajectory(tree.chosen, tree.acceptance / tree.steps, tree.steps, tree.diverged)


def reasonable_step(
    density: Density, here: Point, step: float, inverse_mass: Tensor, generator: torch.Generator | None
) -> float:
    """Return a step at which one leapfrog step is taken with a probability of about 0.8, by doubling and halving."""
    noise = torch.randn(here.position.shape, generator=generator, dtype=torch.float64, device=here.position.device)
    edge = _Edge(here, noise * inverse_mass.rsqrt())
    start, grows = _joint(edge, inverse_mass), None
    for _ in range(60):
        gain = _joint(_leap(edge, density, step, inverse_mass), inverse_mass) - start
        taken = math.isfinite(gain) and gain > math.log(0.8)
        if grows is None:
            grows = taken
        if taken != grows:
            break
        step = step * 2.0 if grows else step * 0.5
    return step

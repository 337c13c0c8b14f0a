"""Slice sampling of many one-dimensional densities at once: no step size to choose, exact for each."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["slice_draw"]

#: Steps outward, and shrinkings, after which a density is taken for one that has no slice.
MOST_STEPS = 1_000


def slice_draw(
    log_density: Callable[[Tensor], Tensor],
    start: Tensor,
    width: Tensor,
    generator: torch.Generator | None,
) -> Tensor:
    r"""Move each coordinate once by slice sampling, with stepping out and shrinkage.

    A height :math:`\log y = \log f(x) - E`, E exponential, is drawn; an interval of ``width`` around x grows by its
    width at either end until both ends lie below the height, and is shrunk towards x until a uniform point of it lies
    above. The density is left as it is for every width.

    Args:
        log_density: by coordinate, each of its own coordinate alone; minus infinity outside the support.
        start: x, where every density is finite.
        width: of the first interval, positive; of x's shape.
        generator: of all random numbers, which it takes as many of as it needs.

    Returns:
        The new point, of x's shape and dtype.

    Raises:
        ValueError: a density that is not finite at the start.
        RuntimeError: a density with no bounded slice.

    References:
        Slice sampling, Neal, 2003, Annals of Statistics 31(3), figures 3 and 5.
    """
    at_start = log_density(start)
    if not bool(torch.isfinite(at_start).all()):
        raise ValueError("the density is not finite where slice sampling starts.")
    height = at_start + torch.log1p(-_uniform(start, generator))
    low = start - width * _uniform(start, generator)
    high = low + width
    for end, step in ((low, -width), (high, width)):
        for _ in range(MOST_STEPS):
            inside = log_density(end) > height
            if not bool(inside.any()):
                break
            end.add_(torch.where(inside, step, torch.zeros_like(step)))
        else:
            raise RuntimeError("slice sampling found no end of the slice: the density does not fall off.")
    point, waiting = start.clone(), torch.ones_like(start, dtype=torch.bool)
    for _ in range(MOST_STEPS):
        proposal = torch.where(waiting, low + (high - low) * _uniform(start, generator), point)
        taken = waiting & (log_density(proposal) >= height)
        point = torch.where(taken, proposal, point)
        waiting = waiting & ~taken
        if not bool(waiting.any()):
            return point
        below = proposal < start
        low = torch.where(waiting & below, proposal, low)
        high = torch.where(waiting & ~below, proposal, high)
    return torch.where(waiting, start, point)  # a slice narrower than a rounding


def _uniform(like: Tensor, generator: torch.Generator | None) -> Tensor:
    return torch.rand(like.shape, generator=generator, dtype=like.dtype, device=like.device)


def log_width(count: float) -> float:
    """Width of the first interval for the logarithm of a scale that ``count`` normal numbers show: a few of its sds."""
    return 4.0 / math.sqrt(1.0 + 2.0 * count)


def coordinatewise(
    log_density: Callable[[Tensor], Tensor], start: Tensor, width: float, generator: torch.Generator | None
) -> Tensor:
    """Move each coordinate of one joint density once, in turn, by slice sampling (:func:`slice_draw`).

    Args:
        log_density: of a vector, a scalar.
        start: a vector ``[D]`` where the density is finite.
        width: of each first interval.
        generator: of all random numbers.
    """
    point = start.clone()
    for k in range(len(point)):

        def along(x: Tensor, below: Tensor = point[:k], above: Tensor = point[k + 1 :]) -> Tensor:
            return log_density(torch.cat([below, x, above])).reshape(1)

        moved = slice_draw(along, point[k : k + 1], point.new_full((1,), width), generator)
        point = torch.cat([point[:k], moved, point[k + 1 :]])
    return point

"""Points of a search space, drawn at random with a fixed seed, the given one first."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

__all__ = ["drawn_points", "one_of_each"]

#: Draws for each point that is wanted: a small space has fewer points than that.
PATIENCE = 100


def drawn_points(
    draw: Callable[[random.Random], Mapping[str, Any]], number: int, seed: int = 0
) -> list[dict[str, Any]]:
    """Draw different points, the first of which changes nothing.

    Args:
        draw: one point: what it changes, by dimension.
        number: of points, at most; fewer where the space has no more.
        seed: of the draws.

    Example:
        >>> drawn_points(lambda r: {"rate": r.choice([0.5, 2.0])}, 8)
        [{}, {'rate': 2.0}, {'rate': 0.5}]
    """
    chosen = random.Random(seed)
    points: list[dict[str, Any]] = [{}]
    for _ in range(PATIENCE * number):
        if len(points) >= number:
            break
        point = dict(draw(chosen))
        if point not in points:
            points.append(point)
    return points


def one_of_each(dimensions: Mapping[str, Sequence[str]], chosen: random.Random) -> dict[str, str]:
    """Draw an alternative of each dimension, or none of it, all alike."""
    drawn = {name: chosen.choice(["", *alternatives]) for name, alternatives in dimensions.items()}
    return {name: value for name, value in drawn.items() if value}

r"""The two steps of online EM as one compiled loop each: every number is read once, and nothing is written between.

Operation by operation, an E-step of component j writes :math:`x - \mu_j` and its quotient by :math:`V_j` and reads both
again; pieces that fit the cache hide that on a CPU (:mod:`~pyro_lift.inference.tiles`) but not on an accelerator, and
each operation has to be started. ``torch.compile`` makes one loop over x and all K means and variances, and one over
the vectors of the component that moves, for a CPU (a C++ compiler is needed) as for CUDA (Triton).

Sums are taken in rows of :data:`ROW` numbers, in the vectors' own precision, and of the rows in float64. The logarithm
of a variance would cost the M-step three times its traffic on a CPU: it is taken of products of four, one from each
of four rows that follow each other. What is left over by rows and fours goes through the same functions, not compiled.
"""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["ROW", "FusedSteps", "compiles"]

#: Numbers to a partial sum.
ROW = 1024
LANES = 4


def quadratics(x: Tensor, means: Sequence[Tensor], variances: Sequence[Tensor]) -> Tensor:
    """Sums over rows of (x - mu)^2 / V: ``[K, rows]`` of ``[rows, n]`` each."""
    return torch.stack([((x - m).square() / v).sum(-1) for m, v in zip(means, variances, strict=True)])


def move(
    x: Sequence[Tensor], mean: Sequence[Tensor], variance: Sequence[Tensor], w: Tensor, floor: Tensor, scale: Tensor
) -> Tensor:
    """Mean and variance of one component moved to x, in place; a list has one entry a lane, ``[rows, n]``.

    Returns:
        Sums over rows of the logarithm of the product over lanes of ``scale`` V: ``[rows]``.
    """
    product = None
    for x_l, m, v in zip(x, mean, variance, strict=True):
        gap = x_l - m
        moved = ((1.0 - w) * v + w * (1.0 - w) * gap.square()).clamp_min(floor)
        m.copy_(m + w * gap)
        v.copy_(moved)
        scaled = moved * scale
        product = scaled if product is None else product * scaled
    assert product is not None
    return product.log().sum(-1)


def pool_and_move(
    x: Sequence[Tensor],
    mean: Sequence[Tensor],
    variance: Sequence[Tensor],
    mean_average: Sequence[Tensor],
    variance_average: Sequence[Tensor],
    share: Tensor,
    *numbers: Tensor,
) -> Tensor:
    """As :func:`move`, after ``share`` of the component as it stands has been taken into its average, in place."""
    for m, v, m_a, v_a in zip(mean, variance, mean_average, variance_average, strict=True):
        gap = m - m_a
        v_a.copy_(v_a + share * (v - v_a) + share * (1.0 - share) * gap.square())
        m_a.copy_(m_a + share * gap)
    return move(x, mean, variance, *numbers)


@functools.cache
def _compiled(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return torch.compile(function)


@functools.cache
def compiles(device: str) -> bool:
    """Whether ``torch.compile`` works for a device type here; tried once, and a warning says what it lacks."""
    x = torch.ones(2, ROW, device=device)
    try:
        with torch.no_grad():
            _compiled(quadratics)(x, [x, x], [x, x])
    except Exception as error:  # what a missing compiler raises is torch's affair, and changes
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        warnings.warn(f"the mixture's update is not compiled on {device}: {reason}", stacklevel=3)
        return False
    return True


class FusedSteps:
    """The steps on the vectors of one diagonal mixture.

    Args:
        dim: their length.
        row: numbers to a partial sum.
    """

    def __init__(self, dim: int, row: int = ROW) -> None:
        self.row = row
        self.head = dim // (LANES * row) * LANES * row
        self.dim = dim

    def quadratics(self, x: Tensor, means: Sequence[Tensor], variances: Sequence[Tensor]) -> list[float]:
        """(x - mu_j)' V_j^-1 (x - mu_j) of each component."""

        def rows(part: Tensor) -> Tensor:
            return part[: self.head].view(-1, self.row)

        def rest(part: Tensor) -> Tensor:
            return part[self.head :].unsqueeze(0)

        sums = self._both(quadratics, rows, rest, x, means, variances)
        values: list[float] = torch.stack([part.double().sum(-1) for part in sums]).sum(0).tolist()
        return values

    def move(
        self,
        x: Tensor,
        mean: Tensor,
        variance: Tensor,
        average: tuple[Tensor, Tensor] | None,
        *,
        share: float,
        w: float,
        floor: float,
        exponent: int,
    ) -> float:
        """The M-step of one component, in place.

        Args:
            x: ``[D]``, the draw.
            mean: of the component.
            variance: of the component.
            average: mean and variance of its average; None leaves it alone.
            share: of the component as it stands, taken into the average first.
            w: of the draw, in the component.
            floor: least variance.
            exponent: variances are about two to this power.

        Returns:
            The log-determinant of the new variance, or a number that is not finite where products left the range.
        """

        def lanes(part: Tensor) -> tuple[Tensor, ...]:
            return part[: self.head].view(-1, LANES, self.row).unbind(1)

        def rest(part: Tensor) -> tuple[Tensor, ...]:
            return (part[self.head :].unsqueeze(0),)

        listed = torch.tensor([share, w, floor, 2.0**-exponent], dtype=x.dtype)
        numbers = listed.to(x.device, non_blocking=True).unbind()
        if average is None:
            evidence = self._both(move, lanes, rest, x, mean, variance, numbers=numbers[1:])
        else:
            evidence = self._both(pool_and_move, lanes, rest, x, mean, variance, *average, numbers=numbers)
        return float(torch.stack([part.double().sum() for part in evidence]).sum()) + self.dim * exponent * math.log(
            2.0
        )

    def _both(
        self,
        function: Callable[..., Tensor],
        head: Callable[[Tensor], Any],
        rest: Callable[[Tensor], Any],
        *vectors: Tensor | Sequence[Tensor],
        numbers: Sequence[Tensor] = (),
    ) -> list[Tensor]:
        """Call the function over whole rows, compiled, and over the numbers that they leave."""
        results = []
        with torch.no_grad():
            for present, cut, call in (
                (self.head > 0, head, _compiled(function)),
                (self.head < self.dim, rest, function),
            ):
                if present:
                    parts = [cut(v) if isinstance(v, Tensor) else [cut(row) for row in v] for v in vectors]
                    results.append(call(*parts, *numbers))
        return results

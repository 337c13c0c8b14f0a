"""Step-size schedules: functions from the number of steps taken to a positive float, which pickle and compare."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

__all__ = ["Constant", "Cyclical", "Polynomial", "Schedule", "as_schedule", "constant", "cyclical", "polynomial"]

Schedule = Callable[[int], float]


def _check(name: str, value: float, *, above: float = 0.0) -> None:
    if not (math.isfinite(value) and value > above):
        raise ValueError(f"{name}={value!r}: expected a finite number above {above:g}.")


@dataclass(frozen=True)
class Constant:
    """The schedule of :func:`constant`."""

    step_size: float

    def __call__(self, step: int) -> float:
        """Return the step size at a number of steps taken."""
        return self.step_size


@dataclass(frozen=True)
class Polynomial:
    """The schedule of :func:`polynomial`."""

    step_size: float
    offset: float
    power: float

    def __call__(self, step: int) -> float:
        """Return the step size at a number of steps taken."""
        return float(self.step_size * (1.0 + step / self.offset) ** -self.power)


@dataclass(frozen=True)
class Cyclical:
    """The schedule of :func:`cyclical`."""

    step_size: float
    period: int
    floor: float

    def __call__(self, step: int) -> float:
        """Return the step size at a number of steps taken."""
        share = 0.5 * (1.0 + math.cos(math.pi * (step % self.period) / self.period))
        return self.step_size * max(share, self.floor, 1e-12)


def constant(step_size: float) -> Schedule:
    r"""The same step always: :math:`\eta_t = \eta`.

    Example:
        >>> constant(0.1)(1_000)
        0.1
    """
    _check("step_size", step_size)
    return Constant(step_size)


def polynomial(step_size: float, *, offset: float = 1.0, power: float = 0.55) -> Schedule:
    r"""The decreasing steps of Welling and Teh: :math:`\eta_t = \eta\,(1 + t/b)^{-\gamma}`.

    With ``0.5 < power <= 1`` the sum of the steps diverges and the sum of their squares does not, the
    condition under which SGLD converges without a Metropolis test.

    Args:
        step_size: eta, the step at ``t = 0``.
        offset: b, the number of steps after which the step has shrunk by ``2 ** -power``.
        power: gamma.

    References:
        Bayesian learning via stochastic gradient Langevin dynamics, Welling and Teh, 2011.
    """
    _check("step_size", step_size)
    _check("offset", offset)
    _check("power", power)
    return Polynomial(step_size, offset, power)


def cyclical(step_size: float, *, period: int, floor: float = 0.0) -> Schedule:
    r"""Cosine cycles: :math:`\eta_t = \eta\,\max\{\tfrac12(1 + \cos(\pi\,(t \bmod p)/p)),\ f\}`.

    Args:
        step_size: eta, the step at the start of each cycle.
        period: p, the number of steps in a cycle.
        floor: f, the least share of eta; above zero keeps the chain moving at the end of a cycle.

    References:
        Cyclical stochastic gradient MCMC for Bayesian deep learning, Zhang et al., 2020, arXiv:1902.03932.
    """
    _check("step_size", step_size)
    if period < 1:
        raise ValueError(f"period={period!r}: expected at least one step in a cycle.")
    if not 0.0 <= floor <= 1.0:
        raise ValueError(f"floor={floor!r}: expected a share of the step size, between 0 and 1.")
    return Cyclical(step_size, period, floor)


def as_schedule(step_size: float | Schedule) -> Schedule:
    """A schedule as it is; a number as a constant schedule.

    Raises:
        ValueError: the number is not positive and finite.
        TypeError: neither a number nor callable.
    """
    if callable(step_size):
        return step_size
    if isinstance(step_size, (int, float)) and not isinstance(step_size, bool):
        return constant(float(step_size))
    raise TypeError(f"step_size={step_size!r}: expected a positive number or a function of the step count.")

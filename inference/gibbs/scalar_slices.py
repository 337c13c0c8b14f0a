"""Slice sampling of one number in plain Python: a tensor of one element costs more to handle than to compute with."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, distributions
from torch.distributions import AffineTransform, ComposeTransform, Distribution, ExpTransform, Transform

from pyro_lift.inference.gibbs.scales import ScaleSite
from pyro_lift.inference.slice_sampling import MOST_STEPS

__all__ = ["is_exponential", "plain_density", "scalar_density", "scalar_slice"]

#: Random numbers that are drawn at a time.
DRAWN = 16


def scalar_slice(
    log_density: Callable[[float], float],
    start: float,
    width: float,
    generator: torch.Generator | None,
    device: torch.device,
) -> float:
    """Move one number once by slice sampling: :func:`~pyro_lift.inference.slice_sampling.slice_draw` of one element.

    Args:
        log_density: of it; minus infinity outside the support.
        start: where the density is finite.
        width: of the first interval.
        generator: of all random numbers.
        device: of the generator.

    Raises:
        ValueError: a density that is not finite at the start.
        RuntimeError: a density with no bounded slice.
    """
    at_start = log_density(start)
    if not math.isfinite(at_start):
        raise ValueError("the density is not finite where slice sampling starts.")
    uniform = _uniforms(generator, device)
    height = at_start + math.log1p(-next(uniform))
    low = start - width * next(uniform)
    high = low + width
    for _ in range(MOST_STEPS):
        if not log_density(low) > height:
            break
        low -= width
    else:
        raise RuntimeError("slice sampling found no end of the slice: the density does not fall off.")
    for _ in range(MOST_STEPS):
        if not log_density(high) > height:
            break
        high += width
    else:
        raise RuntimeError("slice sampling found no end of the slice: the density does not fall off.")
    for _ in range(MOST_STEPS):
        point = low + (high - low) * next(uniform)
        if log_density(point) >= height:
            return point
        low, high = (point, high) if point < start else (low, point)
    return start  # a slice narrower than a rounding


def _uniforms(generator: torch.Generator | None, device: torch.device) -> Iterator[float]:
    while True:
        yield from torch.rand(DRAWN, generator=generator, dtype=torch.float64, device=device).tolist()


def scalar_density(site: ScaleSite, leaf: Tensor, element: int) -> Callable[[float], float]:
    """Return the log prior density of the logarithm x of one element of a scale site, up to a constant.

    Args:
        site: positive.
        leaf: where all of it stands, unconstrained.
        element: which one.
    """
    plain = plain_density(site.prior) if leaf.numel() == 1 else None
    if plain is not None:
        return lambda x: plain(_exp(x)) + x
    x0 = site.value(leaf.double()).log()

    def density(x: float) -> float:
        at = x0.clone().reshape(-1)
        at[element] = x
        value = at.view(leaf.shape).exp()
        try:
            return float(site.prior.log_prob(value).expand(leaf.shape).reshape(-1)[element]) + x
        except ValueError:  # outside the support, where the distribution is validated
            return -math.inf

    return density


def _exp(x: float) -> float:
    return math.exp(x) if x < 700.0 else math.inf


def is_exponential(transform: Transform | None) -> bool:
    """Whether a map to the positive numbers is the exponential function, as Pyro writes it."""
    if isinstance(transform, ComposeTransform):
        first, *others = transform.parts
        plain = all(isinstance(t, AffineTransform) and bool(t.loc == 0.0) and bool(t.scale == 1.0) for t in others)
        return plain and is_exponential(first)
    return isinstance(transform, ExpTransform)


def plain_density(prior: Distribution) -> Callable[[float], float] | None:
    """Return the log density of a positive number up to a constant, in floats; None for a law that is not known here.

    Known are ``HalfCauchy``, ``HalfNormal``, ``Exponential``, ``LogNormal``, ``Gamma``, ``InverseGamma`` and
    ``Uniform``, of one number.
    """
    if not type(prior).__module__.startswith(("torch.distributions.", "pyro.distributions.")):
        return None
    if prior.batch_shape.numel() != 1 or prior.event_shape:
        return None
    if isinstance(prior, distributions.HalfCauchy):
        scale = float(prior.scale)
        return lambda v: -math.log1p((v / scale) ** 2) if 0.0 <= v < 1e150 * scale else -math.inf
    if isinstance(prior, distributions.HalfNormal):
        scale = float(prior.scale)
        return lambda v: -0.5 * (v / scale) ** 2 if 0.0 <= v < 1e150 * scale else -math.inf
    if isinstance(prior, distributions.Exponential):
        rate = float(prior.rate)
        return lambda v: -rate * v if v >= 0.0 else -math.inf
    if isinstance(prior, distributions.LogNormal):
        loc, spread = float(prior.loc), float(prior.scale)
        return _positive(lambda v, x: -x - 0.5 * ((x - loc) / spread) ** 2)
    if isinstance(prior, distributions.InverseGamma):
        shape, rate = float(prior.concentration), float(prior.rate)
        return _positive(lambda v, x: -(shape + 1.0) * x - rate / v)
    if isinstance(prior, distributions.Gamma):
        shape, rate = float(prior.concentration), float(prior.rate)
        return _positive(lambda v, x: (shape - 1.0) * x - rate * v)
    if isinstance(prior, distributions.Uniform):
        low, high = float(prior.low), float(prior.high)
        return lambda v: 0.0 if low < v < high else -math.inf
    return None


def _positive(density: Callable[[float, float], float]) -> Callable[[float], float]:
    """A density of v > 0 and its logarithm as one of v."""
    return lambda v: density(v, math.log(v)) if 0.0 < v < math.inf else -math.inf

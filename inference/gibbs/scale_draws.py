r"""The exact draw of unknown scales given all theta_i and phi, from running sums alone.

With :math:`Q_d = \sum_i (\theta_{id} - \phi_d)^2` and the law :math:`\log v_d = a_d + \kappa x_{g(d)}` of a family's
variance (:mod:`~pyro_lift.inference.gibbs.scales`), each element of a scale site has a density of its own,

.. math:: \log p(u_k \mid \theta_{1..N}, \phi) = \log p(u_k)
          - \tfrac12 \kappa\, N n_k\, x_k - \tfrac12 e^{-\kappa x_k} B_k, \qquad
          n_k = |\{d : g(d) = k\}|, \quad B_k = \sum_{d:\,g(d)=k} Q_d\,e^{-a_d},

summed over the families that share the site; u is the site in unconstrained space. A gamma prior of a precision
(:math:`\kappa = -1`) and an inverse gamma prior of a variance (:math:`\kappa = 1`) are conjugate; every other prior is
drawn by slice sampling in u. At a temperature T the density is raised to 1/T, in u.

Q is kept around the current phi, in float64: a move of theta_i and phi together leaves it as it is, and it has no
difference of large numbers in it, however far from zero phi is.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributions import Gamma, InverseGamma

from pyro_lift.inference.gibbs.conjugate import NormalPair
from pyro_lift.inference.gibbs.dense import CorrelationSite, draw_covariance
from pyro_lift.inference.gibbs.regression import Regression
from pyro_lift.inference.gibbs.scalar_slices import is_exponential, plain_density, scalar_slice
from pyro_lift.inference.gibbs.scales import ScaleLaw, ScaleSite
from pyro_lift.inference.gibbs.state import Structure
from pyro_lift.inference.program import Rows
from pyro_lift.inference.slice_sampling import log_width, slice_draw

__all__ = ["Seen", "draw_scale", "draw_scales", "moved_square", "squares_around"]

#: Logarithms of a variance beyond which it is not representable, with room for its products.
LARGEST_LOG = {torch.float32: 70.0, torch.float64: 500.0}


class Seen(NamedTuple):
    """What one family tells of its scale: the law of its variance, and Q by coordinate of phi."""

    law: ScaleLaw
    square: Tensor


def moved_square(Q: Tensor, S: Tensor, num_tasks: int, before: Tensor, after: Tensor) -> Tensor:
    r"""Q around another phi: :math:`Q - 2\,\delta\,(S - N\phi) + N\delta^2`, with :math:`\delta = \phi' - \phi`."""
    delta, rest = after.double() - before.double(), S - num_tasks * before.double()
    if Q.dim() > before.dim():  # the whole scatter
        cross = torch.outer(delta, rest)
        return Q - cross - cross.T + num_tasks * torch.outer(delta, delta)
    return (Q - 2.0 * delta * rest + num_tasks * delta.square()).clamp_min(0.0)


def squares_around(
    structure: Structure, squares: Mapping[str, Tensor], sums: Mapping[str, Tensor], before: Rows, after: Rows
) -> dict[str, Tensor]:
    """Q of every family of unknown scale, around another phi."""
    return {
        name: moved_square(Q, sums[name], structure.num_tasks, before[name], after[name])
        for name, Q in squares.items()
        if name in structure.pairs
    }


def draw_scales(
    structure: Structure,
    phi: Rows,
    squares: Mapping[str, Tensor],
    temperature: float,
    generator: torch.Generator | None,
) -> dict[str, Tensor]:
    """Draw every scale site given all theta_i and phi.

    Args:
        structure: of the program.
        phi: all global sites, unconstrained.
        squares: Q around this phi, by the global site that is the mean, and by the regression's own name.
        temperature: T.
        generator: on the device of the values.
    """
    drawn: dict[str, Tensor] = {}
    levels: dict[str, NormalPair | Regression] = dict(structure.pairs)
    levels |= {level.square: level for level in structure.regressions.values()}
    for key, level in levels.items():
        if level.dense is not None and (level.law is not None or level.dense.site is not None):
            drawn |= _draw_dense(structure, level, phi, squares[key], temperature, generator)
    laws = {key: level.law for key, level in levels.items() if level.law is not None}
    for name, site in structure.scales.items():
        if name in drawn or not isinstance(site, ScaleSite):
            continue
        seen = [Seen(law, squares[key].view(law.shape)) for key, law in laws.items() if law.site == name]
        drawn[name] = draw_scale(site, seen, structure.num_tasks, temperature, phi[name], generator)
    return drawn


def _draw_dense(
    structure: Structure,
    pair: NormalPair | Regression,
    phi: Rows,
    M: Tensor,
    temperature: float,
    generator: torch.Generator | None,
) -> dict[str, Tensor]:
    """Draw the scale site and the correlation site of one family of correlated coordinates."""
    assert pair.dense is not None
    scale = None if pair.law is None else structure.scales[pair.law.site]
    correlation = None if pair.dense.site is None else structure.scales[pair.dense.site]
    of_scale = (scale, pair.law, phi[scale.name]) if isinstance(scale, ScaleSite) and pair.law is not None else None
    of_correlation = (correlation, phi[correlation.name]) if isinstance(correlation, CorrelationSite) else None
    known = (pair.local_variance, pair.dense.correlation)
    moved = draw_covariance(of_scale, of_correlation, known, M, structure.num_tasks, temperature, generator)
    names = (scale and scale.name, correlation and correlation.name)
    return {name: value for name, value in zip(names, moved, strict=True) if name is not None and value is not None}


def draw_scale(
    site: ScaleSite,
    seen: list[Seen],
    num_tasks: int,
    temperature: float,
    leaf: Tensor,
    generator: torch.Generator | None,
) -> Tensor:
    """Draw one scale site, element by element: by its conjugate where there is one, else by a slice around ``leaf``.

    Args:
        site: the scale site.
        seen: what each family that hangs on it tells.
        num_tasks: N.
        temperature: T, above zero.
        leaf: where the site stands, unconstrained.
        generator: of the draw.

    Returns:
        The new point in unconstrained space, of the leaf's dtype.
    """
    drawn = _of_one_number(site, seen, num_tasks, temperature, leaf, generator)
    if drawn is not None:
        return drawn.to(leaf.dtype)
    u = leaf.detach().double()
    with torch.no_grad():
        counts = [num_tasks * law.gathered(torch.ones_like(Q), u) for law, Q in seen]
        weighted = [law.gathered(Q * torch.exp(-law.offset), u) for law, Q in seen]
        drawn = _conjugate(site, [law for law, _ in seen], counts, weighted, temperature, generator)
        if drawn is None:
            largest = LARGEST_LOG.get(leaf.dtype, 70.0)

            def log_density(at: Tensor) -> Tensor:
                value = site.value(at)
                total = site.log_prior(at, value)
                for (law, _), n, B in zip(seen, counts, weighted, strict=True):
                    along = law.power * law.coordinate(value)
                    total = total - 0.5 * n * along - 0.5 * torch.exp(-along) * B
                    total = torch.where(along.abs() < largest, total, -torch.inf)
                return torch.nan_to_num(total / temperature, nan=-torch.inf)

            width = torch.full_like(u, log_width(float(min(n.min() for n in counts)) / temperature))
            drawn = slice_draw(log_density, u, width, generator)
    return drawn.to(leaf.dtype)


def _of_one_number(
    site: ScaleSite,
    seen: list[Seen],
    num_tasks: int,
    temperature: float,
    leaf: Tensor,
    generator: torch.Generator | None,
) -> Tensor | None:
    """The slice of a site of one number, along its logarithm in floats; None where its law is not known in floats.

    At a temperature other than 1 the density is raised to its power in unconstrained space, which then must be that of
    the logarithm.
    """
    if leaf.numel() != 1 or isinstance(site.prior, Gamma | InverseGamma) or not all(law.logarithmic for law, _ in seen):
        return None
    plain = plain_density(site.prior)
    exponential = is_exponential(site.transform)
    if plain is None or not (exponential or temperature == 1.0):
        return None
    density = plain
    terms = [(law.power, float(num_tasks * Q.numel()), float((Q * torch.exp(-law.offset)).sum())) for law, Q in seen]
    largest = LARGEST_LOG.get(leaf.dtype, 70.0)

    def log_density(x: float) -> float:
        if max(abs(power * x) for power, _, _ in terms) >= largest:
            return -math.inf
        total = density(math.exp(x)) + x
        return (total - 0.5 * sum(n * power * x + math.exp(-power * x) * B for power, n, B in terms)) / temperature

    width = log_width(min(n for _, n, _ in terms) / temperature)
    u = leaf.detach().double()
    start = float(u) if exponential else math.log(float(site.value(u)))
    drawn = torch.full_like(u, scalar_slice(log_density, start, width, generator, leaf.device))
    if exponential or site.transform is None:
        return drawn if exponential else drawn.exp()
    inverse: Tensor = site.transform.inv(drawn.exp())
    return inverse


def _conjugate(
    site: ScaleSite,
    laws: list[ScaleLaw],
    counts: list[Tensor],
    weighted: list[Tensor],
    temperature: float,
    generator: torch.Generator | None,
) -> Tensor | None:
    r"""The draw from a gamma or inverse gamma law; None where the prior is no conjugate.

    In :math:`u = \log\tau` the densities are :math:`e^{\pm(\alpha u) - \beta e^{\pm u}}`, so that a power 1/T of them
    is of the same kind, with both parameters over T.
    """
    powers = {law.power for law in laws}
    # Torch's inverse gamma is a transformed gamma distribution of its reciprocal.
    inverse = isinstance(site.prior, InverseGamma)
    prior: Any = site.prior.base_dist if inverse else site.prior  # type: ignore[attr-defined]
    if not isinstance(prior, Gamma) or not all(law.logarithmic for law in laws):
        return None
    sign = 1.0 if inverse else -1.0
    if powers != {sign}:
        return None
    shape = (prior.concentration.double() + 0.5 * sum(counts)) / temperature
    rate = (prior.rate.double() + 0.5 * sum(weighted)) / temperature
    shape, rate = torch.broadcast_tensors(shape, rate)
    log_precision: Tensor = torch._standard_gamma(shape.contiguous(), generator=generator).log() - rate.log()
    return log_precision if sign < 0.0 else -log_precision

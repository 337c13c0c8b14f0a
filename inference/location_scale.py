r"""Sites of a location and a scale in other coordinates: :math:`x = m + s\,z`, z having no parameter of either.

Where data are weak, theta and its scale hold each other in these coordinates least; where they are strong, in theta's
own (Papaspiliopoulos, Roberts and Sköld 2007). A sampler that moves in both in turn is slow in neither.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributions import (
    Cauchy,
    Distribution,
    Gumbel,
    Laplace,
    LogNormal,
    MultivariateNormal,
    Normal,
    StudentT,
    Transform,
)
from torch.distributions.transforms import AffineTransform, ComposeTransform, ExpTransform, IndependentTransform

from pyro_lift.inference.supports import innermost

__all__ = ["Distance", "LocationScale", "location_scale"]


class LocationScale(NamedTuple):
    """Location and scale of a site in unconstrained space.

    Attributes:
        loc: m, which broadcasts to the site's shape.
        scale: s, likewise; a lower triangular matrix in its last two dimensions where ``dense``.
        standard: the law of z, element by element.
    """

    loc: Tensor
    scale: Tensor
    standard: Distribution
    dense: bool = False

    def leaf(self, raw: Tensor) -> Tensor:
        """Return x at z."""
        if self.dense:
            return self.loc + (self.scale @ raw.unsqueeze(-1)).squeeze(-1)
        return self.loc + self.scale * raw

    def raw(self, leaf: Tensor) -> Tensor:
        """Return z at x."""
        away = leaf - self.loc
        if self.dense:
            solved: Tensor = torch.linalg.solve_triangular(self.scale, away.unsqueeze(-1), upper=False)
            return solved.squeeze(-1)
        return away / self.scale

    def log_density(self, raw: Tensor) -> Tensor:
        """Return the log density of z, summed.

        It is that of x times the Jacobian, but not computed so: where s is small beside m, x has lost z to rounding,
        and would seem the likelier the smaller s is.
        """
        return self.standard.log_prob(raw).sum()


class Distance(NamedTuple):
    """A site by its distance z from a location, in scales."""

    z: Tensor
    around: LocationScale

    def log_density(self) -> Tensor:
        """Return the log density of z, summed."""
        return self.around.log_density(self.z)


def location_scale(fn: Distribution, transform: Transform | None) -> LocationScale | None:
    """Return location and scale of a distribution in unconstrained space; None where it has none.

    Args:
        fn: of the site.
        transform: from unconstrained space; None for the identity.
    """
    base = innermost(fn)
    if isinstance(base, LogNormal):
        return LocationScale(base.loc, base.scale, _unit(Normal, base.loc)) if _is_exponential(transform) else None
    if transform is not None:
        return None
    if isinstance(base, MultivariateNormal):
        return LocationScale(base.loc, base.scale_tril, _unit(Normal, base.loc), dense=True)
    if isinstance(base, StudentT):
        return LocationScale(base.loc, base.scale, _unit(partial(StudentT, base.df), base.loc))
    if isinstance(base, (Normal, Laplace, Cauchy, Gumbel)):
        return LocationScale(base.loc, base.scale, _unit(type(base), base.loc))
    return None


def _unit(law: Callable[..., Distribution], like: Tensor) -> Distribution:
    """Return a law of location zero and scale one."""
    return law(torch.zeros((), dtype=like.dtype, device=like.device), 1.0, validate_args=False)


def _is_exponential(transform: Transform | None) -> bool:
    """Whether a map to the positive numbers is the exponential; PyTorch puts a shift by zero behind it."""
    while isinstance(transform, IndependentTransform):
        transform = transform.base_transform
    if not isinstance(transform, ComposeTransform):
        return isinstance(transform, ExpTransform)
    first, *rest = transform.parts
    return isinstance(first, ExpTransform) and all(
        isinstance(part, AffineTransform) and part.loc == 0 and part.scale == 1 for part in rest
    )

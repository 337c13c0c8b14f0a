r"""Families whose coordinates are correlated: theta_i ~ MVN(phi, diag(s) R diag(s)), the s known or a scale site's law,
the correlations R known or :math:`L L^\top` of an ``LKJCholesky`` site L.

.. math:: \log p(s, R \mid \theta_{1..N}, \phi) = \log p(s) + \log p(R)
          - \tfrac N2 \log\det\Sigma - \tfrac12 \operatorname{tr}\big(\Sigma^{-1} M\big), \qquad
          M = \sum_i (\theta_i - \phi)(\theta_i - \phi)^\top,

which is drawn coordinate by coordinate of unconstrained space, by slice sampling; phi given the rest is normal, and
theta's step is exact under its own prior, as the exponential integrator is for a diagonal one.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributions import Distribution, LKJCholesky, MultivariateNormal, Transform

from pyro_lift.inference.dependence import Links
from pyro_lift.inference.gibbs.normal_sites import dense_normal, listed
from pyro_lift.inference.gibbs.scales import ScaleLaw, ScaleSite
from pyro_lift.inference.program import Evaluation, Latent
from pyro_lift.inference.slice_sampling import coordinatewise, log_width
from pyro_lift.inference.supports import innermost

__all__ = [
    "CorrelationSite",
    "Dense",
    "correlation_fault",
    "correlation_of",
    "correlation_site_fault",
    "covariance_of",
    "draw_covariance",
    "draw_mean",
    "is_correlation",
    "move_theta",
]

#: Where the unconstrained coordinate of a correlation ends: beyond, float64 takes the correlation for one.
FARTHEST = 15.0


class CorrelationSite(NamedTuple):
    r"""A global ``LKJCholesky`` site L, whose :math:`L L^\top` is the correlation matrix of one family.

    Attributes:
        name: of the site.
        prior: its distribution.
        transform: from unconstrained space.
    """

    name: str
    prior: Distribution
    transform: Transform

    def value(self, leaf: Tensor) -> Tensor:
        """Return L at a point of unconstrained space."""
        return self.transform(leaf)  # type: ignore[no-any-return]

    def log_prior(self, leaf: Tensor, value: Tensor) -> Tensor:
        """Return the log prior density in unconstrained space."""
        return self.prior.log_prob(value) + self.transform.log_abs_det_jacobian(leaf, value)  # type: ignore[no-any-return]


class Dense(NamedTuple):
    """How the coordinates of a family hang together.

    Attributes:
        correlation: R ``[D, D]``, where the site does not give it; float64.
        site: name of the site L; None where R is known.
    """

    correlation: Tensor
    site: str | None = None


def correlation_of(normal: MultivariateNormal) -> Tensor:
    """Return the correlation matrices ``[tasks, D, D]`` of a site, in float64."""
    covariance = normal.covariance_matrix.detach().double()
    sd = covariance.diagonal(dim1=-2, dim2=-1).sqrt()
    correlation = covariance / (sd.unsqueeze(-1) * sd.unsqueeze(-2))
    return correlation.reshape(-1, *correlation.shape[-2:])


def is_correlation(site: Latent) -> bool:
    """Whether a site is one of ``LKJCholesky``, plain."""
    plain = site.mask is None and not isinstance(site.scale, Tensor) and site.scale == 1.0
    base: Any = innermost(site.fn)
    return plain and isinstance(base, LKJCholesky) and not base.batch_shape and site.transform is not None


def correlation_fault(dense: Dense, child: Latent, run: Evaluation) -> str | None:
    """Why the correlations of a local site are not those of its family in the first tasks; None where they are."""
    normal = dense_normal(child)
    if normal is None:
        return f"the local site {child.name!r} is no multivariate normal, as in the first tasks"
    wanted = dense.correlation
    if dense.site is not None:
        L = run.globals[dense.site].value.detach().double()
        wanted = L @ L.T
    near = (correlation_of(normal) - wanted.to(normal.loc.device)).abs() <= 1e-4
    if not bool(near.all()):
        source = "the known ones" if dense.site is None else f"those of {dense.site!r}"
        return f"the correlations of the local site {child.name!r} are not {source}"
    return None


def correlation_site_fault(name: str, run: Evaluation, links: Links) -> str | None:
    """Why an ``LKJCholesky`` site is more than the correlations of one family; None where it is no more than that."""
    if links.laws[name]:
        return "its own distribution depends on another site"
    observed = [o for o, parents in links.observed.items() if name in parents]
    if observed:
        return f"an observed site depends on it directly ({listed(observed)})"
    children = links.children(name)
    for child in children:
        if child not in run.locals or dense_normal(run.latents[child]) is None:
            return f"the site {child!r}, which depends on it, is no local multivariate normal"
    if len({run.locals[child].family for child in children}) != 1:
        return "not exactly one local family depends on it"
    return None


def covariance_of(variance: Tensor, correlation: Tensor) -> Tensor:
    """Return :math:`diag(s) R diag(s)` from the variances :math:`s^2`."""
    sd = torch.broadcast_to(variance.double(), correlation.shape[-1:]).sqrt()
    return correlation * sd.unsqueeze(-1) * sd.unsqueeze(-2)


def draw_mean(
    prior_mean: Tensor, prior_precision: Tensor, covariance: Tensor, S: Tensor, num_tasks: int, noise: Tensor
) -> Tensor:
    r"""One exact draw of phi: precision :math:`A = \sigma^{-2} I + N\Sigma^{-1}`, mean
    :math:`A^{-1}(\sigma^{-2} m_0 + \Sigma^{-1} S)`.

    Args:
        prior_mean: m_0.
        prior_precision: 1/sigma^2.
        covariance: Sigma ``[D, D]``.
        S: sum of all theta.
        num_tasks: N.
        noise: standard normal times the root of the temperature, of phi's shape and dtype.
    """
    local = torch.cholesky_inverse(torch.linalg.cholesky(covariance))
    own = torch.broadcast_to(prior_precision.double(), S.shape)
    root = torch.linalg.cholesky(torch.diag(own) + num_tasks * local)
    pull = own * prior_mean.double() + local @ S
    mean = torch.cholesky_solve(pull.unsqueeze(-1), root)
    spread = torch.linalg.solve_triangular(root.T, noise.double().unsqueeze(-1), upper=True)
    drawn: Tensor = mean + spread
    return drawn.squeeze(-1).to(noise.dtype)


def move_theta(site: Latent, gradient: Tensor, step_size: float | Tensor, temperature: float, noise: Tensor) -> Tensor:
    r"""A step that moves exactly under the site's own multivariate normal prior, and by Euler under all else.

    It is :func:`~pyro_lift.inference.sgld.exponential` in the coordinates in which the prior is diagonal.

    Args:
        site: where it stands.
        gradient: of the log density, its own prior included.
        step_size: eta.
        temperature: T.
        noise: standard normal, of the site's shape.
    """
    normal = dense_normal(site)
    assert normal is not None
    covariance = normal.covariance_matrix.detach().double()
    x, loc = site.leaf.detach().double(), normal.loc.detach().double()
    variance, axes = torch.linalg.eigh(covariance.reshape(-1, *covariance.shape[-2:])[0])
    variance = variance.clamp_min(torch.finfo(variance.dtype).tiny)
    y = (x - loc) @ axes
    of_rest = gradient.double() @ axes + y / variance
    whole = -torch.expm1(-0.5 * step_size / variance)  # 1 - e
    y = y - whole * y + variance * whole * of_rest
    y = y + (temperature * variance * whole * (2.0 - whole)).sqrt() * (noise.double() @ axes)
    moved: Tensor = loc + y @ axes.T
    return moved.to(site.leaf.dtype)


def draw_covariance(
    scale: tuple[ScaleSite, ScaleLaw, Tensor] | None,
    correlation: tuple[CorrelationSite, Tensor] | None,
    fixed: tuple[Tensor, Tensor],
    M: Tensor,
    num_tasks: int,
    temperature: float,
    generator: torch.Generator | None,
) -> tuple[Tensor | None, Tensor | None]:
    """Draw the scales and correlations of one family given its scatter, each coordinate once, by slices.

    Args:
        scale: the scale site, its law, and where it stands in unconstrained space; None where scales are known.
        correlation: the site of correlations and where it stands; None where they are known.
        fixed: the variances and correlations to take where they are known.
        M: scatter around phi ``[D, D]``.
        num_tasks: N.
        temperature: T.
        generator: of the draws.

    Returns:
        The new points of both sites, None for one that is not there.
    """
    parts = [
        leaf.detach().double().reshape(-1)
        for leaf in (scale and scale[2], correlation and correlation[1])
        if leaf is not None
    ]
    split = 0 if scale is None else scale[2].numel()

    def log_density(u: Tensor) -> Tensor:
        total, variance, R = torch.zeros((), dtype=u.dtype, device=u.device), fixed[0], fixed[1]
        if scale is not None:
            leaf = u[:split].view(scale[2].shape)
            value = scale[0].value(leaf)
            total, variance = total + scale[0].log_prior(leaf, value).sum(), scale[1].variance(value)
        inner = u.new_ones((), dtype=torch.bool)
        if correlation is not None:
            leaf = u[split:].clamp(-FARTHEST, FARTHEST)
            inner = (leaf == u[split:]).all()
            L = correlation[0].value(leaf)
            total, R = total + correlation[0].log_prior(leaf, L), L @ L.T
        root, fault = torch.linalg.cholesky_ex(covariance_of(variance, R))
        inside = torch.cholesky_inverse(root)
        total = total - num_tasks * root.diagonal().log().sum() - 0.5 * (inside * M).sum()
        return torch.where(inner & (fault == 0) & torch.isfinite(total), total / temperature, -torch.inf)

    with torch.no_grad():
        u = coordinatewise(log_density, torch.cat(parts), 1.5 * log_width(0.5 * num_tasks / temperature), generator)
    moved_scale = None if scale is None else u[:split].view(scale[2].shape).to(scale[2].dtype)
    moved_correlation = None if correlation is None else u[split:].view(correlation[1].shape).to(correlation[1].dtype)
    return moved_scale, moved_correlation

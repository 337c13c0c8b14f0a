"""Gaussian and Gaussian-mixture priors in closed form: responsibilities, local Gaussians, broadening."""

from __future__ import annotations

from typing import NamedTuple

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import Distribution

__all__ = ["LocalGaussian", "broadened", "gaussian_at", "responsibilities"]


class LocalGaussian(NamedTuple):
    """A Gaussian, or one that touches a mixture at a point: mean and precision (1/variance), elementwise."""

    mean: Tensor
    precision: Tensor


def responsibilities(mixture: dist.MixtureSameFamily, value: Tensor) -> Tensor:
    r"""Compute the posterior probabilities of the components, :math:`r_j \propto \alpha_j\,p_j(x)`.

    Args:
        mixture: K components over vectors of length D.
        value: shape ``[..., D]``.

    Returns:
        Shape ``[..., K]``, in float64: past a thousand dimensions the log densities of two components differ
        by more than float32 can tell apart.
    """
    component = mixture.component_distribution
    base = _normal(component)
    x = value.unsqueeze(-2)
    if base is None:
        log_density = component.log_prob(x).double()
    else:
        z = ((x - base.loc) / base.scale).double()
        log_density = -0.5 * z.square().sum(-1) - base.scale.double().log().sum(-1)
    log_weight = mixture.mixture_distribution.logits.double()
    return torch.softmax(log_weight + log_density, dim=-1)


def gaussian_at(fn: Distribution, value: Tensor) -> LocalGaussian | None:
    r"""Find the Gaussian with the same gradient as ``fn`` at ``value``, or None where there is none in closed form.

    For a diagonal normal it is the normal itself. For a mixture of diagonal normals, with the responsibilities
    r held fixed, it has

    .. math:: p = \sum_j r_j / V_j, \qquad c = \tfrac1p \sum_j r_j \mu_j / V_j,
              \qquad \nabla \log f(x) = -p\,(x - c),

    which is exact: the gradient of a log mixture is the mean of the components' gradients under r. An
    exponential integrator may therefore treat a mixture prior as it treats a normal one.
    """
    normal = _normal(fn)
    if normal is not None:
        return LocalGaussian(normal.loc, _precision(normal.scale))
    if not isinstance(fn, torch.distributions.MixtureSameFamily):
        return None
    base = _normal(fn.component_distribution)
    if base is None or value.dim() == 0:
        return None
    r = responsibilities(fn, value).to(value.dtype).unsqueeze(-1)
    precision_of = base.scale.reciprocal().square()
    precision = (r * precision_of).sum(-2)
    return LocalGaussian((r * precision_of * base.loc).sum(-2) / precision, precision)


def broadened(mixture: dist.MixtureSameFamily, beta: float | Tensor) -> dist.MixtureSameFamily:
    r"""Make the prior of a new task's weights under a mixture over phi, Eq. 16 and 17.

    .. math:: p(\theta_*)
              = \int \mathcal N(\theta_*; \phi, \beta^2 I)\,\sum_j \alpha_j \mathcal N(\phi; \mu_j, V_j)\,d\phi
              = \sum_j \alpha_j\,\mathcal N(\theta_*; \mu_j, V_j + \beta^2 I)

    Args:
        mixture: components Normal (diagonal) or MultivariateNormal.
        beta: standard deviation of a task's weights around phi; one number, or ``[D]``.
    """
    component = mixture.component_distribution
    weights = dist.Categorical(logits=mixture.mixture_distribution.logits)
    base = _normal(component)
    if base is not None:
        scale = (base.scale.square() + beta**2).sqrt()
        return dist.MixtureSameFamily(weights, dist.Normal(base.loc, scale).to_event(1))
    if isinstance(component, torch.distributions.MultivariateNormal):
        eye = torch.eye(component.loc.shape[-1], dtype=component.loc.dtype, device=component.loc.device)
        # A column times the identity: one number and one a weight alike.
        covariance = component.covariance_matrix + torch.as_tensor(beta).unsqueeze(-1) ** 2 * eye
        return dist.MixtureSameFamily(weights, dist.MultivariateNormal(component.loc, covariance))
    raise TypeError(
        f"components of type {type(component).__name__}: expected Normal(...).to_event(1) or MultivariateNormal."
    )


def _precision(scale: Tensor) -> Tensor:
    """Compute 1 / scale^2; one number spread over a shape stays one number."""
    if scale.dim() and not any(scale.stride()):
        return scale.as_strided((), ()).reciprocal().square().expand(scale.shape)
    return scale.reciprocal().square()


def _normal(fn: Distribution) -> torch.distributions.Normal | None:
    while isinstance(fn, torch.distributions.Independent):
        fn = fn.base_dist
    return fn if isinstance(fn, torch.distributions.Normal) else None

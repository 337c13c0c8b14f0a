"""Detection of unstable step sizes before the first step."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from pyro_lift.inference.program import Evaluation
from pyro_lift.inference.schedules import Schedule, constant

__all__ = [
    "CURVATURE_DIMENSIONS",
    "DEFAULT_SHARE",
    "check_prior_steps",
    "curvature_limit",
    "default_step",
    "largest_curvature",
    "measured_curvature",
    "step_too_large",
]

#: Largest number of latent coordinates for which the curvature is measured at every start.
CURVATURE_DIMENSIONS = 2_000
#: A default step is this share of the largest stable one: the stiffest direction's variance is then 5 % too wide.
DEFAULT_SHARE = 0.05


def largest_curvature(objective: Tensor, leaves: Sequence[Tensor], iterations: int = 30) -> float | None:
    r"""Largest eigenvalue of :math:`-\nabla^2 \log p` by power iteration on Hessian-vector products.

    Args:
        objective: log density, a scalar with a graph to ``leaves``.
        leaves: the coordinates, all of one dtype and device.

    Returns:
        The eigenvalue of largest absolute value of minus the Hessian (negative where the density is convex there),
        or None where the network has no second derivative.
    """
    try:
        grads = torch.autograd.grad(objective, leaves, create_graph=True, allow_unused=True)
    except RuntimeError:
        return None
    used = [(g, leaf) for g, leaf in zip(grads, leaves, strict=True) if g is not None and g.requires_grad]
    if not used:
        return 0.0
    flat = torch.cat([g.reshape(-1) for g, _ in used])
    used_leaves = [leaf for _, leaf in used]
    noise = torch.randn(flat.shape, generator=torch.Generator().manual_seed(0), dtype=flat.dtype)
    v = noise.to(flat.device)
    v = v / v.norm()
    value = 0.0
    for _ in range(iterations):
        try:
            products = torch.autograd.grad(flat, used_leaves, v, retain_graph=True, allow_unused=True)
        except RuntimeError:
            return None
        hv = torch.cat(
            [
                torch.zeros_like(leaf).reshape(-1) if p is None else p.reshape(-1)
                for p, leaf in zip(products, used_leaves, strict=True)
            ]
        )
        value = -float(v @ hv)
        norm = float(hv.norm())
        if norm == 0.0 or not math.isfinite(norm):
            return value
        v = hv / norm
    return value


def curvature_limit(curvature: float | None) -> float:
    r"""The Euler limit :math:`4/\lambda`: above it the step :math:`x - \tfrac\eta2 \lambda x` overshoots and grows."""
    return 4.0 / curvature if curvature is not None and curvature > 0.0 else math.inf


def measured_curvature(run: Evaluation, n_inflate: float, wanted: bool) -> float | None:
    """Largest curvature of the block's density in its local sites; None where it is too large to measure."""
    sites = run.locals or run.latents
    size = sum(site.leaf.numel() for site in sites.values())
    if size > CURVATURE_DIMENSIONS:
        if wanted:
            raise ValueError(
                f"step_size=None measures the curvature at the start, which is done up to {CURVATURE_DIMENSIONS} "
                f"coordinates; this program has {size}. Please pass a value for step_size."
            )
        return None
    curvature = largest_curvature(
        n_inflate * run.log_likelihood + run.log_prior(sites), [site.leaf for site in sites.values()]
    )
    if wanted and (curvature is None or not curvature > 0.0):
        raise ValueError(
            f"step_size=None measures the curvature at the start, which gave {curvature}. "
            "Please pass a value for step_size."
        )
    return curvature


def default_step(curvature: float | None) -> Schedule:
    """Return the constant step that is :data:`DEFAULT_SHARE` of the largest stable one."""
    return constant(DEFAULT_SHARE * curvature_limit(curvature))


def check_prior_steps(run: Evaluation, eta: float, scale: Mapping[str, float]) -> None:
    """Refuse an Euler step that a normal prior alone makes unstable."""
    for site in (run.locals or run.latents).values():
        prior = site.gaussian()
        if prior is not None:
            limit = 4.0 / float(prior.precision.max())
            own = eta * scale.get(site.family, 1.0)
            if own >= limit:
                raise ValueError(step_too_large(f"step_size (site {site.name!r})", own, limit, "4 β²"))


def step_too_large(name: str, value: float, limit: float, formula: str) -> str:
    """Return the message about a step size past its limit, with the ways out."""
    return (
        f"{name}={value:g} is past its stability limit {limit:g} = {formula}: the chain would grow without bound. "
        f"Use a value well below it ({DEFAULT_SHARE * limit:g} keeps the bias near 5 %), or "
        'integrator="exponential" for theta and phi_update="gibbs" for phi, which have no such limit; '
        "check_stability=False tries anyway."
    )

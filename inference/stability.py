"""Step sizes that cannot be stable, found before the first step."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["CURVATURE_DIMENSIONS", "DEFAULT_SHARE", "curvature_limit", "largest_curvature"]

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

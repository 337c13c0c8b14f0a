"""Detection of unstable step sizes before the first step."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from pyro_lift.inference.program import Evaluation, Latent
from pyro_lift.inference.schedules import Schedule, constant
from pyro_lift.inference.sgld import Integrator

__all__ = [
    "CURVATURE_DIMENSIONS",
    "DEFAULT_SHARE",
    "LATER_ITERATIONS",
    "check_curvature",
    "check_prior_steps",
    "curvature_limit",
    "curves_down",
    "default_step",
    "largest_curvature",
    "measured_curvature",
    "step_too_large",
]

#: Largest number of latent coordinates for which the curvature is measured at every start.
CURVATURE_DIMENSIONS = 2_000
#: Products by which the curvature of a later task is measured, at its first visit: enough to see a factor.
LATER_ITERATIONS = 10
#: A default step is this share of the largest stable one: the stiffest direction's variance is then 5 % too wide.
DEFAULT_SHARE = 0.05


def largest_curvature(
    objective: Tensor, leaves: Sequence[Tensor], iterations: int = 30, *, gains: Sequence[Tensor] | None = None
) -> float | None:
    r"""Largest eigenvalue of :math:`-\nabla^2 \log p` by power iteration on Hessian-vector products.

    Args:
        objective: log density, a scalar with a graph to ``leaves``.
        leaves: the coordinates, all of one dtype and device.
        iterations: products.
        gains: K, one a leaf and broadcast to it: then the eigenvalue is that of the symmetric
            :math:`-K^{1/2}\,\nabla^2 \log p\,K^{1/2}`.

    Returns:
        The eigenvalue of largest absolute value of minus the Hessian (negative where the density is convex there),
        or None where the network has no second derivative.
    """
    try:
        grads = torch.autograd.grad(objective, leaves, create_graph=True, allow_unused=True)
    except RuntimeError:
        return None
    gains = [torch.ones(()).to(leaf) for leaf in leaves] if gains is None else gains
    used = [
        (g, leaf, gain.expand(leaf.shape).reshape(-1).sqrt())
        for g, leaf, gain in zip(grads, leaves, gains, strict=True)
        if g is not None and g.requires_grad
    ]
    if not used:
        return 0.0
    flat = torch.cat([g.reshape(-1) for g, _, _ in used])
    used_leaves, root = [leaf for _, leaf, _ in used], torch.cat([part for _, _, part in used])
    noise = torch.randn(flat.shape, generator=torch.Generator().manual_seed(0), dtype=flat.dtype)
    v = noise.to(flat.device)
    v = v / v.norm()
    value = 0.0
    for _ in range(iterations):
        try:
            products = torch.autograd.grad(flat, used_leaves, root * v, retain_graph=True, allow_unused=True)
        except RuntimeError:
            return None
        hv = torch.cat(
            [
                torch.zeros_like(leaf).reshape(-1) if p is None else p.reshape(-1)
                for p, leaf in zip(products, used_leaves, strict=True)
            ]
        )
        hv = root * hv
        value = -float(v @ hv)
        norm = float(hv.norm())
        if norm == 0.0 or not math.isfinite(norm):
            return value
        v = hv / norm
    return value


def curves_down(objective: Tensor, leaves: Sequence[Tensor], directions: int = 8) -> bool:
    r"""Whether the second derivative :math:`v^\top \nabla^2 f\, v` is negative along each of some random directions.

    Where the gradient is zero, that tells a mode from a saddle. Without second derivatives the answer is no.
    """
    generator = torch.Generator().manual_seed(0)
    try:
        grads = torch.autograd.grad(objective, leaves, create_graph=True, allow_unused=True)
        used = [(g, leaf) for g, leaf in zip(grads, leaves, strict=True) if g is not None and g.requires_grad]
        for _ in range(directions if used else 0):
            v = [torch.randn(leaf.shape, generator=generator).to(leaf) for _, leaf in used]
            along = torch.stack([(g * part).sum() for (g, _), part in zip(used, v, strict=True)]).sum()
            again = torch.autograd.grad(along, [leaf for _, leaf in used], retain_graph=True, materialize_grads=True)
            if not float(sum((h * part).sum() for h, part in zip(again, v, strict=True))) < 0.0:
                return False
    except RuntimeError:
        return False
    return bool(used)


def curvature_limit(curvature: float | None) -> float:
    r"""The Euler limit :math:`4/\lambda`: above it the step :math:`x - \tfrac\eta2 \lambda x` overshoots and grows."""
    return 4.0 / curvature if curvature is not None and curvature > 0.0 else math.inf


def measured_curvature(run: Evaluation, n_inflate: float, wanted: bool, iterations: int = 30) -> float | None:
    """Largest curvature of the block's density in its local sites; None where it is too large to measure."""
    size = sum(site.leaf.numel() for site in _moving(run))
    if size > CURVATURE_DIMENSIONS:
        if wanted:
            raise ValueError(
                f"step_size=None measures the curvature at the start, which is done up to {CURVATURE_DIMENSIONS} "
                f"coordinates; this program has {size}. Please pass a value for step_size."
            )
        return None
    curvature = largest_curvature(_density(run, n_inflate), [site.leaf for site in _moving(run)], iterations)
    if wanted and (curvature is None or not curvature > 0.0):
        raise ValueError(
            f"step_size=None measures the curvature at the start, which gave {curvature}. "
            "Please pass a value for step_size."
        )
    return curvature


def _moving(run: Evaluation) -> list[Latent]:
    return list((run.locals or run.latents).values())


def _density(run: Evaluation, n_inflate: float) -> Tensor:
    return n_inflate * run.log_likelihood + run.log_prior(run.locals or run.latents)


def check_curvature(
    run: Evaluation,
    curvature: float | None,
    eta: float,
    integrator: Integrator,
    n_inflate: float,
    scale: Mapping[str, float],
    say: str = "",
) -> None:
    r"""Refuse a step that the curvature at the start makes unstable.

    Both integrators move by :math:`K\,\nabla \log p`, with :math:`K = \eta/2` for Euler's, and
    :math:`K = (1 - e^{-\eta p/2})/p` for the exponential one at a normal prior of precision p. The step grows where
    :math:`K^{1/2} H K^{1/2}`, H being the curvature, has an eigenvalue of 2 or more.

    Args:
        run: at the start, with a graph.
        curvature: the largest one; None where it was not measured, and nothing is checked.
        eta: the step size.
        integrator: of the step.
        n_inflate: power on the likelihood.
        scale: factors on eta by family.
        say: what the message begins with.
    """
    if curvature is not None and not math.isfinite(curvature):
        return  # data out of range: the step itself says so, and names the task
    limit = curvature_limit(curvature) / max([1.0, *scale.values()])  # K is never larger than Euler's
    if eta < limit:
        return

    def grows(step: float) -> bool:
        sites = _moving(run)
        gains = [_gain(site, step * scale.get(site.family, 1.0), integrator) for site in sites]
        largest = largest_curvature(_density(run, n_inflate), [site.leaf for site in sites], gains=gains)
        return largest is not None and largest >= 2.0

    if not grows(eta):
        return
    low, high = limit, eta
    while high > 1.01 * low:
        middle = math.sqrt(low * high)
        low, high = (low, middle) if grows(middle) else (middle, high)
    formula = "4 / (largest curvature at the start)"
    if integrator == "exponential":
        formula = "where (1 - exp(-eta p / 2)) / p, p the prior's precision, times the curvature at the start is 2"
    raise ValueError(say + step_too_large("step_size", eta, low, formula))


def _gain(site: Latent, eta: float, integrator: Integrator) -> Tensor:
    prior = site.gaussian() if integrator == "exponential" else None
    if prior is None:
        return torch.full((), 0.5 * eta).to(site.leaf)
    precision = prior.precision.detach()
    return -torch.expm1(-0.5 * eta * precision) / precision


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
        'integrator="exponential" for theta, which the prior alone does not limit, and phi_update="gibbs" for phi, '
        "which has no limit; check_stability=False tries anyway."
    )

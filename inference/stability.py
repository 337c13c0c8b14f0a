"""Detection of unstable step sizes before the first step."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from pyro_lift.inference.program import Evaluation, Latent
from pyro_lift.inference.schedules import Schedule, constant
from pyro_lift.inference.sgld import DivergedError, Integrator

__all__ = [
    "CURVATURE_DIMENSIONS",
    "DEFAULT_SHARE",
    "LATER_ITERATIONS",
    "UnstableStepError",
    "check_curvature",
    "check_prior_steps",
    "clears",
    "curvature_limit",
    "curves_down",
    "default_step",
    "largest_curvature",
    "measured_curvature",
    "objective_of",
    "step_too_large",
    "surely_below",
]

#: Largest number of latent coordinates for which the curvature is measured where a step size is given.
CURVATURE_DIMENSIONS = 2_000
#: Relative accuracy of the largest curvature, and the number of coordinates up to which its search is kept orthogonal.
TOLERANCE, REORTHOGONALISED = 1e-6, 1_000_000
#: With which a later task's curvature is taken for small enough without being found.
CERTAINTY = 0.999
#: Products by which the curvature of a later task is measured, at its first visit: enough to see a factor.
LATER_ITERATIONS = 10
#: A default step is this share of the largest stable one: the stiffest direction's variance is then 5 % too wide.
DEFAULT_SHARE = 0.05


class UnstableStepError(DivergedError, ValueError):
    """A step size that is past its stability limit, found before any step was taken.

    It is an error of the chain, too, so that who tries rates passes such a one over as those under which it diverges.

    Attributes:
        value: the step size, eta.
        limit: that it is past.
    """

    def __init__(self, message: str, value: float, limit: float, tasks: tuple[int | str, ...] = ()) -> None:
        super().__init__(message, 0, tasks)
        self.value, self.limit = value, limit

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (str(self), self.value, self.limit, self.tasks)


def largest_curvature(
    objective: Tensor, leaves: Sequence[Tensor], iterations: int = 30, *, gains: Sequence[Tensor] | None = None
) -> float | None:
    r"""Largest eigenvalue of :math:`-\nabla^2 \log p` by Lanczos iteration on Hessian-vector products.

    It ends as soon as the eigenvalue is known to :data:`TOLERANCE`, after as many products as there are distinct
    eigenvalues at most (Golub and Van Loan, section 10.1).

    Args:
        objective: log density, a scalar with a graph to ``leaves``.
        leaves: the coordinates, all of one dtype and device.
        iterations: products at most.
        gains: K, one a leaf and broadcast to it: then the eigenvalue is that of the symmetric
            :math:`-K^{1/2}\,\nabla^2 \log p\,K^{1/2}`.

    Returns:
        The largest eigenvalue of minus the Hessian (negative where the density is convex along every direction), or
        None where the network has no second derivative.
    """
    try:
        hessian = _MinusHessian(objective, leaves, gains)
        if hessian.size == 0:
            return 0.0
        v = hessian.random_unit()
        diagonal: list[float] = []
        beside: list[float] = []
        basis, value = [v], math.nan
        for _ in range(iterations):
            w = hessian.times(v)
            diagonal.append(float(v @ w))
            w = w - diagonal[-1] * v
            if hessian.size <= REORTHOGONALISED:  # beyond it rounding repeats eigenvalues, which does no harm
                done = torch.stack(basis)
                w = w - done.mT @ (done @ w)
            elif len(basis) > 1:
                w = w - beside[-1] * basis[-2]
            norm = float(w.norm())
            if not math.isfinite(norm + diagonal[-1]):
                return diagonal[-1]
            small = torch.diag(torch.tensor(diagonal, dtype=torch.float64))
            for k, between in enumerate(beside):
                small[k, k + 1] = small[k + 1, k] = between
            values, vectors = torch.linalg.eigh(small)
            value = float(values[-1])
            if norm * abs(float(vectors[-1, -1])) <= TOLERANCE * abs(value) or norm == 0.0:
                break
            v = w / norm
            beside.append(norm)
            basis = [*(basis if hessian.size <= REORTHOGONALISED else basis[-1:]), v]
        return value
    except _NoSecondDerivativeError:
        return None


def surely_below(
    objective: Tensor,
    leaves: Sequence[Tensor],
    limit: float,
    iterations: int,
    *,
    gains: Sequence[Tensor] | None = None,
) -> bool:
    r"""Whether the curvature is below a limit, by as few products as tell so with :data:`CERTAINTY`.

    For a unit v drawn at random in D coordinates and any symmetric H,

    .. math:: \lVert H \rVert^k \le \alpha \sqrt{D}\, \lVert H^k v \rVert

    but with probability :math:`\sqrt{2/\pi}/\alpha` at most (Dixon 1983). A limit far above the curvature is cleared by
    two or three products; where ``iterations`` of them do not clear it, or there is no second derivative, the answer
    is no.
    """
    try:
        hessian = _MinusHessian(objective, leaves, gains)
        if hessian.size == 0:
            return True
        v, log_norm = hessian.random_unit(), 0.0
        slack = math.log(math.sqrt(2.0 / math.pi) / (1.0 - CERTAINTY)) + 0.5 * math.log(hessian.size)
        for k in range(1, iterations + 1):
            v = hessian.times(v)
            norm = float(v.norm())
            if norm == 0.0:
                return True
            if not math.isfinite(norm) or norm >= limit:
                return False  # the curvature is no smaller than this
            log_norm += math.log(norm)
            if (log_norm + slack) / k < math.log(limit):
                return True
            v = v / norm
    except _NoSecondDerivativeError:
        pass
    return False


class _NoSecondDerivativeError(RuntimeError):
    """The network's own backward pass cannot be differentiated."""


class _MinusHessian:
    """Products of minus the Hessian, with gains on both sides, with flat vectors."""

    def __init__(self, objective: Tensor, leaves: Sequence[Tensor], gains: Sequence[Tensor] | None) -> None:
        try:
            grads = torch.autograd.grad(objective, leaves, create_graph=True, allow_unused=True)
        except RuntimeError as error:
            raise _NoSecondDerivativeError from error
        gains = [torch.ones(()).to(leaf) for leaf in leaves] if gains is None else gains
        used = [
            (g, leaf, gain.expand(leaf.shape).reshape(-1).sqrt())
            for g, leaf, gain in zip(grads, leaves, gains, strict=True)
            if g is not None and g.requires_grad
        ]
        self.leaves = [leaf for _, leaf, _ in used]
        self.size = sum(leaf.numel() for leaf in self.leaves)
        if used:
            self.flat = torch.cat([g.reshape(-1) for g, _, _ in used])
            self.root = torch.cat([part for _, _, part in used])

    def random_unit(self) -> Tensor:
        """A direction, always the same one."""
        stream = torch.Generator().manual_seed(0)
        noise = torch.randn(self.flat.shape, generator=stream, dtype=self.flat.dtype).to(self.flat.device)
        return torch.as_tensor(noise / noise.norm())

    def times(self, v: Tensor) -> Tensor:
        """One product."""
        try:
            products = torch.autograd.grad(
                self.flat, self.leaves, self.root * v, retain_graph=True, materialize_grads=True
            )
        except RuntimeError as error:
            raise _NoSecondDerivativeError from error
        product: Tensor = -self.root * torch.cat([p.reshape(-1) for p in products])
        return product


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
    """Largest curvature of the block's density in its local sites.

    Args:
        run: with a graph.
        n_inflate: power on the likelihood.
        wanted: whether a step size is chosen by it; else it is None past :data:`CURVATURE_DIMENSIONS` coordinates.
        iterations: products at most.

    Raises:
        ValueError: it is wanted, and there is none.
    """
    sites = _moving(run)
    if not wanted and sum(site.leaf.numel() for site in sites) > CURVATURE_DIMENSIONS:
        return None
    curvature = largest_curvature(objective_of(run, n_inflate), [site.leaf for site in sites], iterations)
    if wanted and (curvature is None or not curvature > 0.0):
        raise ValueError(
            f"step_size=None measures the curvature at the start, which gave {curvature}. "
            "Please pass a value for step_size."
        )
    return curvature


def clears(run: Evaluation, n_inflate: float, eta: float, scale: Mapping[str, float]) -> bool:
    """Whether a step is stable for a block beyond reasonable doubt: what costs least is asked first.

    Past :data:`CURVATURE_DIMENSIONS` coordinates nothing is measured, and the answer is yes.
    """
    sites = _moving(run)
    if sum(site.leaf.numel() for site in sites) > CURVATURE_DIMENSIONS:
        return True
    limit = 4.0 / (eta * max([1.0, *scale.values()]))
    return surely_below(objective_of(run, n_inflate), [site.leaf for site in sites], limit, LATER_ITERATIONS)


def _moving(run: Evaluation) -> list[Latent]:
    return list((run.locals or run.latents).values())


def objective_of(run: Evaluation, n_inflate: float) -> Tensor:
    """Log density of the block in its local sites (all sites of a program without tasks), with a graph."""
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
        largest = largest_curvature(objective_of(run, n_inflate), [site.leaf for site in sites], gains=gains)
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
    raise UnstableStepError(say + step_too_large("step_size", eta, low, formula), eta, low, run.tasks)


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
            limit = 4.0 / float(prior.precision.detach().max())
            own = eta * scale.get(site.family, 1.0)
            if own >= limit:
                words = step_too_large(f"step_size (site {site.name!r})", own, limit, "4 β²")
                raise UnstableStepError(words, own, limit, run.tasks)


def step_too_large(name: str, value: float, limit: float, formula: str) -> str:
    """Return the message about a step size past its limit, with the ways out."""
    return (
        f"{name}={value:g} is past its stability limit {limit:g} = {formula}: the chain would grow without bound. "
        f"Use a value well below it ({DEFAULT_SHARE * limit:g} keeps the bias near 5 %), or leave it out to have one "
        'found. integrator="exponential" for theta and phi_update="gibbs" for phi, the defaults, are limited by the '
        "data alone; check_stability=False tries anyway."
    )

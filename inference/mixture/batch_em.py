r"""Batch EM for a Gaussian mixture: the start of the online one, and what it is compared with."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from pyro_lift.support.options import check_literal, check_number

__all__ = ["Covariance", "Moments", "Stopping", "fit", "kmeans_start", "log_densities", "maximise"]

Covariance = Literal["diag", "spherical", "full"]
#: Above this many numbers, rows times components times coordinates, components are taken one after the other.
MANY = 10_000_000


class Moments(NamedTuple):
    """A mixture by its moments.

    Attributes:
        weight: ``[K]``, sums to one.
        mean: ``[K, D]``.
        variance: ``[K, D]`` (diag), ``[K, 1]`` (spherical) or ``[K, D, D]`` (full).
    """

    weight: Tensor
    mean: Tensor
    variance: Tensor


#: As PyTorch rounds it; a number, which no device has to be given.
LOG_TWO_PI = float(torch.log(torch.tensor(2.0 * torch.pi, dtype=torch.float64)))


def log_densities(moments: Moments, x: Tensor, covariance: Covariance) -> Tensor:
    r""":math:`\log \alpha_j + \log \mathcal N(x; \mu_j, V_j)` in float64, ``[..., K]`` for x of shape ``[..., D]``."""
    D = x.shape[-1]
    if x.dim() > 1 and covariance != "full" and x.numel() * len(moments.weight) > MANY:
        parts = [Moments(*(part[j : j + 1] for part in moments)) for j in range(len(moments.weight))]
        if len(parts) > 1:
            return torch.cat([log_densities(part, x, covariance) for part in parts], -1)
    delta = x.unsqueeze(-2) - moments.mean
    if covariance == "full":
        factor = torch.linalg.cholesky(moments.variance)
        whitened = torch.linalg.solve_triangular(factor, delta.unsqueeze(-1), upper=False).squeeze(-1)
        quadratic = whitened.square().sum(-1).double()
        log_det = 2.0 * factor.diagonal(dim1=-2, dim2=-1).log().sum(-1).double()
    else:
        quadratic = (delta.square() / moments.variance).sum(-1).double()
        log_det = moments.variance.log().expand_as(moments.mean).sum(-1).double()
    joint: Tensor = moments.weight.double().log() - 0.5 * (quadratic + log_det + D * LOG_TWO_PI)
    return joint


def maximise(x: Tensor, r: Tensor, covariance: Covariance, floor: Tensor | float) -> Moments:
    """The M step: moments of ``[n, D]`` under responsibilities ``[n, K]``; variances not below ``floor``."""
    r = r.to(x.dtype)
    total = r.sum(0).clamp_min(torch.finfo(x.dtype).tiny)
    mean = (r.T @ x) / total.unsqueeze(-1)
    if covariance != "full" and x.numel() * len(mean) > MANY:
        variance = torch.stack([w @ (x - m).square() for w, m in zip(r.T, mean, strict=True)]) / total.unsqueeze(-1)
        variance = variance.mean(-1, keepdim=True) if covariance == "spherical" else variance
        return Moments(total / len(x), mean, floored(variance, covariance, floor))
    delta = x.unsqueeze(1) - mean
    if covariance == "full":
        variance = torch.einsum("nk,nkd,nke->kde", r, delta, delta) / total.view(-1, 1, 1)
    else:
        variance = torch.einsum("nk,nkd->kd", r, delta.square()) / total.unsqueeze(-1)
        if covariance == "spherical":
            variance = variance.mean(-1, keepdim=True)
    return Moments(total / len(x), mean, floored(variance, covariance, floor))


def floored(variance: Tensor, covariance: Covariance, floor: Tensor | float) -> Tensor:
    """Variances of at least ``floor``; for full matrices it is added to a diagonal that lies below it."""
    if covariance != "full":
        return variance.clamp_min(floor)
    diagonal = variance.diagonal(dim1=-2, dim2=-1)
    return variance + torch.diag_embed((floor - diagonal).clamp_min(0.0) + 1e-3 * floor)


def kmeans_start(
    x: Tensor, components: int, covariance: Covariance, floor: Tensor | float, generator: torch.Generator
) -> Moments:
    """k-means++ seeding, ten rounds of k-means, and the pooled variance within clusters for every component.

    References:
        k-means++: the advantages of careful seeding, Arthur and Vassilvitskii, 2007.
    """
    n = len(x)
    chosen = [int(torch.randint(n, (), generator=generator))]
    for _ in range(components - 1):
        gaps = torch.cdist(x, x[chosen]).amin(1).double().square().cpu()
        share = gaps if bool(gaps.sum() > 0) else torch.ones_like(gaps)
        chosen.append(int(torch.multinomial(share, 1, generator=generator)))
    mean = x[chosen]
    for _ in range(10):
        nearest = torch.cdist(x, mean).argmin(1)
        r = torch.nn.functional.one_hot(nearest, components).to(x)
        filled = r.sum(0) > 0
        mean = torch.where(filled.unsqueeze(-1), (r.T @ x) / r.sum(0).clamp_min(1).unsqueeze(-1), mean)
    nearest = torch.cdist(x, mean).argmin(1)
    within = x - mean[nearest]
    pooled = maximise(within, torch.ones(n, 1).to(x), covariance, floor).variance
    weight = torch.full((components,), 1.0 / components, dtype=x.dtype, device=x.device)
    return Moments(weight, mean, pooled.expand(components, *pooled.shape[1:]).clone())


class Stopping(NamedTuple):
    """The end of EM.

    Attributes:
        max_iterations: at most so many.
        tolerance: EM stops when the mean log likelihood (nats a draw) gains less.
    """

    max_iterations: int = 200
    tolerance: float = 1e-6


def fit(
    x: Tensor,
    components: int,
    covariance: Covariance = "full",
    *,
    start: Moments | None = None,
    restarts: int = 10,
    stopping: Stopping = Stopping(),  # noqa: B008 - immutable
    floor: Tensor | float | None = None,
    seed: int = 0,
) -> tuple[Moments, float]:
    """Batch EM from a start, or the best of several k-means++ starts.

    Args:
        x: draws ``[n, D]``, at least as many as components.
        components: K.
        covariance: of each component.
        start: where to begin; None seeds ``restarts`` times.
        restarts: number of seedings.
        stopping: when EM stops.
        floor: least variance; None takes a millionth of the mean variance of x.
        seed: of the seedings.

    Returns:
        The mixture and its mean log likelihood (nats a draw).

    Raises:
        ValueError: fewer draws than components.
    """
    check_literal("covariance", covariance, Covariance)
    check_number("components", components, least=1, open_below=False, whole=True)
    if len(x) < components:
        raise ValueError(f"{len(x)} draws for {components} components: at least as many draws are needed.")
    if floor is None:
        floor = 1e-6 * x.var(0, unbiased=False).mean().clamp_min(1e-30)
    generator = torch.Generator().manual_seed(seed)
    best: tuple[Moments, float] | None = None
    for _ in range(1 if start is not None or components == 1 else restarts):
        begin = start or kmeans_start(x, components, covariance, floor, generator)
        fitted = _iterate(x, begin, covariance, floor, stopping)
        if best is None or fitted[1] > best[1]:
            best = fitted
    assert best is not None
    return best


def _iterate(
    x: Tensor, moments: Moments, covariance: Covariance, floor: Tensor | float, stopping: Stopping
) -> tuple[Moments, float]:
    previous = -torch.inf
    score = previous
    for _ in range(stopping.max_iterations):
        joint = log_densities(moments, x, covariance)
        score = float(joint.logsumexp(-1).mean())
        if score - previous < stopping.tolerance:
            break
        previous = score
        moments = maximise(x, torch.softmax(joint, -1), covariance, floor)
    return moments, score

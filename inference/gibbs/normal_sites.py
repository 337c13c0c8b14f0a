"""What may be known of one site of a run: whether it is a plain normal, its variance, and its name in a message."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor
from torch.distributions import MixtureSameFamily, MultivariateNormal

from pyro_lift.inference.dependence import Links
from pyro_lift.inference.program import Evaluation, Latent
from pyro_lift.inference.supports import innermost, unmasked, wrappers
from pyro_lift.models.priors import LocalGaussian

__all__ = [
    "children_of",
    "dense_normal",
    "described",
    "direct_fault",
    "listed",
    "local_normal",
    "plain_normal",
    "scalar_if_constant",
    "variance_by_task",
]


def listed(names: Collection[str]) -> str:
    """Names in quotes, in order, for a message."""
    return ", ".join(map(repr, sorted(names)))


def plain_normal(site: Latent) -> LocalGaussian | None:
    """The normal distribution of a site; None for a mixture of normals too, which ``site.gaussian()`` touches."""
    return None if isinstance(unmasked(site.fn), MixtureSameFamily) else site.gaussian()


def dense_normal(site: Latent) -> MultivariateNormal | None:
    """The multivariate normal distribution of a site, unmasked and unscaled; None where it is none."""
    if site.transform is not None or site.mask is not None or isinstance(site.scale, Tensor) or site.scale != 1.0:
        return None
    fn = unmasked(site.fn)
    base = innermost(fn)
    return base if isinstance(base, MultivariateNormal) and "MaskedDistribution" not in wrappers(fn) else None


def local_normal(site: Latent) -> LocalGaussian | None:
    """The normal distribution of a local site, or that of each coordinate of a multivariate one by itself."""
    dense = dense_normal(site)
    if dense is None:
        return plain_normal(site)
    variance = dense.covariance_matrix.diagonal(dim1=-2, dim2=-1)
    return LocalGaussian(dense.loc, variance.reciprocal())


def described(site: Latent) -> str:
    """The kind of a site's distribution in words, with what is done to it."""
    masked = site.mask is not None or any(kind == "MaskedDistribution" for kind in wrappers(site.fn))
    scaled = isinstance(site.scale, Tensor) or site.scale != 1.0
    return ("masked " if masked else "") + ("scaled " if scaled else "") + type(innermost(site.fn)).__name__


def variance_by_task(child: Latent, normal: LocalGaussian) -> Tensor:
    """Variance of a normal local site, the tasks of its block first."""
    spread = torch.broadcast_to(1.0 / normal.precision.detach(), child.leaf.shape)
    if child.task is None and child.plate_dim is not None:
        return spread.movedim(child.plate_dim, 0)
    return spread.unsqueeze(0)


def children_of(name: str, run: Evaluation, links: Links) -> list[Latent]:
    """The local sites whose distribution hangs on a global one."""
    return [run.locals[child] for child in links.children(name) if child in run.locals]


def direct_fault(name: str, run: Evaluation, links: Links) -> str | None:
    """What else than local sites ties a global site."""
    site = run.globals[name]
    if plain_normal(site) is None:
        return f"its own distribution is {described(site)}, not a plain normal"
    if links.laws[name]:
        return f"its own distribution depends on another site ({listed(links.laws[name])})"
    others = [child for child in links.children(name) if child in run.globals]
    if others:
        return f"another global site depends on it ({listed(others)})"
    observed = [o for o, parents in links.observed.items() if name in parents]
    if observed:
        return f"an observed site depends on it directly ({listed(observed)})"
    return None


def scalar_if_constant(value: Tensor) -> Tensor:
    """One number where all are equal: phi may have a hundred million coordinates."""
    first = value.reshape(-1)[0]
    return first.clone() if bool((value == first).all()) else value.clone()

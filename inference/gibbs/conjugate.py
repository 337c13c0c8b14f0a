r"""The exact draw of phi given all theta_i, where the program is normal given normal.

.. math:: \phi \mid \theta_{1..N} \sim
          \mathcal N\!\Big(v\,\big(\tfrac{m_0}{\sigma^2} + \tfrac{S}{\beta^2}\big),\; T\,v\Big), \qquad
          v = \Big(\tfrac{1}{\sigma^2} + \tfrac{N}{\beta^2}\Big)^{-1},\quad S = \sum_i \theta_i

It does not see the data, so no minibatch can bias it; it has no step size, so nothing can make it unstable.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from pyro_lift.inference.program import Evaluation, Latent, Program, depends
from pyro_lift.models.priors import gaussian_at

__all__ = ["NormalPair", "check_pair", "draw", "find_pairs"]


class NormalPair(NamedTuple):
    """A global site phi ~ N(prior_mean, 1/prior_precision) and the local family theta_i ~ N(phi, local_variance)."""

    global_site: str
    family: str
    prior_mean: Tensor
    prior_precision: Tensor
    local_variance: Tensor


def draw(pair: NormalPair, S: Tensor, num_tasks: int, temperature: float, noise: Tensor) -> Tensor:
    """One exact draw of phi; S in float64, the draw in the dtype of ``noise``."""
    precision = pair.prior_precision.double() + num_tasks / pair.local_variance.double()
    mean = (pair.prior_precision.double() * pair.prior_mean.double() + S / pair.local_variance.double()) / precision
    return (mean + (temperature / precision).sqrt() * noise.double()).to(noise.dtype)


def find_pairs(
    program: Program, here: Evaluation, index: Tensor, generator: torch.Generator | None
) -> tuple[dict[str, NormalPair], dict[str, str]]:
    """Which global sites are the mean of exactly one normal local family, with everything else held fixed.

    The structure is read off the graph of one run, and the identity ``mean(theta_i) = phi`` is checked in value at
    two points: for the tasks of ``here``, and for other tasks, ``index``, at another phi.

    Returns:
        The pairs by global site, and for every other global site the reason why it is none.
    """
    generator = generator if generator is not None else torch.Generator()
    moved_values = {
        name: site.leaf.detach()
        + torch.randn(site.leaf.shape, generator=torch.Generator().manual_seed(0)).to(site.leaf)
        for name, site in here.globals.items()
    }
    moved = program.run(moved_values, {}, index, generator)
    pairs, reasons = {}, {}
    for name in here.globals:
        found = _pair(name, here, moved)
        if isinstance(found, str):
            reasons[name] = found
        else:
            pairs[name] = found
    return pairs, reasons


def values_of(evaluation: Evaluation) -> Mapping[int | None, dict[str, Tensor]]:
    """The local values of a run, in the form :meth:`Program.run` takes them."""
    values: dict[int | None, dict[str, Tensor]] = {}
    for site in evaluation.locals.values():
        values.setdefault(site.task, {})[site.family] = site.leaf.detach()
    return values


def _pair(name: str, here: Evaluation, moved: Evaluation) -> NormalPair | str:
    site = here.globals[name]
    prior = site.gaussian()
    if prior is None:
        return f"its own distribution is {type(site.fn).__name__}, not a plain normal"
    others = [s for k, s in here.globals.items() if k != name]
    if any(depends(site.log_prob_at(site.leaf.detach()), s.leaf) for s in others):
        return "its own distribution depends on another global site"
    if any(depends(s.log_prob_at(s.leaf.detach()), site.leaf) for s in others):
        return "another global site depends on it"
    if any(depends(o.log_prob(), site.leaf) for o in here.observed):
        return "an observed site depends on it directly"
    children = [s for s in here.locals.values() if depends(s.log_prob_at(s.leaf.detach()), site.leaf)]
    families = {s.family for s in children}
    if len(families) != 1:
        return f"{len(families)} local families depend on it ({sorted(families)}); exactly one is needed"
    return _check_children(name, children, here, moved, others)


def _check_children(
    name: str, children: list[Latent], here: Evaluation, moved: Evaluation, others: list[Latent]
) -> NormalPair | str:
    variance = None
    for child in children:
        if child.gaussian() is None:
            return f"the local site {child.name!r} is {type(child.fn).__name__}, not a plain normal"
        if any(depends(child.log_prob_at(child.leaf.detach()), s.leaf) for s in others):
            return f"the distribution of the local site {child.name!r} depends on another global site too"
    family = children[0].family
    for run in (here, moved):
        for site in run.locals.values():
            if site.family != family:
                continue
            mean, spread = _by_task(site)
            phi = run.globals[name].leaf.detach()
            if mean.shape[1:] != phi.shape or not torch.allclose(mean, phi.expand_as(mean)):
                return f"the mean of the local site {site.name!r} is not the site {name!r} itself"
            variance = spread[0] if variance is None else variance
            if not torch.allclose(spread, variance.expand_as(spread)):
                return f"the scale of the local site {site.name!r} differs by task or depends on {name!r}"
    site = here.globals[name]
    prior = site.gaussian()
    assert prior is not None and variance is not None
    precision = _scalar_if_constant(prior.precision.detach())
    return NormalPair(name, family, prior.mean.detach(), precision, _scalar_if_constant(variance))


def _by_task(site: Latent) -> tuple[Tensor, Tensor]:
    """Mean and variance of a normal local site, the tasks of its block first."""
    gaussian = gaussian_at(site.fn, site.leaf.detach())
    assert gaussian is not None
    mean, spread = gaussian.mean.detach(), 1.0 / gaussian.precision.detach()
    mean, spread = torch.broadcast_tensors(mean, spread)
    if site.plate_dim is not None and site.task is None:
        return mean.movedim(site.plate_dim, 0), spread.movedim(site.plate_dim, 0)
    return mean.unsqueeze(0), spread.unsqueeze(0)


def check_pair(pair: NormalPair, run: Evaluation) -> None:
    """Refuse a task whose own distribution around phi is not the one that the pair was found with.

    Raises:
        ValueError: another variance than that of the tasks seen at set-up.
    """
    for site in run.locals.values():
        if site.family == pair.family:
            _, spread = _by_task(site)
            if not torch.allclose(spread, pair.local_variance.expand_as(spread)):
                raise ValueError(
                    f"the scale of the local site {site.name!r} differs by task: an exact draw of "
                    f'{pair.global_site!r} needs one scale for all. Use phi_update="langevin", accumulator="table".'
                )


def _scalar_if_constant(value: Tensor) -> Tensor:
    """One number where all are equal: phi may have a hundred million coordinates."""
    first = value.reshape(-1)[0]
    return first.clone() if bool((value == first).all()) else value.clone()

r"""The scaling move: tau and every theta_i - phi are multiplied by one factor, which the likelihood decides on.

Given all theta_i, tau is drawn from their spread, and given tau they keep it: where the data say little of a single
theta_i, both follow each other slowly. A factor on tau *and every theta_i - phi* leaves each
:math:`p(\theta_i \mid \phi, \tau)\,d\theta_i` as it is. With :math:`x = \log\tau` the move :math:`x \to x + s`,
:math:`\theta_i \to \phi + e^{\kappa s / 2} (\theta_i - \phi)` is accepted with probability

.. math:: \min\Big\{1, \Big[\frac{p_x(x + s)}{p_x(x)}
          \prod_{i=1}^N \frac{p(D_i \mid \theta_i')}{p(D_i \mid \theta_i)}\Big]\Big\},

a Metropolis step of a group move (Liu and Sabatti 2000), the non-centred half of an interweaved sampler (Yu and Meng
2011). It needs the likelihood of all tasks, whole, and is made where one block holds them all.

One element of tau is scaled in a visit, in turn. The width of the proposal adapts in the warm-up and is fixed after it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from pyro_lift.inference.gibbs.scales import ScaleSite
from pyro_lift.inference.gibbs.state import Chain, Settings, Structure
from pyro_lift.inference.program import Evaluation, Rows

__all__ = ["Scaled", "can_scale", "scalable", "scale"]

#: Share of proposals that the warm-up aims at: best for a random walk in one dimension (Gelman, Roberts, Gilks 1996).
ACCEPTED = 0.44


class Scaled(NamedTuple):
    """The chain after a scaling move.

    Attributes:
        values: theta by task and family.
        phi: all global sites.
        sums: S.
        squares: Q around phi.
        widths: logarithm of the proposal's width, by site.
    """

    values: Mapping[int | None, Rows]
    phi: dict[str, Tensor]
    sums: dict[str, Tensor]
    squares: dict[str, Tensor]
    widths: dict[str, Tensor]


def can_scale(structure: Structure, settings: Settings, run: Evaluation) -> bool:
    """Whether one visit sees the whole likelihood, no law is tempered, and there is a scale that can be multiplied."""
    whole = all(size.taken == size.size for size in run.plates.values())
    plain = settings.temperature == 1.0 and not settings.site_temperature and not settings.site_update
    return whole and plain and structure.pass_size == structure.num_tasks and bool(scalable(structure))


def scalable(structure: Structure) -> list[str]:
    """List the scale sites whose families all have uncorrelated coordinates, a power law, and one mean."""
    laws = [(pair.law, pair.dense) for pair in structure.pairs.values() if pair.law is not None]
    odd = {law.site for law, dense in laws if dense is not None or not law.logarithmic}
    odd |= {level.law.site for level in structure.regressions.values() if level.law is not None}
    return [name for name in structure.scales if name in {law.site for law, _ in laws} - odd]


def scale(
    chain: Chain, index: Tensor, before: Scaled, step: int, adapts: bool, generator: torch.Generator | None
) -> Scaled:
    """Propose one factor for one element of every scale site, and take it or leave it.

    Args:
        chain: what was set at set-up.
        index: all tasks.
        before: where the chain stands.
        step: of the visit; names the element.
        adapts: whether the width of the proposal still adapts.
        generator: of the proposal.
    """
    now, current = before, None
    for name in scalable(chain.structure):
        if current is None:
            current = _density(chain, now, index)
        element = step % now.phi[name].numel()
        width = now.widths.get(name, torch.zeros(now.phi[name].numel(), dtype=torch.float64))
        noise, uniform = _random(generator, now.phi[name].device)
        proposed = _proposed(chain, now, name, element, math.exp(float(width[element])) * noise)
        chance, density = 0.0, current
        if proposed is not None:
            density = _density(chain, proposed, index)
            site = chain.structure.scales[name]
            assert isinstance(site, ScaleSite)
            prior = _log_prior(site, proposed.phi[name]) - _log_prior(site, now.phi[name])
            ratio = density - current + prior
            chance = math.exp(min(0.0, ratio)) if math.isfinite(ratio) else 0.0
            if uniform < chance:
                now, current = proposed, density
        if adapts:
            width = width.clone()
            width[element] += (chance - ACCEPTED) / (1.0 + step / len(width)) ** 0.6
        now = now._replace(widths={**now.widths, name: width})
    return now


def _random(generator: torch.Generator | None, device: torch.device) -> tuple[float, float]:
    """One standard normal and one uniform number."""
    noise = torch.randn((), generator=generator, dtype=torch.float64, device=device)
    return float(noise), float(torch.rand((), generator=generator, dtype=torch.float64, device=device))


def _proposed(chain: Chain, now: Scaled, name: str, element: int, s: float) -> Scaled | None:
    """The chain with one element of a scale site times exp(s), and theta with it; None outside the support."""
    structure, dims = chain.structure, {site.family: site.plate_dim for site in chain.cache.layouts.get(None, ())}
    site, leaf = structure.scales[name], now.phi[name]
    assert isinstance(site, ScaleSite)
    x = site.value(leaf.double()).log()
    shift = torch.zeros(leaf.numel(), dtype=torch.float64, device=leaf.device)
    shift[element] = s
    shift = shift.view(leaf.shape)
    moved = _at(site, x + shift, leaf)
    if moved is None:
        return None
    exact_shift = site.value(moved.double()).log() - x  # what is left of s after rounding
    phi, values = {**now.phi, name: moved}, {task: dict(rows) for task, rows in now.values.items()}
    sums, squares = dict(now.sums), dict(now.squares)
    for key, pair in structure.pairs.items():
        if pair.law is None or pair.law.site != name:
            continue
        factor, centre = (0.5 * pair.law.power * pair.law.spread(exact_shift)).exp(), now.phi[key].double()
        parts = []
        for task, rows in values.items():
            theta = rows[pair.family]
            rows[pair.family] = (centre + factor * (theta.double() - centre)).to(theta.dtype)
            rest = rows[pair.family].double() - centre
            parts.append(rest if task is not None else rest.movedim(dims[pair.family], 0))
        # Every theta is at hand: the sums are made anew, and no rounding of theta stays in them.
        rests = torch.cat([part.reshape(-1, *centre.shape) for part in parts])
        sums[key], squares[key] = structure.num_tasks * centre + rests.sum(0), rests.square().sum(0)
    return now._replace(values=values, phi=phi, sums=sums, squares=squares)


def _at(site: ScaleSite, x: Tensor, like: Tensor) -> Tensor | None:
    """The point of unconstrained space at which the logarithm of the site's value is x; None outside the support."""
    value = x.exp()
    leaf = value if site.transform is None else site.transform.inv(value)
    leaf = leaf.to(like.dtype)
    back = site.value(leaf.double()).log()
    return leaf if bool(((back - x).abs() < 1e-4).all()) else None


def _log_prior(site: ScaleSite, leaf: Tensor) -> float:
    """Log prior density of the logarithm of the site's value."""
    value = site.value(leaf.double())
    return float((site.prior.log_prob(value) + value.log()).sum())


def _density(chain: Chain, at: Scaled, index: Tensor) -> float:
    """Log likelihood of all tasks, and log density of the local sites that no scale multiplies."""
    run = chain.program.run(at.phi, at.values, index, None, want_grad=False)
    multiplied = {pair.family for pair in chain.structure.pairs.values() if pair.law is not None}
    others = {name: site for name, site in run.locals.items() if site.family not in multiplied}
    return float(chain.settings.n_inflate * run.log_likelihood + run.log_prior(others))

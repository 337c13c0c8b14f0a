r"""Theta moved by leapfrog steps and a Metropolis test, task by task: the conditional of theta is left exactly.

Given phi the tasks are independent, so each of a block's tasks has a test of its own. With momenta
:math:`r \sim \mathcal N(0, I)`, :math:`\epsilon = \sqrt\eta` and the log density of task i

.. math:: \ell_i = \tfrac1T \big(\log p(\theta_i \mid \phi) + \kappa \log p(D_i \mid \theta_i, \phi)\big),

L leapfrog steps :math:`r \mathrel{+}= \tfrac\epsilon2 \nabla\ell,\ \theta \mathrel{+}= \epsilon r,\ r \mathrel{+}=
\tfrac\epsilon2 \nabla\ell` are taken with probability :math:`\min(1, e^{\Delta\ell_i - \Delta|r_i|^2/2})`. One leapfrog
step is MALA, the Langevin step of Eq. 10 with a test (Roberts and Tweedie 1996); more are HMC (Neal 2011). epsilon is
tuned in the warm-up by dual averaging of the acceptance (Hoffman and Gelman 2014, section 3.2) and frozen after it.

The test needs the likelihood whole: a minibatch's would test another density at each visit.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
from pyro.distributions.util import scale_and_mask
from torch import Tensor

from pyro_lift.inference.gibbs.rows import Values, regrouped
from pyro_lift.inference.gibbs.state import Chain, Phase, Settings, SGLDGibbsInfo, SGLDGibbsState, Streams
from pyro_lift.inference.program import Evaluation, Latent
from pyro_lift.inference.sgld import Drift, check_finite, gaussian_noise

__all__ = ["TARGETS", "MetropolisMove", "move", "task_densities", "with_tuned_step"]

#: Acceptance to which the step is tuned: what is best for many coordinates (Roberts and Rosenthal 1998; Beskos et al.
#: 2013).
TARGETS = {"mala": 0.57, "hmc": 0.65}
#: Dual averaging: how strongly steps are drawn to the first one, visits that count little, and the power with which
#: early steps are forgotten; Hoffman and Gelman's values.
SHRINKAGE, DELAY, FORGETTING = 0.05, 10.0, 0.75
#: The step's share by which each trajectory differs, so that none closes on itself for ever.
JITTER = 0.2


class MetropolisMove(NamedTuple):
    """A block after its theta have moved.

    Attributes:
        first: the run of the program where theta stood, and the gradient by site of all but the Gaussian priors.
        sites: values by site name.
        values: the same by task and family.
        tuned: what the step is tuned by.
        info: diagnostics of the move.
    """

    first: tuple[Evaluation, dict[str, Tensor]]
    sites: dict[str, Tensor]
    values: Values
    tuned: dict[str, Tensor]
    info: SGLDGibbsInfo


class _Point(NamedTuple):
    """A block at some theta: its values and gradients by site, and each task's log density ``[tasks]``."""

    run: Evaluation
    sites: dict[str, Tensor]
    density: Tensor
    gradient: dict[str, Tensor]


def task_densities(run: Evaluation, settings: Settings) -> Tensor:
    """Log density of each of a block's tasks in its unconstrained theta given phi; ``[tasks]``, with a graph."""
    parts: dict[int | None, list[Tensor]] = {}
    for site in run.locals.values():
        value = site.leaf if site.transform is None else site.transform(site.leaf)
        terms = [scale_and_mask(site.fn.log_prob(value), site.scale, site.mask)]
        if site.transform is not None:
            terms.append(site.transform.log_abs_det_jacobian(site.leaf, value))
        parts.setdefault(site.task, []).extend(_by_task(term, _dim(site)) for term in terms)
    for seen in run.observed:
        if seen.local:
            term = settings.n_inflate * scale_and_mask(seen.fn.log_prob(seen.value), seen.scale, seen.mask)
            dim = None if seen.plate_dim is None else term.dim() + seen.plate_dim
            parts.setdefault(seen.task, []).append(_by_task(term, dim))
    if None in parts:
        return torch.stack(torch.broadcast_tensors(*parts[None])).sum(0) / settings.temperature
    return torch.stack([torch.stack(parts[task]).sum() for task in run.tasks]) / settings.temperature


def _dim(site: Latent) -> int | None:
    """The dimension of the tasks in a site's value; None where the site is one task's."""
    return site.plate_dim if site.task is None else None


def _by_task(term: Tensor, dim: int | None) -> Tensor:
    """A term's sum over everything but the dimension of the tasks, if it has one."""
    return term.sum() if dim is None else term.movedim(dim, 0).reshape(term.shape[dim], -1).sum(1)


def move(
    state: SGLDGibbsState, chain: Chain, values: Values, index: Tensor, streams: Streams, phase: Phase
) -> MetropolisMove:
    """Move a block's theta by one or more tested trajectories; pure.

    Raises:
        DivergedError: density or gradient not finite where theta stands. Where a proposal is, it is not taken.
    """
    settings, tasks = chain.settings, tuple(index.tolist())
    here = _point(state, chain, values, index, streams)
    likelihood = here.run.log_likelihood.detach()
    norm = check_finite(Drift(likelihood, here.gradient, {}), state.step, tasks, chain.cache.watch)
    first = here.run, _without_priors(here)
    tuned = state.tuned
    acceptance: list[Tensor] = []
    for _ in range(settings.theta_steps_per_visit):
        step = _tuned_step(tuned, settings, state.step, phase, likelihood)
        there, log_ratio = _trajectory(state, chain, here, step, index, streams)
        uniform = torch.rand(log_ratio.shape, dtype=log_ratio.dtype, device=log_ratio.device, generator=streams.noise)
        here = _chosen(here, there, uniform.log() < log_ratio)
        acceptance.append(log_ratio.exp().clamp(max=1.0).mean())
        if phase == "burn-in":
            tuned = _tuned(tuned, settings, state.step, acceptance[-1])
    eta = _tuned_step(tuned, settings, state.step, phase, likelihood).square()
    accepted = torch.stack(acceptance).mean()
    # On an accelerator the number stays there until it is asked for.
    size = eta if chain.cache.watch is not None else float(eta)
    info = SGLDGibbsInfo(tasks, likelihood, norm, size, False, phase, accepted)
    return MetropolisMove(first, here.sites, regrouped(here.run, here.sites), tuned, info)


def _point(state: SGLDGibbsState, chain: Chain, values: Values, index: Tensor, streams: Streams) -> _Point:
    run = chain.program.run(state.phi, values, index, streams.rows)
    density = task_densities(run, chain.settings)
    leaves = [site.leaf for site in run.locals.values()]
    # The accumulators of phi differentiate the first run's conditionals once more.
    grads = torch.autograd.grad(density.sum(), leaves, retain_graph=True, allow_unused=True)
    gradient = {
        name: torch.zeros_like(leaf) if g is None else g
        for (name, leaf, g) in zip(run.locals, leaves, grads, strict=True)
    }
    sites = {name: site.leaf.detach() for name, site in run.locals.items()}
    return _Point(run, sites, density.detach(), gradient)


def _without_priors(here: _Point) -> dict[str, Tensor]:
    """Gradients of everything but the sites' own Gaussian priors, as :meth:`Evaluation.drift` gives them at T = 1."""
    gradient = {}
    for name, site in here.run.locals.items():
        prior = site.gaussian()
        gradient[name] = here.gradient[name]
        if prior is not None:
            gradient[name] = gradient[name] + (prior.precision * (here.sites[name] - prior.mean)).detach()
    return gradient


def _trajectory(
    state: SGLDGibbsState, chain: Chain, here: _Point, step: Tensor, index: Tensor, streams: Streams
) -> tuple[_Point, Tensor]:
    """Return the end of a trajectory and the log of each task's ratio of acceptance."""
    settings, sites = chain.settings, here.run.locals
    momentum = {name: gaussian_noise(value, streams.noise) for name, value in here.sites.items()}
    before = _kinetic(sites, momentum, len(index))
    if settings.theta_update == "hmc":
        jitter = torch.rand((), dtype=step.dtype, device=step.device, generator=streams.noise)
        step = step * (1.0 + JITTER * (2.0 * jitter - 1.0))
    # A mass by family: steps are longer by the root of site_step_scale, as those of SGLD are.
    steps = {
        name: (step * settings.site_step_scale.get(site.family, 1.0) ** 0.5).to(here.sites[name])
        for name, site in sites.items()
    }
    there = here
    for _ in range(settings.leapfrog_steps if settings.theta_update == "hmc" else 1):
        momentum = {name: r + 0.5 * steps[name] * there.gradient[name] for name, r in momentum.items()}
        moved = {name: there.sites[name] + steps[name] * r for name, r in momentum.items()}
        there = _point(state, chain, regrouped(here.run, moved), index, streams)
        momentum = {name: r + 0.5 * steps[name] * there.gradient[name] for name, r in momentum.items()}
    log_ratio = there.density - here.density - (_kinetic(sites, momentum, len(index)) - before)
    return there, torch.where(torch.isfinite(log_ratio), log_ratio, -math.inf)


def _kinetic(sites: Mapping[str, Latent], momentum: Mapping[str, Tensor], count: int) -> Tensor:
    """Half the squared momentum of each task; ``[tasks]``."""
    parts: dict[int | None, list[Tensor]] = {}
    for name, site in sites.items():
        parts.setdefault(site.task, []).append(_by_task(0.5 * momentum[name].square(), _dim(site)))
    if None in parts:
        return torch.stack([part.expand(count) for part in parts[None]]).sum(0)
    return torch.stack([torch.stack(own).sum() for own in parts.values()])


def _chosen(here: _Point, there: _Point, taken: Tensor) -> _Point:
    """The proposal where a task takes it, and where the task stands elsewhere."""
    sites, gradient = {}, {}
    order = {task: k for k, task in enumerate(here.run.tasks)}
    for name, site in here.run.locals.items():
        dim = _dim(site)
        if dim is None:
            mask = taken[0 if site.task is None else order[site.task]]
        else:
            shape = [1] * here.sites[name].dim()
            shape[dim] = len(taken)
            mask = taken.view(shape)
        sites[name] = torch.where(mask, there.sites[name], here.sites[name])
        gradient[name] = torch.where(mask, there.gradient[name], here.gradient[name])
    return _Point(here.run, sites, torch.where(taken, there.density, here.density), gradient)


# ------------------------------------------------------------------------------------------------ the step


def _tuned_step(tuned: Mapping[str, Tensor], settings: Settings, step: int, phase: Phase, like: Tensor) -> Tensor:
    """Return epsilon, the root of eta: the first one, the tuner's next trial, or its mean once it is frozen."""
    if not tuned:
        return torch.full((), settings.eta(step) ** 0.5, dtype=torch.float64, device=like.device)
    return tuned["log_step" if phase == "burn-in" else "log_mean"].exp()


def _tuned(tuned: Mapping[str, Tensor], settings: Settings, step: int, accepted: Tensor) -> dict[str, Tensor]:
    """One update of dual averaging: after t visits with mean gap h of the acceptance from its target,
    log epsilon = mu - h sqrt(t) / gamma, and its mean weighs visit t by t^-kappa.
    """
    accepted = accepted.double().nan_to_num(0.0)
    if not tuned:
        begin = 0.5 * math.log(settings.eta(step))
        zero = torch.zeros_like(accepted)
        tuned = {"centre": zero + begin, "log_step": zero + begin, "log_mean": zero, "gap": zero, "count": zero}
    t = tuned["count"] + 1.0
    weight = 1.0 / (t + DELAY)
    gap = (1.0 - weight) * tuned["gap"] + weight * (TARGETS[settings.theta_update] - accepted)
    log_step = tuned["centre"] - t.sqrt() / SHRINKAGE * gap
    share = t**-FORGETTING
    log_mean = share * log_step + (1.0 - share) * tuned["log_mean"]
    return {"centre": tuned["centre"], "log_step": log_step, "log_mean": log_mean, "gap": gap, "count": t}


def with_tuned_step(
    report: dict[str, float | str], tuned: Mapping[str, Tensor], settings: Settings
) -> dict[str, float | str]:
    """Put the tuned step in a report, and the length of a trajectory in its a_theta: L steps go as far as L^2 eta."""
    if settings.theta_update not in TARGETS:
        return report
    eta = float(tuned["log_mean"].exp()) ** 2 if tuned else float(report["step_size"])
    length = settings.leapfrog_steps if settings.theta_update == "hmc" else 1
    factor = settings.theta_steps_per_visit * length**2 * eta / float(report["step_size"])
    return {
        name: eta if name == "step_size" else float(value) * factor if name.startswith("a_theta") else value
        for name, value in report.items()
    }

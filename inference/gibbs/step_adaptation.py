r"""Steps of theta that nobody chose: by family, from curvature where the chain is, through the warm-up.

On a Gaussian of curvature :math:`\lambda` the discretised law of a step eta has the variance :math:`1/(\lambda - \eta
\lambda^2/4)`, so that :math:`\eta = 4 b/\lambda` leaves it a share :math:`b/(1 - b)` too wide (b = 0.05,
:data:`~pyro_lift.inference.stability.DEFAULT_SHARE`). The exponential integrator at a normal prior of precision p,
under a likelihood of curvature h, has :math:`b = h \tanh(\eta p/4)/p \le \eta h/4`: there :math:`\lambda` is the
likelihood's alone, however narrow the prior, also where its width is unknown and moves. With a family's own largest
curvature :math:`\lambda_f`, and the largest :math:`\mu` of all families together in units of theirs,

.. math:: \eta_f = \frac{4 b}{\mu\,\lambda_f}

gives each family its own step, and the stiffest direction of all that bias and no more. The start may curve otherwise
than where the posterior lies; so curvature is measured again at some visits of the warm-up, the largest of its second
half stands, and the steps are frozen after it. A task that curves much more than those is measured at its first visit.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from pyro_lift.inference.gibbs.state import Chain, Phase, Settings, SGLDGibbsState
from pyro_lift.inference.program import Evaluation, Latent
from pyro_lift.inference.stability import (
    CURVATURE_DIMENSIONS,
    DEFAULT_SHARE,
    largest_curvature,
    objective_of,
    surely_below,
)

__all__ = ["adapted", "eta_of", "reported"]

#: Visits of the warm-up that measure, and products by which they do.
MEASUREMENTS, ITERATIONS = 32, 12
#: Curvature of a task at its first visit, in units of the largest so far, from which it is measured too.
ODD = 5.0
#: Of a prior's precision: eta p / 2 is then 10, and nothing is left of where theta was.
FORGETS = 0.01
_GOLDEN = 0.6180339887498949
_TOGETHER, _HALF = "all together", "second half"


def eta_of(tuned: Mapping[str, Tensor], settings: Settings, step: int, family: str) -> float:
    """Return the step size of a family, without the user's factor on it."""
    if not settings.adapts or family not in tuned:
        return settings.eta(step)
    together = float(tuned[_TOGETHER]) if _TOGETHER in tuned else 1.0
    return 4.0 * DEFAULT_SHARE / (float(tuned[family]) * together)


def adapted(state: SGLDGibbsState, chain: Chain, run: Evaluation, phase: Phase) -> dict[str, Tensor]:
    """Take a visit's curvature into account, where it is time to; called before theta moves, as the graph is there.

    Args:
        state: of the chain.
        chain: its settings say for how many visits steps adapt.
        run: of the block, with a graph.
        phase: of the visit.

    Returns:
        The largest curvatures by family, in the window that stands.

    Raises:
        ValueError: a task is visited first after the warm-up, and its curvature makes the step unstable.
    """
    settings, step, tuned, fresh = chain.settings, state.step, state.tuned, chain.cache.fresh
    if not settings.adapts:
        return dict(tuned)
    if phase != "burn-in":
        if fresh:
            _check_late(chain, tuned, run, step)
        return dict(tuned)
    due = (step * _GOLDEN) % 1.0 < MEASUREMENTS / settings.adapts
    if not due and not (fresh and not _is_stable(chain, tuned, run, step, 4.0 * DEFAULT_SHARE * ODD)):
        return dict(tuned)
    measured = _measured(chain, run)
    if not measured:
        return dict(tuned)
    half = 1.0 if 2 * step >= settings.adapts else 0.0
    like = next(iter(measured.values()))
    if tuned and half == float(tuned[_HALF]):
        names = tuned.keys() | measured.keys()
        measured = {k: torch.stack([x[k] for x in (tuned, measured) if k in x]).amax() for k in names}
    # What a fresh window has not seen yet keeps what was known.
    return {**tuned, **measured, _HALF: torch.full_like(like, half)}


def _families(run: Evaluation) -> dict[str, list[Latent]]:
    families: dict[str, list[Latent]] = {}
    for site in run.locals.values():
        families.setdefault(site.family, []).append(site)
    return families


def _objective(chain: Chain, run: Evaluation) -> Tensor:
    """What the step must follow: everything, but the normal priors that the exponential integrator moves exactly."""
    settings = chain.settings
    if settings.integrator != "exponential":
        return objective_of(run, settings.n_inflate)
    total = settings.n_inflate * run.log_likelihood
    for site in run.locals.values():
        # A step with momentum is kicked by priors, too; paired families' are seen to where it is made.
        kicked = settings.theta_update == "underdamped" and site.family not in chain.structure.pair_of
        if site.gaussian() is None or kicked:
            total = total + site.log_prob_at(site.leaf)
        elif site.family in chain.cache.coupled:
            total = total + site.log_prob_at(site.leaf.detach())
    return total


def _least(chain: Chain, sites: list[Latent]) -> float:
    """A curvature so small beside a family's prior that the step forgets where it was; 0 where no prior says so."""
    priors = [site.gaussian() for site in sites]
    if chain.settings.integrator != "exponential" or any(prior is None for prior in priors):
        return 0.0
    return FORGETS * min(float(prior.precision.detach().min()) for prior in priors if prior is not None)


def _measured(chain: Chain, run: Evaluation) -> dict[str, Tensor]:
    """The largest curvature by family, and that of all together in their units; without those that do not curve."""
    objective, families = _objective(chain, run), _families(run)
    found: dict[str, float] = {}
    for family, sites in families.items():
        largest = largest_curvature(objective, [site.leaf for site in sites], ITERATIONS)
        curvature = math.nan if largest is None else max(largest, _least(chain, sites))
        if math.isfinite(curvature) and curvature > 0.0:
            found[family] = curvature
    if len(found) < len(families):
        return {}
    if len(found) > 1:
        sites = list(run.locals.values())
        gains = [torch.full((), 1.0 / found[site.family]).to(site.leaf) for site in sites]
        together = largest_curvature(objective, [site.leaf for site in sites], ITERATIONS, gains=gains)
        found[_TOGETHER] = max(1.0, together) if together is not None and math.isfinite(together) else float(len(found))
    device = next(iter(run.locals.values())).leaf.device
    return {name: torch.tensor(value, dtype=torch.float64, device=device) for name, value in found.items()}


def _is_stable(chain: Chain, tuned: Mapping[str, Tensor], run: Evaluation, step: int, limit: float) -> bool:
    """Whether the largest eigenvalue of eta^(1/2) H eta^(1/2) is below a limit; 4 is where Euler's step grows."""
    sites = list(run.locals.values())
    leaves = [site.leaf for site in sites]
    if sum(leaf.numel() for leaf in leaves) > CURVATURE_DIMENSIONS:
        return True
    settings, scale = chain.settings, chain.settings.site_step_scale
    etas = [eta_of(tuned, settings, step, site.family) * scale.get(site.family, 1.0) for site in sites]
    gains = [torch.full((), eta).to(leaf) for eta, leaf in zip(etas, leaves, strict=True)]
    objective = _objective(chain, run)
    if surely_below(objective, leaves, limit, ITERATIONS, gains=gains):
        return True
    largest = largest_curvature(objective, leaves, ITERATIONS, gains=gains)
    return largest is None or not largest >= limit


def _check_late(chain: Chain, tuned: Mapping[str, Tensor], run: Evaluation, step: int) -> None:
    if not _is_stable(chain, tuned, run, step, 4.0):
        tasks = ", ".join(map(str, run.tasks))
        raise ValueError(
            f"task {tasks}: it is visited first after the warm-up, and its curvature makes steps unstable that were "
            "measured on other tasks. Take warmup_steps long enough to visit every task, or pass a value for "
            "step_size."
        )


def reported(
    report: Mapping[str, float | str], tuned: Mapping[str, Tensor], settings: Settings, families: Mapping[str, str]
) -> dict[str, float | str]:
    """Put adapted steps in a report.

    Args:
        report: with the steps that the chain began with.
        tuned: as :func:`adapted` gives it.
        settings: of the chain.
        families: the paired family of each global site.
    """
    if not settings.adapts or not tuned:
        return dict(report)
    first, changed = float(report["step_size"]), dict(report)
    etas = {name: eta_of(tuned, settings, 0, name) for name in tuned if name not in (_TOGETHER, _HALF)}
    for name, eta in etas.items():
        if len(etas) > 1:
            changed[f"step_size ({name})"] = eta
    for site, family in families.items():
        changed[f"a_theta ({site})"] = float(report[f"a_theta ({site})"]) * etas.get(family, first) / first
    changed["step_size"] = min(etas.values())
    changed["curvature"] = max(float(value) for name, value in tuned.items() if name in etas)
    return changed

r"""Theta moved with momentum: one step of underdamped Langevin dynamics a visit, by one gradient.

A theta_i keeps its velocity v_i between its visits. With :math:`h = \sqrt\eta` a step is ABOBA (Leimkuhler and Matthews
2015, chapter 7): half of A, half of B, O, half of B, half of A, where

- A goes straight on: :math:`\theta \mathrel{+}= h\,v`;
- B is a kick by the gradient of the log density, :math:`v \mathrel{+}= h\,\nabla`, between both halves of A;
- O forgets velocity: :math:`v \mapsto c\,v + \sqrt{T (1 - c^2)}\,\xi`, c being ``momentum``.

The parts are symmetric about O, so that the law is left up to :math:`O(h^2)`. On a Gaussian of curvature lambda theta
has its law exactly, at every step that is stable (:math:`\eta < 4/\lambda`, as Langevin's is); v alone is too wide, by
:math:`1/(1 - \eta\lambda/4)`. v is independent of theta and phi in the law, so that phi's own draw needs no word of it.
Where the prior of a paired family is narrow, eta is at most its variance, whatever the scale has come to.

Directions that are much wider than the step relax :math:`(1 + c)/(1 - c)` times as fast as by Langevin's step of the
same eta. The gradient's noise is as much worse: a minibatch's variance V adds :math:`\eta V/(1 - c^2)` to the
temperature, against :math:`\eta V/4`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pyro_lift.inference.gibbs.rows import Values, regrouped, task_values
from pyro_lift.inference.gibbs.state import Chain, Settings, SGLDGibbsState, Structure
from pyro_lift.inference.gibbs.step_adaptation import eta_of
from pyro_lift.inference.program import Evaluation
from pyro_lift.inference.sgld import Drift, gaussian_noise

__all__ = ["check_underdamped", "end_step", "half_step", "velocities"]


def check_underdamped(settings: Settings, structure: Structure, distributed: bool) -> None:
    """Refuse what a step with momentum does not go with.

    Raises:
        ValueError: with the reason and the way out.
    """
    if settings.theta_update != "underdamped":
        return
    faults = {
        'preconditioner="rms"': settings.decay is not None and "it has one mass; use site_step_scale",
        f'translation="{settings.translation}"': settings.translation not in ("none", "auto")
        and "it takes the gradients where theta is stored",
        "site_update": bool(settings.site_update) and "a site that is solved has no velocity",
        "distributed=True": distributed and "each process would need the velocities of the others",
        "a multivariate normal family": any(pair.dense is not None for pair in structure.pairs.values())
        and "it may become narrower than any step that was measured",
    }
    for option, reason in faults.items():
        if reason:
            raise ValueError(f'theta_update="underdamped" does not go with {option}: {reason}. Or use "sgld".')


def velocities(
    chain: Chain, tasks: tuple[int, ...], values: Values, noise: torch.Generator | None
) -> dict[int | None, dict[str, Tensor]]:
    """Return the stored velocities of a block, or fresh ones where one of its tasks has none yet.

    Args:
        chain: with its store of velocities.
        tasks: of the block.
        values: theta of the block.
        noise: of the fresh ones.
    """
    assert chain.momenta is not None
    stored = task_values(chain._replace(store=chain.momenta), tasks)
    if stored is not None:
        return stored
    T, settings = chain.settings.temperature, chain.settings
    return {
        task: {
            family: (T * settings.site_temperature.get(family, 1.0)) ** 0.5 * gaussian_noise(value, noise)
            for family, value in rows.items()
        }
        for task, rows in values.items()
    }


def half_step(
    state: SGLDGibbsState, chain: Chain, values: Values, moving: Values
) -> dict[int | None, dict[str, Tensor]]:
    """Make half of A on a block: return its theta."""
    return {
        task: {family: x + 0.5 * _h(state, chain, family) * moving[task][family] for family, x in rows.items()}
        for task, rows in values.items()
    }


def end_step(
    state: SGLDGibbsState,
    chain: Chain,
    run: Evaluation,
    drift: Drift,
    moving: Values,
    noise: torch.Generator | None,
) -> tuple[dict[str, Tensor], dict[int | None, dict[str, Tensor]]]:
    """Make B, O, B and the other half of A: return theta by site, and velocities.

    Args:
        state: of the chain.
        chain: what was set at set-up.
        run: of the block, at theta after the first half of A.
        drift: the gradients there.
        moving: velocities there.
        noise: of O.
    """
    settings, moved, speed = chain.settings, {}, {}
    c = settings.momentum
    for name, site in run.locals.items():
        x, h, kick, prior = (
            site.leaf.detach(),
            _h(state, chain, site.family),
            drift.gradient[name],
            drift.gaussian[name],
        )
        if prior is not None:
            kick = kick - prior.precision * (x - prior.mean)
        T = settings.temperature * settings.site_temperature.get(site.family, 1.0)
        v = moving[site.task][site.family] + 0.5 * h * kick
        v = c * v + (T * (1.0 - c * c)) ** 0.5 * gaussian_noise(x, noise) + 0.5 * h * kick
        moved[name], speed[name] = x + 0.5 * h * v, v
    return moved, regrouped(run, speed)


def _h(state: SGLDGibbsState, chain: Chain, family: str) -> float:
    """The root of a family's step, no longer than its prior is wide."""
    settings, pair = chain.settings, chain.structure.pair_of.get(family)
    eta = eta_of(state.tuned, settings, state.step, family) * settings.site_step_scale.get(family, 1.0)
    if pair is not None:
        eta = min(eta, float(pair.at(chain.structure.scales, state.phi).local_variance.min()))
    return float(eta**0.5)

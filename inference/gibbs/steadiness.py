r"""Joint training that becomes unsteady goes back, and on at a smaller rate.

Adam's steps do not depend on how large gradients are, so a rate that is a little too large for a network carries it
away as fast as it taught it, and does not bring it back. Only the losses on the way tell. They are compared by windows
of about :data:`WINDOW` visits, W, with mean m and variance v: where the last is plainly worse than the best,

.. math:: t = (m - m^*) \Big/ \sqrt{(v + v^*) / W} > 4,

the vector goes back to where it stood after the best window, Adam's running mean to zero, and the rate to
:data:`SMALLER` of what it was. Minibatches and the tasks' differences are in v, so no unit of the losses matters, and a
training that only stands still goes on: of a hundred runs of twenty windows with equal losses one goes back. A window
is of whole rounds of the tasks, so that windows differ in no task; where a round is longer than the training, nothing
is looked at.

What is kept is part of the chain's state, a copy of the vector and the losses of a window. A run that was begun before
this was goes on without it, and so do processes that share a chain.
"""

from __future__ import annotations

import logging
import math

import torch
from torch import Tensor

from pyro_lift.inference.gibbs.state import SGLDGibbsState

__all__ = ["rate_factor", "steadied", "window_of"]

#: Visits of a window, about, and by how many standard errors a worse one is worse.
WINDOW, PLAINLY = 50, 4.0
#: Factor on the rate.
SMALLER = 1.0 / 3.0
_LOSSES, _BEST, _FACTOR, _VECTOR = "joint.losses", "joint.best", "joint.factor", "joint.best."

log = logging.getLogger("pyro_lift")


def rate_factor(state: SGLDGibbsState) -> float:
    """Return the factor on the rate of joint training."""
    factor = state.tuned.get(_FACTOR)
    return 1.0 if factor is None else float(factor)


def window_of(visits: int) -> int:
    """Return W for so many visits of a round of all tasks: the multiple of it that is nearest to :data:`WINDOW`."""
    return max(round(WINDOW / visits), 1) * visits


def steadied(state: SGLDGibbsState, after: SGLDGibbsState, loss: Tensor, window: int) -> SGLDGibbsState:
    """Take a visit of joint training, and return the state to go on from.

    Args:
        state: before the visit.
        after: after it.
        loss: of the visit.
        window: W.
    """
    kept = dict(state.tuned)
    if state.step == 0:
        losses = torch.full((window,), math.nan, dtype=torch.float64, device=loss.device)
        kept |= {_LOSSES: losses, _FACTOR: torch.ones((), device="cpu")}
    if _LOSSES not in kept:  # begun before this was
        return after
    if kept[_FACTOR].device.type != "cpu":  # of a run that goes on: at every visit it would be waited for
        kept[_FACTOR] = kept[_FACTOR].cpu()
    place = state.step % window
    losses = kept[_LOSSES] = kept[_LOSSES].to(loss.device, copy=True)
    losses[place] = loss.detach().to(losses)
    if place < window - 1:
        return after._replace(tuned=kept)
    mean, variance = losses.mean(), losses.var()
    best = kept.get(_BEST)
    if best is None or bool(mean < best[0]):
        kept[_BEST] = torch.stack([mean, variance, mean.new_tensor(float(after.step))])
        kept |= {_VECTOR + name: after.phi[name].clone() for name in after.momentum}
    elif bool(mean - best[0] > PLAINLY * ((variance + best[1]) / window).sqrt()) or not bool(mean.isfinite()):
        kept[_FACTOR] = kept[_FACTOR] * SMALLER
        log.info(
            "joint training has become unsteady after %d steps: it goes back to where it was after %d, and on at %.2g "
            "times the rate.", after.step, int(best[2]), float(kept[_FACTOR]),
        )  # fmt: skip
        phi = after.phi | {name: kept[_VECTOR + name].clone() for name in after.momentum}
        after = after._replace(phi=phi, momentum={name: torch.zeros_like(x) for name, x in after.momentum.items()})
    return after._replace(tuned=kept)

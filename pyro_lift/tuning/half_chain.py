"""The chain over one half of the tasks, from where their joint training stands.

A vector that was trained jointly is surer of itself than the chain that follows it: the chain's phi is drawn, has its
prior, and moves by the pull of all tasks. On ten tasks of twenty digits the temperature that is best for predictions
from the vector of five was 2.8, and from the chain of these five 1.6, as it was from that of ten. So how sure
predictions may be is asked after a chain: half as long as that of all tasks, since half of the tasks are then visited
as often.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from pyro.ops.streaming import CountMeanVarianceStats
from torch import Tensor

from pyro_lift.inference.gibbs.kernel import SGLDGibbs
from pyro_lift.inference.mixture.batch_em import Moments
from pyro_lift.inference.progress import chain_bar
from pyro_lift.inference.sgld import DivergedError
from pyro_lift.tuning.joint_run import Standing, moments_of, watching
from pyro_lift.watching.watch import Watchers

__all__ = ["Settled", "half_chain"]


class Settled(NamedTuple):
    """What a chain of one half says of phi.

    Attributes:
        phi: one normal, diagonal, of its draws.
        second_moments: the preconditioner at the end, by local family.
        matching_scale: of label matching, the mean over its tasks; None elsewhere.
    """

    phi: Moments
    second_moments: dict[str, Tensor]
    matching_scale: float | None = None


def half_chain(
    kernel: SGLDGibbs,
    standing: Standing,
    burn_in: int,
    draws: int,
    *,
    progress: bool = False,
    on_step: Watchers | None = None,
) -> Settled | None:
    """Run the chain of one half.

    Args:
        kernel: over its tasks, which starts at the vector and has no joint training of its own.
        standing: where their joint training stands.
        burn_in: transitions before the first draw.
        draws: of phi, two or more.
        progress: whether there is a bar.
        on_step: what watches each step.

    Returns:
        None where the chain diverges.
    """
    title = "chain of half of the tasks"
    kernel.setup(burn_in)
    kernel.state = kernel.state._replace(second_moment={**kernel.state.second_moment, **standing.moments})
    weights, phi = dict(kernel.state.phi), CountMeanVarianceStats()
    try:
        with chain_bar(burn_in + draws, title, progress, 0, watching(on_step, title, standing.tasks)) as hook:
            for step in range(burn_in + draws):
                weights = kernel.sample(weights)
                hook(kernel, weights, "Warmup" if step < burn_in else "Sample", step)
                if step >= burn_in:
                    phi.update(weights["phi"].double().reshape(-1))
    except DivergedError:
        return None
    normal = _normal(phi, standing.vector)
    moments = {name: x.clone() for name, x in moments_of(kernel).items()}
    return Settled(normal, moments) if bool(normal.mean.isfinite().all()) else None


def _normal(phi: CountMeanVarianceStats, like: Tensor) -> Moments:
    told = phi.get()
    variance = told["variance"].clamp_min(torch.finfo(like.dtype).tiny)
    return Moments(like.new_ones(1), told["mean"].to(like).unsqueeze(0), variance.to(like).unsqueeze(0))

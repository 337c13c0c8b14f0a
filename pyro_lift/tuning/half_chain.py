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
from torch import Tensor

from pyro_lift.inference.gibbs.kernel import SGLDGibbs
from pyro_lift.inference.mixture.batch_em import Moments
from pyro_lift.inference.progress import chain_bar
from pyro_lift.inference.sgld import DivergedError
from pyro_lift.tuning.joint_run import Standing, moments_of
from pyro_lift.watching.watch import Watchers

__all__ = ["Settled", "half_chain"]


class Settled(NamedTuple):
    """What a chain of one half says of phi.

    Attributes:
        phi: one normal, diagonal, of its draws.
        second_moments: the preconditioner at the end, by local family.
    """

    phi: Moments
    second_moments: dict[str, Tensor]


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
    title, tasks = "chain of half of the tasks", standing.tasks
    if on_step is not None:
        on_step = on_step.of(on_step.run.kind, title, [len(t.train) for t in tasks], [t.name for t in tasks])
    kernel.setup(burn_in)
    kernel.state = kernel.state._replace(second_moment={**kernel.state.second_moment, **standing.moments})
    weights, phi = dict(kernel.state.phi), _Running()
    try:
        with chain_bar(burn_in + draws, title, progress, 0, on_step) as hook:
            for step in range(burn_in + draws):
                weights = kernel.sample(weights)
                hook(kernel, weights, "Warmup" if step < burn_in else "Sample", step)
                if step >= burn_in:
                    phi.see(weights["phi"].detach().reshape(-1))
    except DivergedError:
        return None
    normal = phi.normal(standing.vector)
    moments = {name: x.clone() for name, x in moments_of(kernel).items()}
    return Settled(normal, moments) if bool(normal.mean.isfinite().all()) else None


class _Running:
    """Mean and variance of draws, without keeping them."""

    def __init__(self) -> None:
        self.count, self.mean, self.squares = 0, torch.zeros(()), torch.zeros(())

    def see(self, draw: Tensor) -> None:
        self.count += 1
        delta = draw.double() - self.mean.to(draw.device)
        self.mean = self.mean.to(draw.device) + delta / self.count
        self.squares = self.squares.to(draw.device) + delta * (draw.double() - self.mean)

    def normal(self, like: Tensor) -> Moments:
        variance = (self.squares / max(self.count - 1, 1)).clamp_min(torch.finfo(like.dtype).tiny)
        return Moments(like.new_ones(1), self.mean.to(like).unsqueeze(0), variance.to(like).unsqueeze(0))

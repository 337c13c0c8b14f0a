"""What draws of the adapter's weights do to the loss: the measure of a prior before any training."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from pyro_lift.models.adapters import RandomAdapter
from pyro_lift.models.chance import chance_loss
from pyro_lift.models.likelihoods import log_likelihood
from pyro_lift.models.observation import has_head, outputs
from pyro_lift.models.rows import some_rows
from pyro_lift.models.solved_heads import SolvedHeads, has_solved_head
from pyro_lift.models.task import Task

__all__ = ["PriorLoss", "prior_loss"]

#: Enough to see a network break, and a second or two of a small encoder: tasks, rows of each, draws.
TASKS, ROWS, DRAWS = 8, 16, 2
#: Rows where each has to be predicted by a head solved on others.
HEAD_ROWS = 64


class PriorLoss(NamedTuple):
    """Mean losses in nats a row, over some tasks.

    Attributes:
        at_centre: of the centre itself.
        drawn: of draws around it.
        chance: of a prediction that ignores its input.
    """

    at_centre: float
    drawn: float
    chance: float

    @property
    def harmless(self) -> bool:
        """Whether draws cost at most a tenth of the way to chance, or of chance where the centre is no better."""
        way = self.chance - self.at_centre
        allowed = 0.1 * (way if way > 0.5 * self.chance else abs(self.chance))
        return self.drawn - self.at_centre <= allowed


@torch.no_grad()
def prior_loss(
    adapter: RandomAdapter,
    tasks: Sequence[Task],
    centre: Tensor,
    spread: float | Tensor,
    *,
    head_scale: float | None = None,
    solve: bool = True,
    noise_scale: float = 1.0,
    seed: int = 0,
) -> PriorLoss:
    r"""Measure what weights :math:`\mathcal N(c, s^2)` do to a few tasks of a family, the draws being the same for all.

    Args:
        adapter: the network as a function of theta.
        tasks: of the family; eight of them are looked at.
        centre: c, ``[D]``.
        spread: s, standard deviation; one number or ``[D]``.
        head_scale: None for a network whose head all tasks share; else each task's own head is solved.
        solve: whether label matching has solved heads too.
        noise_scale: standard deviation of the noise in regression.
        seed: of the draws; no other stream is touched.
    """
    generator = torch.Generator(device=centre.device).manual_seed(seed)
    noise = torch.randn(DRAWS, len(centre), generator=generator, dtype=centre.dtype, device=centre.device)
    some = [tasks[k * len(tasks) // min(TASKS, len(tasks))] for k in range(min(TASKS, len(tasks)))]
    at_centre, drawn, chance = [], [], []
    for task in some:
        own = has_solved_head(adapter, task, head_scale) if solve else has_head(task, head_scale)
        loss = _loss_of(adapter, task, centre, own, noise_scale)
        chance.append(chance_loss(task, noise_scale))
        at_centre.append(loss(centre))
        drawn += [loss(centre + spread * xi) for xi in noise]
    return PriorLoss(*(sum(values) / len(values) for values in (at_centre, drawn, chance)))


def _loss_of(
    adapter: RandomAdapter, task: Task, centre: Tensor, own_head: bool, noise_scale: float
) -> Callable[[Tensor], float]:
    """Make the mean loss of a few rows of a task, as a function of the adapter's weights."""
    if not own_head:
        rows = some_rows(task.train, ROWS)
        return lambda theta: (
            -float(log_likelihood(task.kind, outputs(adapter, rows, theta, None), rows.target, noise_scale).mean())
        )
    rows = some_rows(task.train, HEAD_ROWS)
    heads = SolvedHeads(adapter, [replace(task, train=rows)], centre)
    return lambda theta: -float(heads.log_prob_at(0, rows, theta).mean())

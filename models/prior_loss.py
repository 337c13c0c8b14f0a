"""What draws of the adapter's weights do to the loss: the measure of a prior before any training."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import NamedTuple

import torch
from torch import Tensor

from pyro_lift.models.adapters import RandomAdapter
from pyro_lift.models.chance import chance_loss
from pyro_lift.models.likelihoods import log_likelihood
from pyro_lift.models.observation import has_head, network_output, outputs
from pyro_lift.models.out_of_proportion import LEAST_LOSS, far_above
from pyro_lift.models.row_outputs import are_probabilities, mixing_of
from pyro_lift.models.rows import some_rows
from pyro_lift.models.solved_heads import SolvedHeads, has_solved_head
from pyro_lift.models.task import Task
from pyro_lift.support.evenly import spread_evenly

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
        outliers: tasks whose loss at the centre is far above the others' (:func:`.far_above`) and not in the means: by
            name, how many times the median of all it is.
        probabilities: whether the network's outputs, which are taken for scores of classes or tokens, are
            probabilities already (:func:`.are_probabilities`).
        mixing: by how much other rows change the output of one, relative to it (:func:`.mixing_of`).
    """

    at_centre: float
    drawn: float
    chance: float
    outliers: Mapping[str, float] = MappingProxyType({})
    probabilities: bool = False
    mixing: float = 0.0

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
    leave_out: bool = True,
) -> PriorLoss:
    r"""Measure what weights :math:`\mathcal N(c, s^2)` do to a few tasks of a family, the draws being the same for all.

    Args:
        adapter: the network as a function of theta.
        tasks: of the family; eight of them are looked at, and those out of all proportion to the others left out.
        centre: c, ``[D]``.
        spread: s, standard deviation; one number or ``[D]``.
        head_scale: None for a network whose head all tasks share; else each task's own head is solved.
        solve: whether label matching has solved heads too.
        noise_scale: standard deviation of the noise in regression.
        leave_out: whether tasks out of all proportion are left out of the means.
    """
    generator = torch.Generator(device=centre.device).manual_seed(0)
    noise = torch.randn(DRAWS, len(centre), generator=generator, dtype=centre.dtype, device=centre.device)
    some = spread_evenly(tasks, TASKS)
    at_centre, drawn, chance, seen = [], [], [], []
    for task in some:
        own = has_solved_head(adapter, task, head_scale) if solve else has_head(task, head_scale)
        loss = _loss_of(adapter, task, own, centre, noise_scale)
        chance.append(chance_loss(task, noise_scale))
        value, output = loss(centre)
        at_centre.append(value)
        scores = task.kind in ("classification", "tokens")
        seen.append((scores and are_probabilities(output), _mixing(adapter, task, centre, output)))
        drawn.append([loss(centre + spread * xi)[0] for xi in noise])
    far = far_above(at_centre, chance) if leave_out else []  # not under draws, whose harm is what is asked for
    kept = [k for k in range(len(some)) if k not in far]
    middle = max(statistics.median(map(abs, at_centre)), LEAST_LOSS)
    return PriorLoss(
        sum(at_centre[k] for k in kept) / len(kept),
        sum(value for k in kept for value in drawn[k]) / (DRAWS * len(kept)),
        sum(chance[k] for k in kept) / len(kept),
        {some[k].name: at_centre[k] / middle for k in far},
        all(probabilities for probabilities, _ in seen),
        max(mixing for _, mixing in seen),
    )


def _mixing(adapter: RandomAdapter, task: Task, centre: Tensor, output: Tensor) -> float:
    """Hold the output of a task's first row beside that of it alone, which is known where the network begins."""
    known = centre is adapter.initial and task.kind != "matching"
    return mixing_of(adapter, task.train, output) if known else 0.0


def _loss_of(
    adapter: RandomAdapter, task: Task, own_head: bool, centre: Tensor, noise_scale: float
) -> Callable[[Tensor], tuple[float, Tensor]]:
    """Make the mean loss of a few rows of a task, and the network's outputs, as a function of theta."""
    rows = some_rows(task.train, HEAD_ROWS if own_head else ROWS)
    if own_head:
        heads = SolvedHeads(adapter, [replace(task, train=rows)], centre, noise_scale=noise_scale)

        def with_head(theta: Tensor) -> tuple[float, Tensor]:
            found = network_output(adapter, rows, theta)
            return -float(heads.log_prob([0], found.unsqueeze(0), rows.target.unsqueeze(0)).mean()), found

        return with_head

    def shared(theta: Tensor) -> tuple[float, Tensor]:
        output = outputs(adapter, rows, theta, None)
        return -float(log_likelihood(task.kind, output, rows.target, noise_scale).mean()), output

    return shared

"""Whether the targets of regressions are in the unit of the network's outputs."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from pyro_lift.models.adapters import RandomAdapter
from pyro_lift.models.observation import outputs
from pyro_lift.models.prior_loss import ROWS, TASKS
from pyro_lift.models.rows import some_rows
from pyro_lift.models.task import Task

__all__ = ["Units", "units_of", "warn_of_units"]

log = logging.getLogger("pyro_lift")

#: The network is off by more than so many spreads of the targets. At 5 a small network still got there in 1,000 steps;
#: at 50 it had half of what ridge regression on the inputs had, without a word.
FAR = 8.0
#: Targets vary so many times as much as the outputs, or as little. At 100 some networks got there, others did not.
WIDE = 30.0


class Units(NamedTuple):
    """Where targets and outputs lie, of the output that is furthest off.

    Attributes:
        target: mean of the targets.
        spread: standard deviation of the targets around their task's mean.
        output: mean of the network's outputs on the same rows.
        varies: their standard deviation.
    """

    target: float
    spread: float
    output: float
    varies: float

    @property
    def differ(self) -> bool:
        """Whether they are so far apart that an adapter is not what is missing."""
        far = abs(self.target - self.output) > FAR * self.spread > 0.0
        wide = 0.0 < WIDE * self.varies < self.spread
        return far or wide or 0.0 < WIDE * self.spread < self.varies


@torch.no_grad()
def units_of(adapter: RandomAdapter, tasks: Sequence[Task]) -> Units:
    """Look at a few rows of a few tasks.

    Args:
        adapter: the network as a function of theta, looked at where it begins.
        tasks: regressions without heads of their own.
    """
    some = [tasks[k * len(tasks) // min(TASKS, len(tasks))] for k in range(min(TASKS, len(tasks)))]
    targets, means, within = [], [], []
    for task in some:
        rows = some_rows(task.train, ROWS)
        y = _columns(rows.target)
        targets.append(y.mean(0))
        within.append((_columns(task.train.target) - _columns(task.train.target).mean(0)).square().mean(0))
        means.append(_columns(outputs(adapter, rows.to(adapter.initial.device), adapter.initial, None)))
        if means[-1].shape[-1] != targets[-1].shape[-1]:  # what is made of these is not the output as it stands
            return Units(0.0, 1.0, 0.0, 1.0)
    target, spread = torch.stack(targets).mean(0), torch.stack(within).mean(0).sqrt()
    output, varies = torch.cat(means).mean(0), torch.cat(means).std(0, correction=0)
    worst = int(((target - output).abs() / spread.clamp_min(1e-300)).argmax())
    return Units(*(float(x[worst]) for x in (target, spread, output, varies)))


def warn_of_units(adapter: RandomAdapter, tasks: Sequence[Task]) -> None:
    """Say in the log where the targets of regressions are in another unit than the network's outputs.

    Args:
        adapter: the network as a function of theta.
        tasks: that share the network's outputs; others than regressions have no unit.
    """
    tasks = [task for task in tasks if task.kind == "regression"]
    if not tasks or not (units := units_of(adapter, tasks)).differ:
        return
    log.warning(
        "the targets lie around %.3g and vary within a task by %.3g; the untouched network's outputs lie around %.3g "
        "and vary by %.3g. Adapters of its layers hardly carry it there. Learn from (target - %.3g) / %.3g and undo "
        "that in predictions, or bring the network's last layer to the unit of the targets.",
        units.target, units.spread, units.output, units.varies, units.target, units.spread,
    )  # fmt: skip


def _columns(x: Tensor) -> Tensor:
    return x.detach().double().cpu().reshape(len(x), -1)

r"""Whether regressions want what a network says of their value, or the features that it says it from.

A network that ends in as many outputs as a target has values can be adapted as it is: a new task then moves adapter
weights alone, and what they can say is held near what the tasks share. Or its last layer is left out, and every task
has a ridge head of its own (:mod:`~pyro_lift.models.value_head`) on the features before it, around one of all tasks,
beside its adapter. Which is better depends on what the tasks share. Where they are functions that are made of the same
features in other proportions the heads are better by a tenth to a half of the error, from few rows on; where one layer
serves all tasks and what differs lies below it, it tells few rows more than a head of their own can know.

Rows of the untouched network cannot tell, since both ways adapt it. So where the network can be read before its last
layer both ways are gone before the chain (:mod:`~pyro_lift.tuning.both_ways`).
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch

from pyro_lift.models.adapters import RandomAdapter
from pyro_lift.models.observation import first_output
from pyro_lift.models.task import Task
from pyro_lift.tuning.class_layer import read_before_layer
from pyro_lift.tuning.halves import FEWEST_TASKS

__all__ = ["without_value_layer"]

log = logging.getLogger("pyro_lift")


@torch.no_grad()
def without_value_layer(adapter: RandomAdapter, tasks: Sequence[Task]) -> RandomAdapter | None:
    """Return the network read before its own last layer, where regressions may be predicted better by heads on that.

    Args:
        adapter: the network as a function of theta; its output is the tasks' values.
        tasks: of meta-training, which have passed the door.

    Returns:
        None where the tasks are no regressions, or fewer than four; where the output is features already; and where
        nothing before the last layer can be read, or theta has no effect there.
    """
    if any(task.kind != "regression" for task in tasks) or adapter.gives_features or len(tasks) < FEWEST_TASKS:
        return None
    task = max(tasks, key=lambda task: len(task.train)).to(adapter.initial.device)
    first_output(adapter, task)  # what it cannot be called with is refused as at the door
    apart = read_before_layer(adapter, task.train)
    if apart is not None:
        log.info(
            "the network's output is the tasks' value. It is tried as it stands, and with a head of every task's own "
            "on the features before its last layer: the way goes on that predicts rows of unseen tasks better. "
            'head="shared" leaves the network as it is.'
        )
    return apart

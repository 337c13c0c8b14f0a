r"""Whether a network's own classes are the tasks': else its last layer is left out, and tasks have heads of their own.

A network that ends in as many outputs as the tasks have classes may have been trained for these classes; or its last
layer is new and knows nothing; or every task names its classes in another order. In the latter cases what the layer
says is noise that adaptation has to undo, where a head that is solved on what the layer sees begins at the task's own
classes. Which case it is only rows can tell. On the untouched network, in nats a row and means over tasks,

.. math:: g = \text{entropy of a task's classes} - \text{loss of the network's scores},
          \qquad h = \text{the same} - \text{loss of heads of the tasks' own},

the scores at the one temperature that is best for all tasks, the heads on rows that they were not solved on, around a
head of the other half of the tasks where these share their classes. The layer is left out where heads are better by
the one-sided test at 5 %, and g is less than a quarter of h. Of a larger part it is not known which is better: what
the network knows of the classes it is often better adapted with, though heads alone do more at first, and often not.
So both ways are gone before the chain, and the one whose adaptations predict unseen tasks better
(:mod:`~pyro_lift.tuning.both_ways`) is taken.

A new layer may come to know classes that all tasks share: joint training moves it and the features together, which
heads on features do not. So where one head of half of the tasks serves the other half, both ways are gone too. Where
nothing is tried before a chain, as in comparisons, the network stays as it is: under scanners, whose digits the network
knew as they were, heads on the features before its layer were 0.03 to 0.10 behind that layer, trained with the rest.

Where nothing before the scores can be read, because something comes after the last linear layer or theta has no effect
before it, heads stand on the scores themselves, and both ways are gone likewise.

Heads of the tasks' own on an output that is wider than all their classes, which may be meant as features, give way by
the test alone, at 0.05 %.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from pyro_lift.inference.adaptation.temperature import Predicted
from pyro_lift.models.adapters import RandomAdapter
from pyro_lift.models.chance import chance_loss
from pyro_lift.models.features import all_features, before_head
from pyro_lift.models.observation import AUTOMATIC_SCALE, first_output, naming_inputs, outputs
from pyro_lift.models.task import Rows, Task
from pyro_lift.support.evenly import spread_evenly
from pyro_lift.tuning.halves import FEWEST_TASKS, LEVEL, PLAIN, is_above_zero, log_probs_at
from pyro_lift.tuning.head_mean import head_mean
from pyro_lift.tuning.held_out import drawn_rows
from pyro_lift.tuning.predictions import least_losses

__all__ = ["Apart", "read_before_layer", "without_foreign_classes"]

log = logging.getLogger("pyro_lift")

#: Tasks that are asked, and rows of each, at most.
ASKED, ROWS = 64, 200
#: Of what heads of the tasks' own know of the classes, what the network's scores need to know to stay.
SHARE = 0.25


class Apart(NamedTuple):
    """A network whose own classes are not the tasks'.

    Attributes:
        adapter: read where the tasks' own heads stand, before its last layer or at its output.
        doubtful: whether the network as it stands could be trained to do better: where it knows the tasks' classes,
            where these share them, or heads have nothing else to stand on than its scores.
    """

    adapter: RandomAdapter
    doubtful: bool


@torch.no_grad()
def without_foreign_classes(
    adapter: RandomAdapter, tasks: Sequence[Task], head_scale: float | None, *, known_too: bool = True
) -> Apart | None:
    """Return the network read before its own last layer, where what that says is of other classes than the tasks'.

    Args:
        adapter: the network as a function of theta.
        tasks: of meta-training, which have passed the door.
        head_scale: of the tasks' own heads on the network's output; None where they share it.
        known_too: whether a network that knows the tasks' classes is put in doubt; as in runs of before, it stays.

    Returns:
        None where the network stays as it is: for tasks that are few, or not all of two classes or more; where its
        output is features already; and where the tasks' rows say so.
    """
    if any(task.kind != "classification" or (task.num_classes or 0) < 2 for task in tasks) or adapter.gives_features:
        return None
    tasks = [task for task in tasks if len(task.train) > 1]  # a single row is left out from none
    if len(tasks) < FEWEST_TASKS:
        log.info(
            "whether the network's own classes are the tasks' is not asked: that takes %d tasks of two rows or more. "
            "They are taken to be; head_scale=1.0 gives every task a head of its own.",
            FEWEST_TASKS,
        )
        return None
    device = adapter.initial.device
    some = [replace(task, train=drawn_rows(task.train, ROWS)).to(device) for task in spread_evenly(tasks, ASKED)]
    apart = read_before_layer(adapter, some[0].train)
    if head_scale is None:
        scores = [_scores(adapter, task) for task in some]
        if any(of_task.shape[-1] < (task.num_classes or 0) for of_task, task in zip(scores, some, strict=True)):
            return None  # the door says what is wrong
        pairs = [Predicted(x.softmax(-1), task.train.target) for x, task in zip(scores, some, strict=True)]
        network = -least_losses(pairs)
    elif apart is None:
        return None
    else:
        network = log_probs_at(adapter, adapter.initial, some, head_scale=head_scale)
    read = adapter if apart is None else apart
    mean = head_mean(read, some, few_rows=False, layer=known_too)  # as a run that goes on has asked it before
    unseen = [None if mean is None else mean.unseen_by([task]) for task in some]
    alone = [
        log_probs_at(read, read.initial, [task], head_scale=AUTOMATIC_SCALE, head_mean=around)
        for task, around in zip(some, unseen, strict=True)
    ]
    heads, frequencies = torch.cat(alone), -torch.tensor([chance_loss(task) for task in some], dtype=torch.float64)
    known, could = float((network - frequencies).mean()), float((heads - frequencies).mean())
    knows = head_scale is None and known >= SHARE * could
    better = is_above_zero(heads - network, LEVEL if head_scale is None else PLAIN)
    if not better or (knows and not known_too):
        return None
    shared = mean is not None and len(mean.head.head) > 0
    doubtful = head_scale is None and (knows or shared or apart is None)
    _tell([float(-x.mean()) for x in (network, heads, frequencies)], head_scale, apart is not None, doubtful)
    return Apart(read, doubtful)


def _tell(losses: Sequence[float], head_scale: float | None, before: bool, doubtful: bool) -> None:
    scores = "scores say less of the tasks' classes" if head_scale is None else "output says less than what it is of"
    where = "on the features before its last layer" if before else "on these scores, nothing before them being readable"
    left_out = "that layer is left out, and every task has a linear head of its own in its place, solved on its rows"
    doubt = "trained, either may be better. Both ways are tried before the chain; where nothing is, the network stays"
    log.info(
        "the network's own %s (%.3g nats a row; heads of the tasks' own %s: %.3g; class frequencies: %.3g): %s. "
        'head="shared" keeps the network\'s classes.',
        scores,
        losses[0],
        where,
        *losses[1:],
        doubt if doubtful else left_out,
    )


def read_before_layer(adapter: RandomAdapter, rows: Rows) -> RandomAdapter | None:
    """Read the network before its own last layer; None where it cannot be, or theta has no effect there."""
    if adapter.postprocess is not None or adapter.readout is not None:
        return None
    rows = rows.take(slice(0, 16))
    found = before_head(adapter, rows.positional, rows.named)
    if found is None:
        return None
    apart = adapter.reading(found)
    return apart if apart.has_reach(*rows.positional, **rows.named) else None


def _scores(adapter: RandomAdapter, task: Task) -> Tensor:
    """Compute the network's scores of a task's rows as it stands, ``[n, C]``."""

    def read(adapter: RandomAdapter, rows: Rows, theta: Tensor) -> Tensor:
        return outputs(adapter, rows, theta, None)

    first_output(adapter, task)  # what it cannot be called with is refused as at the door
    with naming_inputs(f"task {task.name!r}: the network cannot be called with its rows", task.train, adapter):
        return all_features(adapter, task.train, adapter.initial, read)

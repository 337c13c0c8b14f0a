r"""How free the biases of heads under label matching are, by the number of rows: what the tasks say together.

A few rows do not say how frequent a task's classes are. Under a prior of standard deviation 3 a bias follows them all
the same: one row makes its class as sure as nine tenths. So tasks are asked with 1 and 4 of their rows, drawn,

.. math:: \max_{s_b} \sum_i \sum_{n \notin M_i} \log p\big(y_n \mid x_n, \hat h_{M_i}(s_b)\big),

where a head has the scale and the width that it chooses by the rows M_i themselves. Rows that were dealt class by
class would have the class frequencies of those that were not, and let biases look better than they are. Of as many rows
as tasks have, one may have classes as even as the others, or not, and knows by itself: biases are as free as they were.
A task of a number between has a standard deviation between (:func:`~pyro_lift.models.heads.between`), or biases as
free as can be where its rows say so against it (:func:`~pyro_lift.models.head_choice.choose_matching_head`).
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from statistics import median_high
from typing import NamedTuple

import torch
from torch import Tensor

from pyro_lift.models.adapters import RandomAdapter
from pyro_lift.models.class_head import ClassHead
from pyro_lift.models.head_choice import choose_head
from pyro_lift.models.head_problem import apply_head
from pyro_lift.models.heads import BIAS_SD, BIAS_SDS, UsualPrior, solve_head
from pyro_lift.models.observation import head_features_of
from pyro_lift.models.solved_heads import zero_shot_scale
from pyro_lift.models.task import Task, head_outputs
from pyro_lift.support.evenly import spread_evenly
from pyro_lift.tuning.halves import FEWEST_TASKS
from pyro_lift.tuning.held_out import drawn_rows
from pyro_lift.tuning.usual_priors import CHOICE_ROWS, order_of

__all__ = ["matching_biases"]

log = logging.getLogger("pyro_lift")

#: Tasks that are asked, at most, numbers of rows, and how often rows are drawn for each.
ASKED, NUMBERS, DRAWS = 16, (1, 4), 4
#: The prior of a bias under which a head chooses its scale and width.
MIDDLE = UsualPrior(1.0, 0.3)


class _Read(NamedTuple):
    features: Tensor
    target: Tensor
    num_classes: int


@torch.no_grad()
def matching_biases(adapter: RandomAdapter, tasks: Sequence[Task]) -> ClassHead | None:
    """Find the prior of biases under label matching.

    Args:
        adapter: the network as a function of theta, read at its start.
        tasks: of meta-training, on its device.

    Returns:
        A head without rows, whose ``few`` are what the tasks say; None where they are too few, or have
        options of the rows' own, which have no biases.
    """
    read = [_read(adapter, task) for task in spread_evenly(tasks, ASKED) if adapter.matches(task.train.named)]
    asked = [task for task in read if task is not None]
    if len(asked) < FEWEST_TASKS:
        return None
    scale = zero_shot_scale(adapter)
    rows = median_high(len(task.target) for task in asked)
    found = []
    for number in NUMBERS:
        able = [(k, task) for k, task in enumerate(asked) if len(task.target) >= 2 * number]
        if len(able) < FEWEST_TASKS:
            break
        told = [_by_few(task, number, DRAWS * k, scale) for k, task in able]
        found.append((number, UsualPrior(1.0, _best(told))))
        log.info(
            "heads of %d row%s beside label texts have biases of sd %.3g.",
            number, "" if number == 1 else "s", found[-1][1].bias_sd,
        )  # fmt: skip
    width = asked[0].features.shape[-1] + 1
    none = ClassHead(asked[0].features.new_zeros(0, width), bias_sd=BIAS_SD, rows=rows)
    return none.with_few(tuple(found)) if found else None


def _read(adapter: RandomAdapter, task: Task) -> _Read | None:
    rows, classes = drawn_rows(task.train, CHOICE_ROWS), head_outputs(task)
    assert classes is not None
    features = head_features_of(adapter, task, rows, adapter.initial)
    return None if features.shape[-1] == classes else _Read(features, rows.target, classes)


def _by_few(task: _Read, number: int, seed: int, scale: float) -> Tensor:
    """Return the log probability of a task's other rows, a row, by heads of so many of them, for each sd of a bias."""
    orders = [order_of(len(task.target), 1 + seed + k) for k in range(DRAWS)]
    return torch.stack([_told(task, order[:number], order[number:], scale) for order in orders]).mean(0)


def _told(task: _Read, kept: Tensor, left_out: Tensor, scale: float) -> Tensor:
    kept, left_out = kept.to(task.target.device), left_out.to(task.target.device)
    x, y = task.features[kept], task.target[kept]
    choice, sds = choose_head(x, y, task.num_classes, scale, usual=MIDDLE), torch.tensor(BIAS_SDS).to(x)
    each = len(sds)  # all solved at once
    model = choice.model._replace(bias_sd=sds)
    head = solve_head(x.expand(each, *x.shape), y.expand(each, -1), model, prior_sd=choice.sd).head
    logits = apply_head(task.features[left_out].double(), head.double()).log_softmax(-1)
    return logits.gather(-1, task.target[left_out].expand(each, -1).unsqueeze(-1)).mean((-2, -1)).cpu()


def _best(told: Sequence[Tensor]) -> float:
    return BIAS_SDS[int(torch.stack(list(told)).mean(0).argmax())]

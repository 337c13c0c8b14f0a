"""Tasks of a regression whose targets vary, or lie, unlike those of most tasks: seen in the targets, without a pass."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

import torch
from torch import Tensor

from pyro_lift.models.task import Task

__all__ = ["Families", "families_of"]

#: Times the median over tasks that targets vary by, or its inverse. Honest families differ by 2 or 3.
SPREADS = 10.0
#: Spreads from the median that targets may lie around. With means that differed by 11 a new task got worse than its
#: mean; differences of a few spreads are what a hierarchy is for.
OFFSETS = 10.0
#: Rows from which on targets that vary little are no accident of the sample.
ROWS = 8


class Families(NamedTuple):
    """What tasks are unlike most tasks, by their place in the list.

    Attributes:
        spread: standard deviation of targets within a task, the median over tasks, of the column that is first unlike.
        middle: mean of the targets, likewise.
        units: standard deviations of those that vary unlike most.
        offsets: means of the others that lie far from most.
    """

    spread: float = 0.0
    middle: float = 0.0
    units: Mapping[int, float] = MappingProxyType({})
    offsets: Mapping[int, float] = MappingProxyType({})


def families_of(tasks: Sequence[Task]) -> Families:
    """Hold each regression's targets against those of the others, column by column; the first that says something.

    Of two families of one size, the one that varies more is the one that is unlike.

    Args:
        tasks: regressions of one network.
    """
    targets = [task.train.target.detach().double().cpu().reshape(len(task.train), -1) for task in tasks]
    if not targets or len({y.shape[1] for y in targets}) > 1:
        return Families()
    spreads = torch.stack([y.std(0, correction=0) for y in targets])
    means = torch.stack([y.mean(0) for y in targets])
    rows = torch.tensor([len(y) for y in targets])
    columns = [_of_column(spreads[:, m], means[:, m], rows) for m in range(spreads.shape[1])]
    return next((found for found in columns if found.units or found.offsets), columns[0])


def _of_column(spreads: Tensor, means: Tensor, rows: Tensor) -> Families:
    varying = spreads[spreads > 0.0]
    if not len(varying):
        return Families(middle=float(means.median()))
    spread = float(varying.median())  # the lower of two in the middle
    small = (spreads > 0.0) & (SPREADS * spreads < spread) & (rows >= ROWS)
    unlike = (spreads > SPREADS * spread) | small
    middle = float(means[~unlike].median())
    far = ~unlike & ((means - middle).abs() > OFFSETS * spread)
    return Families(
        spread,
        middle,
        {k: float(spreads[k]) for k in unlike.nonzero().flatten().tolist()},
        {k: float(means[k]) for k in far.nonzero().flatten().tolist()},
    )

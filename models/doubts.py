"""Doubts about a task's rows, each a flag and what to say if it is up: all flags of a task are looked at together.

A look at a value on an accelerator waits for it, so there is one for each task and not one for each question.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from pyro_lift.models.task import Rows, Task

__all__ = ["Doubt", "parts_of", "refuse_doubtful"]


class Doubt(NamedTuple):
    """A question about some rows.

    Attributes:
        wrong: whether they are refused, one truth value where the rows are.
        say: the message; called only where they are refused.
    """

    wrong: Tensor
    say: Callable[[], str]


def refuse_doubtful(doubts: Sequence[Doubt]) -> None:
    """Refuse the first of some rows that are wrong, with one look at all of them.

    Raises:
        ValueError: what the doubt says.
    """
    if not doubts:
        return
    device = doubts[0].wrong.device
    flags = torch.stack([doubt.wrong.to(device, non_blocking=True) for doubt in doubts])
    for wrong, doubt in zip(flags.tolist(), doubts, strict=True):
        if wrong:
            raise ValueError(doubt.say())


def parts_of(task: Task) -> list[tuple[str, Rows]]:
    """List a task's rows with what messages call them."""
    parts = (("train", task.train), ("dev", task.dev), ("test", task.test))
    return [(f"task {task.name!r}, {part} data", rows) for part, rows in parts if rows is not None]

r"""The power on the likelihood in adaptation to tasks of tokens, found on tasks that joint training has not seen.

The default's prior holds a task close to phi. For classes and for texts that go on that is right, or as good as
anything else: of powers from 0.3 to 30 none predicted better by more than 0.003 nats a row on five families of classes
and regressions, and 10 was 0.006 nats a token behind 1 on Shakespeare's roles. Where short answers are written, and the
network writes other words before adaptation, a task is ten nats a row away from phi, and the prior pulls it back on its
way: with ten times the power answers had 0.44 nats a token in place of 0.54. So each half's vector is adapted to tasks
of the other on three quarters of their rows, at both powers, and the larger is taken where it predicts the last quarter
better on average, by more than a hundredth of a nat.

No test decides, as it does elsewhere (:mod:`~pyro_lift.tuning.halves`). Six tasks of a few written answers tell little
(0.57 ± 0.58 nats a row where the gain on unseen tasks was plain), and the two mistakes do not cost the same: a larger
power where there is nothing to gain costs thousandths of a nat, a smaller one where there is costs tenths.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch

from pyro_lift.models.task import Task
from pyro_lift.tuning.halves import Score, paired

__all__ = ["STRONGER", "TASKS", "stronger_where_better"]

log = logging.getLogger("pyro_lift")

#: The power that is tried beside 1.
STRONGER = 10.0
#: Tasks of each half that are adapted to: each costs an adaptation at both powers. Fewer than the least tell nothing.
TASKS, LEAST = 3, 4
#: Nats a row that the larger power has to gain.
TIE = 0.01


def stronger_where_better(adapt: Callable[[float], Sequence[tuple[Any, Task]]], score: Score) -> float:
    """Return the power over that of meta-training: :data:`STRONGER` where it predicts better on average, else 1.

    Args:
        adapt: gives posteriors at a power, each beside its task, whose test rows it has not seen.
        score: mean log probability a row of tasks' training rows at one vector.
    """
    by_power = []
    for power in (1.0, STRONGER):
        judged = [(posterior.thetas, task) for posterior, task in adapt(power)]
        if len(judged) < LEAST:
            return 1.0
        by_power.append(torch.stack([_log_prob(thetas, task, score) for thetas, task in judged]))
    gain, error = paired(by_power[1] - by_power[0])
    taken = gain > TIE
    log.info(
        "adaptation with %g times the power on the likelihood: %+.3f ± %.3f nats a row on unseen tasks; it is %s",
        STRONGER, gain, error, "taken" if taken else "not taken",
    )  # fmt: skip
    return STRONGER if taken else 1.0


def _log_prob(thetas: torch.Tensor, task: Task, score: Score) -> torch.Tensor:
    """Compute the mean over draws ``[S, D]`` of the mean log probability a row of the task's test rows."""
    assert task.test is not None
    left_out = replace(task, train=task.test, test=None)
    return torch.stack([score(theta, [left_out])[0] for theta in thetas]).mean()

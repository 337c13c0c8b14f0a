"""What bringing predictions to a prior's temperature gains on rows that were not adapted to."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pyro_lift import LiFTPrior, Task
from pyro_lift.metrics.probabilities import nll


def calibrated_gains(prior: LiFTPrior, tasks: Sequence[Task]) -> Tensor:
    """Return how much lower the NLL of each task's test rows is at the prior's temperature, ``[T]``."""
    gains = []
    for posterior, task in zip(prior.adapt_many(tasks, seed=0), tasks, strict=True):
        assert task.test is not None
        raw, brought = (posterior.predict(task.test, calibrated=calibrated) for calibrated in (False, True))
        gains.append(nll(raw, task.test.target) - nll(brought, task.test.target))
    return torch.tensor(gains)

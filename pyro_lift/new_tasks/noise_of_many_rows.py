r"""The noise of a new task's own, where a regression without a head has many more rows than the prior's tasks.

Meta-training finds one noise for all tasks, by what adaptations to their few rows miss of others. An adaptation to many
rows misses less, and these say how much: with predictions :math:`m, s^2` of its own n rows,

.. math:: c = \frac{n_0 + \sum_n (y_n - m_n)^2 / s_n^2}{n_0 + n}, \qquad n_0 = 8,

is the factor on the variance of its predictions, one for each value. An adapter close to phi overfits its rows little,
and :math:`n_0` rows that are missed by as much as tasks miss theirs stand against that. Heads of a task's own say it
for any number of rows (:mod:`~pyro_lift.models.dispersion`).

Of a made-up family of twelve tasks of 15 rows, 90 % intervals of ten new ones hold 0.91, 0.91, 0.92, 0.90 and 0.91 of
their targets for 40, 60, 150, 600 and 2,000 rows (0.99 under the common noise), 0.16 to 0.41 nats a row better.
"""

from __future__ import annotations

import torch

from pyro_lift.posterior import TaskPosterior
from pyro_lift.support.evenly import spread_evenly

__all__ = ["set_own_noise"]

#: Rows that a task is asked with at most, and those that stand against them.
ASKED, AGAINST = 1_000, 8


@torch.no_grad()
def set_own_noise(posterior: TaskPosterior, since: int) -> None:
    """Give the posterior of a regression without a head the noise that its rows say; any other stays as it is.

    Args:
        posterior: its ``dispersion`` is set.
        since: rows from which on; 0: never.
    """
    task, rows = posterior.task, len(posterior.task.train)
    if task.kind != "regression" or posterior.heads is not None or not since or rows <= since:
        return
    some = task.train.take(torch.tensor(spread_evenly(range(rows), ASKED)))
    missed = some.target - posterior.predict(some).to(some.target)
    ratio = (missed / posterior.predict_sd(some).to(missed)).square().reshape(len(some), -1).double()
    posterior.dispersion = (AGAINST + rows * ratio.mean(0)) / (AGAINST + rows)

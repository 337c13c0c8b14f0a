r"""The noise of a new task's own, where a regression has many more rows than the prior's tasks.

Meta-training finds one noise for all tasks, by what adaptations to their few rows miss of others. An adaptation to many
rows misses others by less, or follows its own by heart and misses others by more than it expects, and rows that a chain
has not seen say how much: a second chain runs without every fifth row, and with its predictions
:math:`\hat y_k, s_k^2` of the m rows that were kept from it,

.. math:: c = \frac{m_0 + \sum_k (y_k - \hat y_k)^2 / s_k^2}{m_0 + m}, \qquad m_0 = 8,

is the factor on the variance of the first one's predictions, one for each value. Eight rows that are missed by as much
as tasks miss theirs stand against those that were kept, so that a few of these do not say all.

Rows that a chain has seen do not say it: some 35 weights of a small network fit 60 rows to 0.13 where others are missed
by 0.23. By them 90 % intervals held 0.65 to 0.89 of the targets of 45 to 120 rows in four made-up families, by rows
that were kept 0.89 to 0.95, under the common noise 0.87 to 0.97.

Heads of a task's own say it too (:mod:`~pyro_lift.models.dispersion`), against what those of meta-training's tasks say,
and that is of as many rows as these have. Of 15 rows, tasks of a family missed each by 4.1 times the expected square,
since the network did not yet fit them, of 60 by about as much as expected, and were taken for a quarter as noisy as
they are. So from a quarter more rows on kept rows say it there as well, in the place of heads, and against them stand
as many rows as all tasks count for there (:math:`m_0 = \min(8, \nu)`: few where tasks are unevenly noisy), with the
width that values have beside one another.

A head in the place of a network's own layer (:mod:`~pyro_lift.new_tasks.heads_beside_layer`) may miss rows by far less
than that layer, by which the common noise was found. There what stands against the kept rows is what the task's rows
miss of one another at the start, where that is less, :math:`\min(r, 1)` times the square of the common noise.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from pyro_lift.inference.adaptation.unmoved import ONE_OF
from pyro_lift.models.dispersion import Dispersion
from pyro_lift.models.rows import Rows
from pyro_lift.models.task import Task
from pyro_lift.posterior import TaskPosterior

__all__ = ["set_own_noise"]

log = logging.getLogger("pyro_lift")

#: Share of ``many_rows`` from which on tasks with heads are asked; of twice the usual rows, a quarter more than these.
HEADS_FROM = 0.625
#: Rows from which on a task is asked (a fifth of fewer says nothing), and kept rows that stand against those of a task.
ASKED_FROM, AGAINST = 20, 8


def set_own_noise(
    posteriors: Sequence[TaskPosterior],
    since: int,
    run: Callable[[Sequence[Task]], Sequence[TaskPosterior | None]],
    dispersion: Dispersion | None = None,
    *,
    by_rows: bool = False,
) -> None:
    """Give posteriors of regressions of many rows the noise that these say; any others stay as they are.

    Args:
        posteriors: the ``dispersion`` of some is set, in the place of what heads have said.
        since: rows from which on; 0: never.
        run: adapts to some tasks as the posteriors' chains were; None where a chain was lost.
        dispersion: what tasks of meta-training with heads say of how unevenly they vary.
        by_rows: whether the common noise is of predictions without heads, so that rows of a task with one may say less.
    """
    against = AGAINST if dispersion is None else min(AGAINST, dispersion.rows)
    some = [posterior for posterior in posteriors if _is_asked(posterior, since)]
    if not some:
        return
    for posterior in some:
        log.info(
            "task %r has %d rows, more than the %g from which on a regression %s has its own noise: a second chain "
            "runs without every fifth row, and is asked for it. many_rows=0 in its adaptation leaves it out.",
            posterior.task.name, len(posterior.task.train), _least(posterior, since),
            "on the network's outputs" if posterior.heads is None else "with a head",
        )  # fmt: skip
    parts = [_in_two(posterior.task) for posterior in some]
    found = run([cut for cut, _ in parts])
    for posterior, (_, kept), without in zip(some, parts, found, strict=True):
        if without is None:
            log.warning(
                "task %r: the chain that was to say the noise of its own was lost; it stays as it is with many_rows=0.",
                posterior.task.name,
            )  # fmt: skip
            continue
        usual = _at_most_common(posterior) if by_rows else _usual(posterior, dispersion)
        without.dispersion = usual  # not what its heads say
        factor = _factor(without, kept, against)
        posterior.dispersion = factor if usual is None else usual * factor


def _is_asked(posterior: TaskPosterior, since: int) -> bool:
    is_regression, rows = posterior.task.kind == "regression", len(posterior.task.train)
    return is_regression and since > 0 and rows > _least(posterior, since) and rows >= ASKED_FROM


def _least(posterior: TaskPosterior, since: int) -> float:
    """Return the rows from which on a task is asked: with a head fewer, as its rows are held against others'."""
    return since if posterior.heads is None else HEADS_FROM * since


def _in_two(task: Task) -> tuple[Task, Rows]:
    """Keep every fifth row from the task that the second chain is of."""
    rows = torch.arange(len(task.train))
    is_kept = rows % ONE_OF == ONE_OF // 2
    return replace(task, train=task.train.take(rows[~is_kept])), task.train.take(rows[is_kept])


@torch.no_grad()
def _factor(posterior: TaskPosterior, kept: Rows, against: float) -> Tensor:
    """Return c of a posterior's predictions by rows that its chain has not seen, one factor for each value."""
    missed = kept.target - posterior.predict(kept).to(kept.target)
    ratio = (missed / posterior.predict_sd(kept).to(missed)).square().reshape(len(kept), -1).double()
    return (against + ratio.sum(0)) / (against + len(kept))


def _at_most_common(posterior: TaskPosterior) -> Tensor | None:
    """Return what a task's rows miss of one another over the common noise's square, ``[M]``, 1 at most."""
    return None if posterior.left_out is None else posterior.left_out.double().clamp(max=1.0)


def _usual(posterior: TaskPosterior, dispersion: Dispersion | None) -> Tensor | None:
    """Return the factors of each value that all tasks have, ``[M]``; None where there are no heads to have said it."""
    said = posterior.dispersion
    if said is None or dispersion is None:
        return None
    return torch.as_tensor(dispersion.values, dtype=torch.float64).expand(len(said))

r"""Heads of a new task's own beside a network's last layer, where it has many more rows than the prior's tasks.

Where a network has the tasks' classes itself, all of a task's own is in its adapter. Of the few rows that the prior's
tasks have that is the better way: a prior over adapters knows what such rows do not. It does not grow with rows: an
adapter of low rank, held close to phi, is soon all that it can be, where a head on what the layer sees would learn on.
So from :math:`2 n_0` rows on, :math:`n_0` what tasks of the prior have, a share

.. math:: w(n) = 1 - \frac{2 n_0}{n}

of the draws is of a second chain, in which the task has a head of its own on the features before the layer, solved,
with its prior around the layer at phi (:mod:`~pyro_lift.models.solved_heads`). The layer of the other draws is a head
on these features too, so that a posterior is of one kind, and predictions average over both. No row decides between
them: of a hundred, a fifth of which were kept from both chains, the difference has a standard error of 0.15 nats.

A temperature T of the layer's predictions was found without heads. Where they are of two kinds they flatten each other,
so that less of it is right, :math:`T^{\max(0, 1 - 2 w)}`: none where heads are half of the draws.

Rows are taken for rows like those to come: a class that a hundred of them lack is taken to be rare, though the network
may know it.

**Regressions** whose network's output is their value have ridge heads likewise, around the layer at phi, and in all of
the draws: of forty rows, where tasks have fifteen, they are better by 0.05 to 0.15 nats even where few rows are
predicted better by the layer. Their noise is what rows say that a further chain has not seen
(:mod:`~pyro_lift.new_tasks.noise_of_many_rows`).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import replace
from statistics import median

import torch
from torch import Tensor

from pyro_lift.inference.adaptation.chain import Shown, Source
from pyro_lift.inference.adaptation.failures import LostTasksError
from pyro_lift.inference.sgld import DivergedError
from pyro_lift.models.adapters import RandomAdapter
from pyro_lift.models.class_head import ClassHead
from pyro_lift.models.features import before_layer
from pyro_lift.models.observation import AUTOMATIC_SCALE
from pyro_lift.models.task import Task, head_outputs
from pyro_lift.new_tasks.adaptation import Adaptation, new_head_scale
from pyro_lift.new_tasks.noise_of_many_rows import set_own_noise
from pyro_lift.posterior import TaskPosterior

__all__ = ["adapt_alone", "adapt_together", "draws_of_heads", "many_rows"]

log = logging.getLogger("pyro_lift")

#: Times the rows that a prior's tasks have, from which on a new task has heads of its own too.
MANY_MORE = 2


def many_rows(tasks: Sequence[Task]) -> int:
    """Return the rows from which on a new task has heads of its own too: twice the median over a prior's tasks."""
    return max(round(MANY_MORE * median([len(task.train) for task in tasks])), 1)


def draws_of_heads(rows: int, since: int, draws: int) -> int:
    """Count the draws of classes that have a head of the task's own, w(n) of all; one stays the network's.

    Args:
        rows: n, of the task.
        since: rows from which on there are any; 0: never.
        draws: of the posterior.
    """
    return min(round((1.0 - since / rows) * draws), draws - 1) if since and rows > since else 0


def adapt_alone(adaptation: Adaptation, task: Task, source: Source, shown: Shown) -> TaskPosterior:
    """Adapt to one task (:meth:`.Adaptation.alone`), with heads or noise of its own where it has rows for that."""
    posteriors: list[TaskPosterior | None] = [adaptation.alone(task, source, shown)]

    def run(other: Adaptation, some: Sequence[Task]) -> Sequence[TaskPosterior]:
        return [other.alone(some[0], source, shown._replace(tasks=some))]

    _go_by_own_rows(adaptation, [task], posteriors, run)
    return _all(posteriors)[0]


def adapt_together(
    adaptation: Adaptation, tasks: Sequence[Task], block_size: int, seed: int | None, shown: Shown
) -> list[TaskPosterior]:
    """Adapt to several tasks (:meth:`.Adaptation.many`), with heads or noise of their own where rows suffice.

    Raises:
        LostTasksError: chains of some tasks diverged under the network's own classes; it has the others' posteriors.
    """

    def run(other: Adaptation, some: Sequence[Task]) -> Sequence[TaskPosterior]:
        return other.many(some, block_size, seed, shown._replace(tasks=some))

    try:
        posteriors: list[TaskPosterior | None] = list(adaptation.many(tasks, block_size, seed, shown))
    except LostTasksError as error:
        _go_by_own_rows(adaptation, tasks, error.posteriors, run)
        raise
    _go_by_own_rows(adaptation, tasks, posteriors, run)
    return _all(posteriors)


def _all(posteriors: Sequence[TaskPosterior | None]) -> list[TaskPosterior]:
    return [posterior for posterior in posteriors if posterior is not None]


def _go_by_own_rows(
    adaptation: Adaptation,
    tasks: Sequence[Task],
    posteriors: list[TaskPosterior | None],
    run: Callable[[Adaptation, Sequence[Task]], Sequence[TaskPosterior | None]],
) -> None:
    """Give posteriors of tasks that have rows enough a noise of their own, or put draws with heads into them.

    Args:
        adaptation: under the network's own classes.
        tasks: all.
        posteriors: of each, None where it was lost; those of tasks with heads are replaced.
        run: makes posteriors of some tasks by another adaptation.
    """
    by_heads, replaced = _with_heads(adaptation, tasks, posteriors, run)
    since = adaptation.how.many_rows or 0
    stay = [posterior for k, posterior in enumerate(posteriors) if k not in replaced]
    set_own_noise(_all(stay), since, lambda cut: _found(run, adaptation, cut)[0], adaptation.dispersion)
    if by_heads is not None:
        of_heads = _all([posteriors[k] for k in replaced])
        set_own_noise(of_heads, since, lambda cut: _found(run, by_heads, cut)[0], by_rows=True)


def _with_heads(
    adaptation: Adaptation,
    tasks: Sequence[Task],
    posteriors: list[TaskPosterior | None],
    run: Callable[[Adaptation, Sequence[Task]], Sequence[TaskPosterior | None]],
) -> tuple[Adaptation | None, list[int]]:
    """Put draws with heads into posteriors; return the adaptation that made them, and the places of regressions."""
    places = [k for k, task in enumerate(tasks) if posteriors[k] is not None and _has_rows(adaptation, task)]
    adapter = _before_layer(adaptation.adapter, tasks[places[0]]) if places else None
    if adapter is None:
        return None, []
    layer = _layer_at(adapter, adaptation.mixture.get().mean.reshape(-1))
    places = [k for k in places if head_outputs(tasks[k]) == len(layer)]
    some, replaced = [tasks[k] for k in places], list[int]()
    if not some:
        return None, []
    _tell(adaptation, some)
    by_heads = _of_heads(adaptation, adapter, layer, values=some[0].kind == "regression")
    found, error = _found(run, by_heads, some)
    for k, of_heads in zip(places, found, strict=True):
        of_layer = posteriors[k]
        assert of_layer is not None
        if of_heads is not None and tasks[k].kind == "regression":
            posteriors[k] = of_heads
            replaced.append(k)
            continue
        if of_heads is not None:
            posteriors[k] = _mixed(of_layer, of_heads, adaptation)
            continue
        log.warning(
            "task %r: the chain of heads of its own, beside the network's last layer, was lost; its posterior is of "
            "that alone, as with many_rows=0. %s", tasks[k].name, error,
        )  # fmt: skip
    return by_heads, replaced


def _found(
    run: Callable[[Adaptation, Sequence[Task]], Sequence[TaskPosterior | None]],
    adaptation: Adaptation,
    tasks: Sequence[Task],
) -> tuple[Sequence[TaskPosterior | None], Exception | None]:
    """Run a second chain of some tasks: posteriors, None where one was lost, and the error of the first of these."""
    try:
        return run(adaptation, tasks), None
    except LostTasksError as lost:
        return lost.posteriors, lost.errors[0]
    except DivergedError as lost:
        return [None], lost


def _draws_of_heads(adaptation: Adaptation, task: Task) -> int:
    return draws_of_heads(len(task.train), adaptation.how.many_rows or 0, adaptation.how.draws)


def _has_rows(adaptation: Adaptation, task: Task) -> bool:
    """Whether a task of classes or values that the network has itself has rows enough for heads beside its layer."""
    how, settings = adaptation.how, adaptation.settings
    kinds = ("classification", "regression") if adaptation.value_heads else ("classification",)
    if how.dev_every > 0 or task.kind not in kinds or settings.head in ("langevin", "shared"):
        return False
    if new_head_scale(adaptation.adapter, settings, [task]) is not None:
        return False
    if task.kind == "regression":
        return 0 < (how.many_rows or 0) < len(task.train)
    return _draws_of_heads(adaptation, task) > 0


def _tell(adaptation: Adaptation, tasks: Sequence[Task]) -> None:
    for task in tasks:
        if task.kind == "regression":
            log.info(
                "task %r has %d rows, more than the %d from which on a regression has a head of its own in place of "
                "the network's last layer. many_rows=0 in its adaptation leaves it out.",
                task.name, len(task.train), adaptation.how.many_rows,
            )  # fmt: skip
            continue
        log.info(
            "task %r has %d rows, more than the %d from which on tasks have heads of their own beside the network's "
            "classes: %d of %d draws do. many_rows=0 in its adaptation leaves them out.",
            task.name, len(task.train), adaptation.how.many_rows, _draws_of_heads(adaptation, task),
            adaptation.how.draws,
        )  # fmt: skip


def _of_heads(adaptation: Adaptation, adapter: RandomAdapter, layer: Tensor, *, values: bool) -> Adaptation:
    """Make the adaptation with heads on what the network's last layer sees, around that layer at phi."""
    how = adaptation.how
    if not values:  # whose other draws have asked whether a task is none of the kind
        how = replace(how, untouched=0.0)
    return replace(
        adaptation,
        adapter=adapter,
        head_mean=ClassHead(layer),
        settings=replace(adaptation.settings, head="solve", head_scale=AUTOMATIC_SCALE),
        how=how,
    )


def _before_layer(adapter: RandomAdapter, task: Task) -> RandomAdapter | None:
    """Read the network before its last layer, found by some rows of a task; None where that is not linear."""
    if adapter.postprocess is not None or adapter.readout is not None or adapter.before_head is not None:
        return None
    rows = task.train.take(slice(0, 16)).to(adapter.initial.device)
    found = before_layer(adapter, rows.positional, rows.named)
    if found is None or found.layer is None:
        return None
    apart = adapter.reading(found)
    return apart if apart.has_reach(*rows.positional, **rows.named) else None


@torch.no_grad()
def _layer_at(adapter: RandomAdapter, theta: Tensor) -> Tensor:
    """Return the weights and biases ``[C, E + 1]`` of the last layer, its adapter at theta ``[D]`` in it."""
    found = adapter.before_head
    assert found is not None
    with adapter.bound(theta.to(adapter.initial)):
        return found.layer_in_use()


def _mixed(of_layer: TaskPosterior, of_heads: TaskPosterior, adaptation: Adaptation) -> TaskPosterior:
    """Put draws of both chains into one posterior, each chain's spread evenly over it; those of the layer first."""
    draws, count = len(of_layer.thetas), _draws_of_heads(adaptation, of_layer.task)
    first, second = _spread(draws, draws - count), _spread(len(of_heads.thetas), count)
    assert of_heads.heads is not None
    layers = torch.stack([_layer_at(of_heads.adapter, theta) for theta in of_layer.thetas[first]])
    mixed = copy(of_heads)
    mixed.component, mixed.mcmc = of_layer.component, of_layer.mcmc
    if adaptation.tempered_rows is not None and adaptation.tempered_rows.rows <= (adaptation.how.many_rows or 0):
        mixed.prediction_temperature = of_layer.prediction_temperature ** max(0.0, 1.0 - 2.0 * count / draws)
    mixed.thetas = torch.cat([of_layer.thetas[first], of_heads.thetas[second]])
    mixed.heads = torch.cat([layers.to(of_heads.heads), of_heads.heads[second]])
    return mixed


def _spread(draws: int, count: int) -> list[int]:
    """Return the places of so many of a chain's draws, evenly spaced, the last among them."""
    return [draws * (k + 1) // count - 1 for k in range(count)]
